"""The process that `benchmarks.start` times: it notes when it gets where, and prints the times as JSON.

Imports stand where they are timed, so this file imports nothing heavy on top.
"""

import time

BEGIN = time.monotonic()  # before all other imports of this file

import json  # noqa: E402
import sys  # noqa: E402


def first_token(started: float, ckpt_dir: str | None, prompt: str) -> None:
    """Build a generator as a user's program does, and take the first piece of a stream."""
    marks = {"interpreter": BEGIN}
    import torch

    marks["import torch"] = time.monotonic()
    from codellama import Llama

    marks["import codellama"] = time.monotonic()
    llama = Llama.build(ckpt_dir)
    marks["build"] = time.monotonic()
    stream = llama.stream_completion(prompt, temperature=0.0, max_gen_len=8)
    text = next(iter(stream))
    marks["first token"] = time.monotonic()
    stream.close()
    assert text, "a stream gives pieces of text"
    times, before = {}, started
    for name, at in marks.items():
        times[name], before = at - before, at
    print(json.dumps({"times": times, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    first_token(float(sys.argv[1]), sys.argv[3] if len(sys.argv) > 3 else None, sys.argv[2])
