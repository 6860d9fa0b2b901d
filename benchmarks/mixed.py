"""What rows of different lengths cost each other.

prefill: a short and a long prompt together against the long one alone; mixed lengths must not cost a pass per token.
short prompts: 16 prompts of 14 tokens and their first new one, in one call against one after the other.
idle row: a step of two short rows around a long one that has ended, against the same around a short one.
far rows: a step of the first and the last of eight rows, those between having ended, against one of two neighbours.

python -m benchmarks.mixed
"""

import time
from collections.abc import Sequence

import fire
import torch

from benchmarks.decode import new_engine
from benchmarks.machine import best_seconds, random_model, report, synchronize
from codellama.device import choose_device, choose_dtype
from codellama.model import Transformer


def mixed(
    shape: str = "small",
    dtype: str | None = None,
    device: str | None = None,
    prompts: Sequence[int] = (8, 512),
    new_tokens: int = 16,
    repeats: int = 5,
) -> None:
    """Time both calls in turn, new engines each time, the cache's allocation left out of neither."""
    place = choose_device(device)
    model = random_model(shape, choose_dtype(dtype, place), place)

    def run(lengths: Sequence[int]) -> None:
        engine, requests = new_engine(model, lengths, new_tokens)
        engine.run(requests)

    alone, together = float("inf"), float("inf")
    for _ in range(repeats):
        alone = min(alone, best_seconds(lambda: run([max(prompts)]), place, 1))
        together = min(together, best_seconds(lambda: run(prompts), place, 1))
    short, long = (
        min(step_around(model, length, new_tokens, place) for _ in range(2)) for length in (8, 4 * max(prompts))
    )
    apart, at_once = (min(short_prompts(model, together, place) for _ in range(repeats)) for together in (False, True))
    dense, far = (min(step_of_two(model, count, new_tokens, place) for _ in range(2)) for count in (2, 8))
    rows = [
        {"case": "prefill", "alone_ms": 1000 * alone, "together_ms": 1000 * together, "ratio": together / alone},
        {"case": "short prompts", "alone_ms": 1000 * apart, "together_ms": 1000 * at_once, "ratio": at_once / apart},
        {"case": "far rows", "alone_ms": 1000 * dense, "together_ms": 1000 * far, "ratio": far / dense},
        {"case": "idle row", "alone_ms": 1000 * short, "together_ms": 1000 * long, "ratio": long / short},
    ]
    report("mixed", {"shape": shape, "prompts": list(prompts), "new_tokens": new_tokens}, rows)


def short_prompts(model: Transformer, together: bool, device: torch.device) -> float:
    """Seconds for the first token of each of 16 short prompts."""
    engine, requests = new_engine(model, [14] * 16, 1)
    synchronize(device)
    begin = time.perf_counter()
    for call in [requests] if together else [[request] for request in requests]:
        engine.run(call)
    synchronize(device)
    return time.perf_counter() - begin


def step_of_two(model: Transformer, count: int, new_tokens: int, device: torch.device) -> float:
    """Shortest time of a step in which the first and the last of so many rows decode, after the first steps."""
    engine, requests = new_engine(model, [8] * count, max(16, new_tokens))
    for request in requests:
        engine.submit(request)
    while not all(request.output for request in requests):
        engine.step()
    for request in requests[1:-1]:
        engine.cancel(request)
    for _ in range(4):  # until what runs along has cost as much as a move
        engine.step()
    return best_seconds(engine.step, device, 8)


def step_around(model: Transformer, length: int, new_tokens: int, device: torch.device) -> float:
    """Shortest time of a step in which the first and the last of three rows decode, the one between having ended."""
    engine, requests = new_engine(model, [8, length, 8], new_tokens)
    for request in requests:
        engine.submit(request)
    while not all(request.output for request in requests):
        engine.step()
    engine.cancel(requests[1])  # after one decode step for each of its chunks, of 512
    return best_seconds(engine.step, device, new_tokens // 2)


if __name__ == "__main__":
    fire.Fire(mixed)
