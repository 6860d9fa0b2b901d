"""Complete code with a Code Llama model: `python example_completion.py --help`."""

import codellama

PROMPTS = [
    "def is_even(n):\n    ",
    "def mean(numbers):\n    ",
    "import json\n\n\ndef load_json(path):\n    with open(path) as file:\n        ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        ",
]


def main(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.2,
    top_p: float = 0.9,
    max_seq_len: int = 256,
    max_batch_size: int = 4,
    max_gen_len: int | None = None,
    prompt_file: str | None = None,
) -> None:
    """Complete pieces of code with a Code Llama model and print them.

    Args:
        ckpt_dir (FOLDER): the weights; without it, the small demo checkpoint.
        tokenizer_path (FILE): without it, tokenizer.model beside the weights.
        temperature: 0 always takes the most probable token; higher draws more freely.
        top_p: draw from the most probable tokens that together have this probability.
        max_seq_len: tokens of prompt and generation together.
        max_batch_size: prompts that run at once; more wait.
        max_gen_len: tokens to generate at most; without it, as many as max_seq_len leaves.
        prompt_file (FILE): complete this text in place of the example's prompts; - is standard input.

    Examples:
        python example_completion.py
        python example_completion.py --ckpt_dir CodeLlama-7b --prompt_file unfinished.py
        torchrun --nproc_per_node 2 example_completion.py --ckpt_dir CodeLlama-13b
    """
    # Wrong values and files are refused here; torch is loaded when Llama is used for the first time.
    codellama.SamplingParams(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
    prompts = PROMPTS if prompt_file is None else [codellama.read_prompt(prompt_file)]
    llama = codellama.Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    results = llama.text_completion(prompts, temperature, top_p, max_gen_len)
    if llama.parallel.world_rank == 0:
        for prompt, result in zip(prompts, results, strict=True):
            print(f"{prompt}\033[1m{result['generation']}\033[0m\n{'─' * 40}")


if __name__ == "__main__":
    codellama.run_command(main, "example_completion.py")
