"""Decode speed: tokens per second by batch size, and the share of the machine's memory bandwidth that it reaches.

python -m benchmarks.decode
python -m benchmarks.decode --shape 953m --dtype bfloat16 --batches 1,8
"""

import time
from collections.abc import Sequence

import fire
import torch

from benchmarks.machine import bandwidth, random_model, report, synchronize, weight_bytes
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
    batches: int | Sequence[int] = (1, 4),
    prompt: int = 128,
    new_tokens: int = 32,
) -> None:
    """Time greedy decoding through the engine, prefill left out."""
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    model = random_model(shape, kind, place)
    speed = bandwidth(place)
    rows = []
    for batch in [batches] if isinstance(batches, int) else batches:
        engine, requests = new_engine(model, [prompt] * batch, new_tokens)
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
        tokens = sum(len(request.output) for request in requests) - before
        rows.append(
            {
                "batch": batch,
                "tokens_per_s": tokens / seconds,
                "ms_per_step": 1000 * seconds / steps,
                "GB_per_s": weight_bytes(model) * steps / seconds / 1e9,
                "of_bandwidth": weight_bytes(model) * steps / seconds / speed,
            }
        )
    arguments = {
        "shape": shape,
        "dtype": str(kind),
        "device": str(place),
        "prompt": prompt,
        "new_tokens": new_tokens,
        "bandwidth_GB_per_s": speed / 1e9,
    }
    report("decode", arguments, rows)


def new_engine(model: Transformer, prompts: Sequence[int], new_tokens: int) -> tuple[Engine, list[Request]]:
    """Make an engine with one row per prompt, and greedy requests with random prompts of these lengths."""
    args, weight = model.args, model.norm.weight
    runtime = RuntimeArgs(max_seq_len=max(prompts) + new_tokens + 1, max_batch_size=len(prompts))
    cache = KVCache.allocate(
        args, rows=len(prompts), max_seq_len=runtime.max_seq_len, dtype=weight.dtype, device=weight.device
    )
    engine = Engine(Runner(model, cache, weight.device), Scheduler(runtime), Parallel())
    params = SamplingParams(max_gen_len=new_tokens)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(args.vocab_size, (length,), generator=generator).tolist() for length in prompts]
    return engine, [Request(prompt, params, 0, args.vocab_size, runtime.max_seq_len) for prompt in ids]


if __name__ == "__main__":
    fire.Fire(decode)
