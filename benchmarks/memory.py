"""Memory of a prefill: the peak that is measured against the one that the budget plans, above weights and cache.

python -m benchmarks.memory
python -m benchmarks.memory --prompts 2048,8192,16384
"""

import multiprocessing
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import torch

from benchmarks.machine import report
from codellama.cache import KVCache
from codellama.config import ModelArgs, RuntimeArgs, SamplingParams
from codellama.device import choose_dtype
from codellama.generation.engine import Engine
from codellama.generation.request import Request
from codellama.generation.runner import Runner
from codellama.generation.scheduler import Scheduler
from codellama.memory import plan_budget
from codellama.model import Transformer
from codellama.parallel import Parallel

CPU = torch.device("cpu")


def memory(
    prompts: int | Sequence[int] = (512, 2048),
    kv_heads: int | Sequence[int] = (16, 1),
    dim: int = 512,
    n_layers: int = 2,
    vocab_size: int = 32016,
    dtype: str | None = None,
) -> None:
    """Measure on the CPU, in a process for each case, with and without the scores of the prompt."""
    kind = choose_dtype(dtype, CPU)
    rows = []
    for heads in [kv_heads] if isinstance(kv_heads, int) else kv_heads:
        for prompt in [prompts] if isinstance(prompts, int) else prompts:
            for scored in (False, True):
                args = ModelArgs(
                    dim=dim, n_layers=n_layers, n_heads=16, n_kv_heads=heads, vocab_size=vocab_size, rope_theta=1e6
                )
                rows.append({"kv_heads": heads, "prompt": prompt, "scored": scored, **case(args, prompt, scored, kind)})
    arguments = {"dim": dim, "n_layers": n_layers, "vocab_size": vocab_size, "dtype": str(kind)}
    report("memory", arguments, rows)


def case(args: ModelArgs, prompt: int, scored: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Run one case in a fresh process, whose allocator gives large blocks back as soon as they are free.

    By default glibc keeps freed blocks of up to 32 MB in its heap, where small ones settle between them: then a process
    can grow by twice what it needs, which is the heap's doing and not the step's.
    """
    found: dict[str, Any]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # for the new process: glibc reads it when a process starts
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (args, prompt, scored, dtype))
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return found


def measure(args: ModelArgs, prompt: int, scored: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Prefill one prompt and compare the growth of this process with the plan, in MB."""
    runtime = RuntimeArgs(max_seq_len=prompt + 4, max_batch_size=1)
    model = Transformer(args).to(dtype).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    cache = KVCache.allocate(args, rows=1, max_seq_len=runtime.max_seq_len, dtype=dtype, device=CPU)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(1)  # so that its pages count from the beginning
    engine = Engine(Runner(model.requires_grad_(False), cache, CPU), Scheduler(runtime), Parallel())

    def run(length: int) -> None:
        params = SamplingParams(max_gen_len=2, echo=scored, logprobs=scored)
        (done,) = engine.run([Request([5] * length, params, 0, args.vocab_size, runtime.max_seq_len)])
        assert done.error is None

    run(8)  # libraries allocate their own at the first call
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run(prompt)
    measured = (resident("VmHWM") - before) / 1e6
    planned = plan_budget(args, runtime, 1, dtype.itemsize).workspace / 1e6
    return {"planned_MB": planned, "measured_MB": measured, "difference_MB": measured - planned}


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, key
    return int(found[1]) * 1024


if __name__ == "__main__":
    fire.Fire(memory)
