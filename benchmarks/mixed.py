"""A short and a long prompt together against the long one alone: mixed lengths must not cost a pass per token.

python -m benchmarks.mixed
"""

from collections.abc import Sequence

import fire

from benchmarks.decode import new_engine
from benchmarks.machine import best_seconds, random_model, report
from codellama.device import choose_device, choose_dtype


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
    row = {"alone_ms": 1000 * alone, "together_ms": 1000 * together, "ratio": together / alone}
    report("mixed", {"shape": shape, "prompts": list(prompts), "new_tokens": new_tokens}, [row])


if __name__ == "__main__":
    fire.Fire(mixed)
