"""Ask a Code Llama Instruct model: `python example_instructions.py --help`."""

import codellama

DIALOGS: list[codellama.Dialog] = [
    [{"role": "user", "content": "Write a Python function that checks whether a number is prime."}],
    [{"role": "user", "content": "Can you write a function that counts the words in a text?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Write code that reverses a string."}],
]


def main(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.2,
    top_p: float = 0.95,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    max_gen_len: int | None = None,
    prompt_file: str | None = None,
) -> None:
    """Ask a Code Llama Instruct model for code and print its answers.

    Args:
        ckpt_dir (FOLDER): the weights; without it, the small demo checkpoint.
        tokenizer_path (FILE): without it, tokenizer.model beside the weights.
        temperature: 0 always takes the most probable token; higher draws more freely.
        top_p: draw from the most probable tokens that together have this probability.
        max_seq_len: tokens of prompt and generation together.
        max_batch_size: prompts that run at once; more wait.
        max_gen_len: tokens to generate at most; without it, as many as max_seq_len leaves.
        prompt_file (FILE): ask this question in place of the example's; - is standard input.

    Examples:
        python example_instructions.py
        python example_instructions.py --ckpt_dir CodeLlama-7b-Instruct --prompt_file question.txt
        torchrun --nproc_per_node 2 example_instructions.py --ckpt_dir CodeLlama-13b-Instruct
    """
    # Wrong values and files are refused here; torch is loaded when Llama is used for the first time.
    codellama.SamplingParams(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
    dialogs = DIALOGS
    if prompt_file is not None:
        dialogs = [[{"role": "user", "content": codellama.read_prompt(prompt_file)}]]
    llama = codellama.Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    results = llama.chat_completion(dialogs, temperature, top_p, max_gen_len)
    if llama.parallel.world_rank == 0:
        for dialog, result in zip(dialogs, results, strict=True):
            for message in [*dialog, result["generation"]]:
                print(f"\033[1m{message['role']}\033[0m: {message['content']}\n")
            print("─" * 40)


if __name__ == "__main__":
    codellama.run_command(main, "example_instructions.py")
