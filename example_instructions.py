"""Ask a Code Llama Instruct model.

    python example_instructions.py
    torchrun --nproc_per_node 2 example_instructions.py --ckpt_dir CodeLlama-13b-Instruct

Without --ckpt_dir it uses the small demo checkpoint. --prompt_file FILE (or /dev/stdin) asks your own question.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import fire

from codellama import CodeLlamaError, Dialog, Llama, SamplingParams

DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "Write a Python function that checks whether a number is prime."}],
    [{"role": "user", "content": "Can you write a function that counts the words in a text?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Write code that reverses a string."}],
]


def flags(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.2,
    top_p: float = 0.95,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    max_gen_len: int | None = None,
    prompt_file: str | None = None,
) -> dict[str, Any]:
    """Name the flags; they are checked before anything is loaded."""
    return locals()


def main(temperature: float, top_p: float, max_gen_len: int | None, prompt_file: str | None, **build: Any) -> None:
    """Ask and print the answers."""
    SamplingParams(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)  # wrong values fail before loading
    llama = Llama.build(**build)
    dialogs = DIALOGS
    if prompt_file is not None:
        question = llama.parallel.share(lambda: Path(str(prompt_file)).read_bytes().decode())
        dialogs = [[{"role": "user", "content": question}]]
    results = llama.chat_completion(dialogs, temperature, top_p, max_gen_len)
    if llama.parallel.world_rank == 0:
        for dialog, result in zip(dialogs, results, strict=True):
            for message in [*dialog, result["generation"]]:
                print(f"\033[1m{message['role']}\033[0m: {message['content']}\n")
            print("─" * 40)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(**fire.Fire(flags, serialize=lambda _: None))
    except (CodeLlamaError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
