"""Measure the demo checkpoint on files that it was never trained on.

    python -m tools.evaluate_demo
    python -m tools.evaluate_demo --ckpt_dir runs/other --files 20

Prints a table and one line of JSON last: bits per byte, one-line infills, chat answers. Everything is greedy and in
float32, and what is asked is drawn with a fixed seed, so the numbers repeat on one machine and its Python version.
"""

import ast
import json
import math
import platform
import random
import re
import sys

import fire

from codellama import Llama, infilling_prompt_tokens
from tools.demo_corpus import Source, functions, read_sources
from tools.demo_examples import ask

WINDOW = 511
MIDDLE = 64
FENCE = re.compile(r"```python\n(.*?)\n?```", re.DOTALL)


def evaluate(
    ckpt_dir: str | None = None, files: int | None = None, infills: int = 100, chats: int = 30, seed: int = 0
) -> None:
    """Measure and print; files limits the held-out files whose bits are counted."""
    llama = Llama.build(ckpt_dir, max_seq_len=512, max_batch_size=8, dtype="float32", device="cpu", progress=False)
    held_out = [source for source in read_sources() if source.held_out]
    numbers: dict[str, float | int | str] = {
        "python": platform.python_version(),
        "held_out_files": len(held_out[:files]),
        "bits_per_byte": round(bits_per_byte(llama, held_out[:files]), 4),
        **infill(llama, held_out, infills, random.Random(seed), suffix_first=False),
        **infill(llama, held_out, infills, random.Random(seed), suffix_first=True),
        **chat(llama, held_out, chats, random.Random(seed)),
    }
    for name, value in numbers.items():
        print(f"{name:<24}{value}")
    print(json.dumps(numbers))


def bits_per_byte(llama: Llama, sources: list[Source]) -> float:
    """Bits per UTF-8 byte, in windows of 511 tokens that each begin with bos and know nothing of the one before."""
    rows: list[list[int]] = []
    size = 0
    for source in sources:
        size += len(source.text.encode())
        ids = llama.tokenizer.encode(source.text, bos=False, eos=False)
        rows += [[llama.tokenizer.bos_id, *ids[at : at + WINDOW]] for at in range(0, len(ids), WINDOW)]
    return -sum(sum(row) for row in llama.score(rows)) / math.log(2) / size


def infill(llama: Llama, sources: list[Source], count: int, draw: random.Random, suffix_first: bool) -> dict[str, int]:
    """Leave out one line behind its indentation, with ten lines before and five after it, and let the model fill it."""
    prompts, answers = [], []
    while len(answers) < count:
        lines = draw.choice(sources).text.splitlines(keepends=True)
        index = draw.randrange(len(lines))
        line = lines[index].strip()
        if not line:
            continue
        indentation = lines[index][: len(lines[index]) - len(lines[index].lstrip())]
        prefix = "".join(lines[max(0, index - 10) : index]) + indentation
        suffix = lines[index][len(indentation) + len(line) :] + "".join(lines[index + 1 : index + 6])
        if len(prefix) + len(suffix) < 900:
            prompts.append(infilling_prompt_tokens(llama.tokenizer, prefix, suffix, suffix_first))
            answers.append(line)
    # Only EOT may end them here, so one that is shorter than the limit was ended by it.
    filled, _ = llama.generate(prompts, MIDDLE, temperature=0, stop_token=llama.tokenizer.eot_id)
    ended = sum(0 < len(ids) < MIDDLE for ids in filled)
    exact = sum(llama.tokenizer.decode_infilling(ids) == answer for ids, answer in zip(filled, answers, strict=True))
    mode = "suffix_first" if suffix_first else "infills"
    return {mode: count, f"{mode}_ended": ended, f"{mode}_exact": exact}


def chat(llama: Llama, sources: list[Source], count: int, draw: random.Random) -> dict[str, int]:
    """Ask for held-out functions in the words of their docstrings; count answers with a fenced block that parses."""
    asked = draw.sample([function for source in sources for function in functions(source)], count)
    dialogs = [[{"role": "user", "content": ask(function, draw)}] for function in asked]
    results = llama.chat_completion(dialogs, temperature=0, max_gen_len=256)
    return {"chats": count, "chats_parsed": sum(parses(result["generation"]["content"]) for result in results)}


def parses(answer: str) -> bool:
    """Say whether an answer holds a fenced block that is not empty and that Python parses."""
    match = FENCE.search(answer)
    if match is None or not match[1].strip():
        return False
    try:
        ast.parse(match[1])
    except SyntaxError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(fire.Fire(evaluate))
