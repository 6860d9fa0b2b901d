"""Long prompts: what a prefill costs beside its matrix products and its attention, and how much memory it takes.

python -m benchmarks.context
python -m benchmarks.context --lengths 1000,10000,50000,100000 --rounds 1 --dim 64 --heads 1
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import fire
import torch
from torch.nn import functional as F

from benchmarks.machine import report
from benchmarks.memory import resident
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


def context(
    lengths: int | Sequence[int] = (1000, 4000),
    dim: int = 256,
    heads: int = 2,
    kv_heads: int = 1,
    dtype: str | None = None,
    cache_dtype: str | None = None,
    rounds: int = 3,
) -> None:
    """Prefill prompts through the engine, and the parts by themselves, in turn; a ratio of 1 wastes nothing."""
    kind = choose_dtype(dtype, CPU)
    args = ModelArgs(dim=dim, n_layers=1, n_heads=heads, n_kv_heads=kv_heads, vocab_size=2048, rope_theta=1e6)
    model = Transformer(args).to(kind).to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    rows = []
    for length in [lengths] if isinstance(lengths, int) else lengths:
        runtime = RuntimeArgs(max_seq_len=length + 1, max_batch_size=1, cache_dtype=cache_dtype)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        prefill(model, runtime, length)
        peak = resident("VmHWM") - before
        whole, linears, attention = measure(model, runtime, length, rounds)
        budget = plan_budget(args, runtime, 1, kind.itemsize)
        rows.append(
            {
                "prompt": length,
                "tokens_per_s": length / whole,
                "s": whole,
                "linears_s": linears,
                "attention_s": attention,
                "ratio": whole / (linears + attention),
                "planned_MB": (budget.cache + budget.workspace) / 1e6,
                "peak_MB": peak / 1e6,
            }
        )
    report(
        "context", {"dim": dim, "heads": heads, "kv_heads": kv_heads, "dtype": str(kind), "cache": cache_dtype}, rows
    )


def measure(model: Transformer, runtime: RuntimeArgs, length: int, rounds: int) -> tuple[float, float, float]:
    """Shortest seconds of a prefill, of its products alone, and of its attention alone, in turn."""
    ways = (
        lambda: prefill(model, runtime, length),
        lambda: products(model, length, runtime.chunk_size),
        lambda: attend(model, length),
    )
    found = [[seconds(way) for way in ways] for _ in range(rounds)]
    whole, linears, attention = (min(column) for column in zip(*found, strict=True))
    return whole, linears, attention


def seconds(way: Callable[[], None]) -> float:
    """How long one call takes; the prefill before has warmed up what there is."""
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin


def prefill(model: Transformer, runtime: RuntimeArgs, length: int) -> None:
    """Read a prompt and generate one token, through the engine; a new cache is a part of it."""
    held = model.norm.weight.dtype if runtime.cache_dtype is None else torch.int8
    cache = KVCache.allocate(model.args, rows=1, max_seq_len=runtime.max_seq_len, dtype=held, device=CPU)
    engine = Engine(Runner(model, cache, CPU), Scheduler(runtime), Parallel())
    (done,) = engine.run(
        [Request([5] * length, SamplingParams(max_gen_len=1), 0, model.args.vocab_size, runtime.max_seq_len)]
    )
    assert done.error is None


@torch.inference_mode()
def products(model: Transformer, length: int, chunk: int) -> None:
    """Only the matrix products of the layers, chunk by chunk."""
    dtype = model.norm.weight.dtype
    for start in range(0, length, chunk):
        size = min(chunk, length - start)
        x = torch.randn(1, size, model.args.dim).to(dtype)
        hidden = torch.randn(1, size, model.args.hidden_dim).to(dtype)
        for layer in model.layers:
            for product in ("wq", "wk", "wv", "wo"):
                getattr(layer.attention, product)(x)
            for product in ("w1", "w3"):
                getattr(layer.feed_forward, product)(x)
            layer.feed_forward.w2(hidden)


@torch.inference_mode()
def attend(model: Transformer, length: int) -> None:
    """Only the attention of the layers, over the whole prompt in one causal call, without a cache."""
    args, dtype = model.args, model.norm.weight.dtype
    query = torch.randn(1, args.n_heads, length, args.head_dim).to(dtype)
    key, value = (torch.randn(1, args.kv_heads, length, args.head_dim).to(dtype) for _ in range(2))
    for _ in range(args.n_layers):
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=args.n_heads > args.kv_heads)


if __name__ == "__main__":
    fire.Fire(context)
