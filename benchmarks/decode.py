"""Decode speed by rows and by context, and the share of the machine's memory bandwidth that it reaches.

python -m benchmarks.decode
python -m benchmarks.decode --shape 953m --dtype bfloat16 --batches 1,8
python -m benchmarks.decode --shape 207m --batches 1 --contexts 128,1024,4096
"""

import statistics
import time
from collections.abc import Sequence

import fire
import torch

from benchmarks.machine import (
    bandwidth,
    cache_bytes,
    peak_bytes,
    random_model,
    report,
    reset_peak,
    synchronize,
    weight_bytes,
)
from codellama.cache import KVCache
from codellama.config import RuntimeArgs, SamplingParams
from codellama.device import choose_device, choose_dtype
from codellama.generation.engine import Engine
from codellama.generation.request import Request
from codellama.generation.runner import Runner
from codellama.generation.scheduler import Scheduler
from codellama.model import Transformer
from codellama.parallel import Parallel


def decode(
    shape: str = "small",
    dtype: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    batches: int | Sequence[int] = (1, 4),
    contexts: int | Sequence[int] = 128,
    new_tokens: int = 32,
    rounds: int = 1,
) -> None:
    """Time greedy decoding through the engine behind prompts of so many tokens, prefill left out; cases alternate."""
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    speed = bandwidth(place)
    reset_peak(place)
    model = random_model(shape, kind, place, quantize)
    cases = [
        (batch, context)
        for context in ([contexts] if isinstance(contexts, int) else contexts)
        for batch in ([batches] if isinstance(batches, int) else batches)
    ]
    steps: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    tokens: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            per_step, per_token = time_steps(model, *case, new_tokens)
            steps[case].append(per_step)
            tokens[case].append(per_token)
    rows = []
    for batch, context in cases:
        seconds = min(steps[batch, context])
        read = weight_bytes(model) + batch * cache_bytes(model.args, context + new_tokens // 2, model.norm.weight.dtype)
        rows.append(
            {
                "batch": batch,
                "context": context,
                "tokens_per_s": 1 / min(tokens[batch, context]),
                "median": 1 / statistics.median(tokens[batch, context]),
                "ms_per_step": 1000 * seconds,
                "GB_per_s": read / seconds / 1e9,
                "of_bandwidth": read / seconds / speed,
            }
        )
    peak = peak_bytes(place)
    arguments = {
        "shape": shape,
        "dtype": str(kind).removeprefix("torch."),
        "device": str(place),
        "quantize": quantize,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "bandwidth_GB_per_s": speed / 1e9,
        "peak_GB": None if peak is None else peak / 1e9,
    }
    report("decode", arguments, rows)


def time_steps(model: Transformer, batch: int, context: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of a step, and of a token, when so many rows decode together behind prompts that are in the cache."""
    place = model.norm.weight.device
    engine, requests = new_engine(model, [context] * batch, new_tokens, shared=True)
    for request in requests:
        engine.submit(request)
    while not all(request.output for request in requests):
        engine.step()  # prefill
    engine.step()  # the first decode step warms up
    before = sum(len(request.output) for request in requests)
    synchronize(place)
    begin = time.perf_counter()
    steps = 0
    while any(request.finish_reason is None for request in requests):
        engine.step()
        steps += 1
    synchronize(place)
    seconds = time.perf_counter() - begin
    return seconds / steps, seconds / (sum(len(request.output) for request in requests) - before)


def new_engine(
    model: Transformer, prompts: Sequence[int], new_tokens: int, shared: bool = False
) -> tuple[Engine, list[Request]]:
    """Make an engine with one row per prompt, and greedy requests with random prompts of these lengths.

    Args:
        shared: prompts differ in their last id alone, so that an engine reads the rest of them once.
    """
    length = max(prompts) + new_tokens + 1
    params = SamplingParams(max_gen_len=new_tokens)
    vocab_size = model.args.vocab_size
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(vocab_size, (max(prompts),), generator=generator).tolist()
    ids = []
    for row, size in enumerate(prompts):
        fresh = torch.randint(vocab_size, (size,), generator=generator).tolist()
        ids.append([*start[: size - 1], (start[0] + row) % vocab_size] if shared else fresh)
    engine = make_engine(model, len(prompts), length)
    return engine, [Request(prompt, params, 0, vocab_size, length) for prompt in ids]


def make_engine(model: Transformer, rows: int, max_seq_len: int) -> Engine:
    """Make an engine on this model with a new cache."""
    runtime = RuntimeArgs(max_seq_len=max_seq_len, max_batch_size=rows)
    weight = model.norm.weight
    cache = KVCache.allocate(
        model.args, rows=rows, max_seq_len=max_seq_len, dtype=weight.dtype, device=weight.device
    )  # as codellama/assembly.py does
    return Engine(Runner(model, cache, weight.device), Scheduler(runtime), Parallel())


if __name__ == "__main__":
    fire.Fire(decode)
