"""Fill gaps in code with a Code Llama model.

    python example_infilling.py
    torchrun --nproc_per_node 1 example_infilling.py --ckpt_dir CodeLlama-7b

Without --ckpt_dir it uses the small demo checkpoint. --prompt_file FILE fills the <FILL> of your own text.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import fire

from codellama import CodeLlamaError, Llama, SamplingParams

PROMPTS = [
    "def gcd(a, b):\n    while b:\n        <FILL>\n    return a\n",
    "def read_lines(path):\n    with <FILL> as file:\n        return file.read().splitlines()\n",
    "import os\n\n\ndef file_size(path):\n    <FILL>\n    return size\n",
]


def flags(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_seq_len: int = 192,
    max_batch_size: int = 4,
    max_gen_len: int | None = 128,
    prompt_file: str | None = None,
) -> dict[str, Any]:
    """Name the flags; they are checked before anything is loaded."""
    return locals()


def main(temperature: float, top_p: float, max_gen_len: int | None, prompt_file: str | None, **build: Any) -> None:
    """Fill the gaps and print the texts."""
    SamplingParams(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)  # wrong values fail before loading
    llama = Llama.build(**build)
    prompts = PROMPTS
    if prompt_file is not None:
        prompts = llama.parallel.share(lambda: [Path(str(prompt_file)).read_bytes().decode()])
    if any(prompt.count("<FILL>") != 1 for prompt in prompts):
        raise ValueError("exactly one <FILL> was expected in the text")
    prefixes, _, suffixes = zip(*(prompt.partition("<FILL>") for prompt in prompts), strict=True)
    results = llama.text_infilling(prefixes, suffixes, temperature, top_p, max_gen_len)
    if llama.parallel.world_rank == 0:
        for prefix, suffix, result in zip(prefixes, suffixes, results, strict=True):
            print(f"{prefix}\033[1m{result['generation']}\033[0m{suffix}\n{'─' * 40}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(**fire.Fire(flags, serialize=lambda _: None))
    except (CodeLlamaError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
