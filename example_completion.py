"""Complete code with a Code Llama model.

    python example_completion.py
    torchrun --nproc_per_node 2 example_completion.py --ckpt_dir CodeLlama-13b

Without --ckpt_dir it uses the small demo checkpoint. --prompt_file FILE (or /dev/stdin) completes your own text.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import fire

from codellama import CodeLlamaError, Llama, SamplingParams

PROMPTS = [
    "def is_even(n):\n    ",
    "def mean(numbers):\n    ",
    "import json\n\n\ndef load_json(path):\n    with open(path) as file:\n        ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        ",
]


def flags(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.2,
    top_p: float = 0.9,
    max_seq_len: int = 256,
    max_batch_size: int = 4,
    max_gen_len: int | None = None,
    prompt_file: str | None = None,
) -> dict[str, Any]:
    """Name the flags; they are checked before anything is loaded."""
    return locals()


def main(temperature: float, top_p: float, max_gen_len: int | None, prompt_file: str | None, **build: Any) -> None:
    """Complete the prompts and print them."""
    SamplingParams(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)  # wrong values fail before loading
    llama = Llama.build(**build)
    prompts = PROMPTS
    if prompt_file is not None:
        prompts = llama.parallel.share(lambda: [Path(str(prompt_file)).read_bytes().decode()])
    results = llama.text_completion(prompts, temperature, top_p, max_gen_len)
    if llama.parallel.world_rank == 0:
        for prompt, result in zip(prompts, results, strict=True):
            print(f"{prompt}\033[1m{result['generation']}\033[0m\n{'─' * 40}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(**fire.Fire(flags, serialize=lambda _: None))
    except (CodeLlamaError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
