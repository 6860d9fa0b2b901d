"""Prefill speed: tokens per second and time to first token by prompt length, as a share of the machine's FLOP/s.

python -m benchmarks.prefill
python -m benchmarks.prefill --shape 953m --dtypes bfloat16,float32 --prompts 512
"""

from collections.abc import Sequence

import fire

from benchmarks.machine import best_seconds, flops, random_model, report, weight_bytes
from codellama.cache import KVCache
from codellama.device import choose_device, choose_dtype
from codellama.generation.runner import Runner
from codellama.generation.scheduler import Batch


def prefill(
    shape: str = "small",
    dtypes: str | Sequence[str] | None = None,
    device: str | None = None,
    prompts: int | Sequence[int] = (64, 512),
    repeats: int = 3,
) -> None:
    """Time one prompt's pass through the model with a cache, logits of the last position included."""
    place = choose_device(device)
    rows = []
    for dtype in [dtypes] if isinstance(dtypes, str | None) else dtypes:
        kind = choose_dtype(dtype, place)
        model = random_model(shape, kind, place)
        speed = flops(kind, place)
        for prompt in [prompts] if isinstance(prompts, int) else prompts:
            cache = KVCache.allocate(model.args, rows=1, max_seq_len=prompt, dtype=kind, device=place)
            runner = Runner(model, cache, place)
            batch = Batch(0, [[7] * prompt], [0], [1])
            seconds = best_seconds(lambda runner=runner, batch=batch: list(runner.run(batch)), place, repeats)
            work = 2 * prompt * weight_bytes(model) / kind.itemsize
            rows.append(
                {
                    "dtype": str(kind).removeprefix("torch."),
                    "prompt": prompt,
                    "tokens_per_s": prompt / seconds,
                    "first_token_ms": 1000 * seconds,
                    "GFLOP_per_s": work / seconds / 1e9,
                    "of_matmul": work / seconds / speed,
                }
            )
    report("prefill", {"shape": shape, "device": str(place)}, rows)


if __name__ == "__main__":
    fire.Fire(prefill)
