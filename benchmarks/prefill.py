"""Prefill speed: tokens per second and time to first token by prompt length, as a share of the machine's FLOP/s.

python -m benchmarks.prefill
python -m benchmarks.prefill --shape 953m --dtypes bfloat16,float32 --prompts 512
python -m benchmarks.prefill --shape tiny --prompts 8192,100000 --repeats 1
"""

import time
from collections.abc import Sequence

import fire
import torch

from benchmarks.decode import make_engine
from benchmarks.machine import flops, peak_bytes, prefill_work, random_model, report, reset_peak, synchronize
from codellama.config import SamplingParams
from codellama.device import choose_device, choose_dtype
from codellama.generation.engine import Engine
from codellama.generation.request import Request


def prefill(
    shape: str = "small",
    dtypes: str | Sequence[str] | None = None,
    device: str | None = None,
    quantize: str | None = None,
    prompts: int | Sequence[int] = (64, 512),
    repeats: int = 3,
) -> None:
    """Time a prompt from its submission to its first token, chunk by chunk through the engine; best of the repeats."""
    place = choose_device(device)
    lengths = [prompts] if isinstance(prompts, int) else list(prompts)
    rows = []
    for dtype in [dtypes] if isinstance(dtypes, str | None) else dtypes:
        kind = choose_dtype(dtype, place)
        model = random_model(shape, kind, place, quantize)
        speed = flops(model.norm.weight.dtype, place)  # what activations are, and so products of many rows
        reset_peak(place)
        engine = make_engine(model, 1, max(lengths) + 2)
        first_token(engine, min(64, min(lengths)), model.args.vocab_size, place, -1)  # warm
        for length in lengths:
            times = [first_token(engine, length, model.args.vocab_size, place, seed) for seed in range(repeats)]
            seconds, peak = min(times), peak_bytes(place)
            work = prefill_work(model.args, length)
            rows.append(
                {
                    "dtype": str(kind).removeprefix("torch."),
                    "prompt": length,
                    "tokens_per_s": length / seconds,
                    "first_token_ms": 1000 * seconds,
                    "GFLOP_per_s": work / seconds / 1e9,
                    "of_matmul": work / seconds / speed,
                    "peak_GB": None if peak is None else peak / 1e9,
                }
            )
        del model, engine
    report("prefill", {"shape": shape, "device": str(place), "quantize": quantize, "repeats": repeats}, rows)


def first_token(engine: Engine, length: int, vocab_size: int, device: torch.device, seed: int) -> float:
    """Seconds of one request for one token, behind a random prompt that no earlier one begins like."""
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
    request = Request(ids, SamplingParams(max_gen_len=1), 0, vocab_size, length + 2)
    synchronize(device)
    begin = time.perf_counter()
    engine.run([request])
    synchronize(device)
    return time.perf_counter() - begin


if __name__ == "__main__":
    fire.Fire(prefill)
