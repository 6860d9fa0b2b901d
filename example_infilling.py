"""Fill gaps in code with a Code Llama model: `python example_infilling.py --help`."""

import codellama

PROMPTS = [
    "def gcd(a, b):\n    while b:\n        <FILL>\n    return a\n",
    "def read_lines(path):\n    with <FILL> as file:\n        return file.read().splitlines()\n",
    "import os\n\n\ndef file_size(path):\n    <FILL>\n    return size\n",
]


def main(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_seq_len: int = 192,
    max_batch_size: int = 4,
    max_gen_len: int | None = 128,
    prompt_file: str | None = None,
) -> None:
    """Fill gaps in pieces of code with a Code Llama model and print them.

    Args:
        ckpt_dir (FOLDER): the weights; without it, the small demo checkpoint.
        tokenizer_path (FILE): without it, tokenizer.model beside the weights.
        temperature: 0 always takes the most probable token; higher draws more freely.
        top_p: draw from the most probable tokens that together have this probability.
        max_seq_len: tokens of prompt and generation together.
        max_batch_size: prompts that run at once; more wait.
        max_gen_len: tokens to generate at most.
        prompt_file (FILE): fill the <FILL> of this text in place of the example's; - is standard input.

    Examples:
        python example_infilling.py
        python example_infilling.py --ckpt_dir CodeLlama-7b --prompt_file unfinished.py
        torchrun --nproc_per_node 2 example_infilling.py --ckpt_dir CodeLlama-13b
    """
    # Wrong values and files are refused here; torch is loaded when Llama is used for the first time.
    codellama.SamplingParams(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
    prompts = PROMPTS if prompt_file is None else [codellama.read_prompt(prompt_file)]
    prefixes, suffixes = zip(*map(codellama.split_prompt, prompts), strict=True)
    llama = codellama.Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    results = llama.text_infilling(prefixes, suffixes, temperature, top_p, max_gen_len)
    if llama.parallel.world_rank == 0:
        for prefix, suffix, result in zip(prefixes, suffixes, results, strict=True):
            print(f"{prefix}\033[1m{result['generation']}\033[0m{suffix}\n{'─' * 40}")


if __name__ == "__main__":
    codellama.run_command(main, "example_infilling.py")
