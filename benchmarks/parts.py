"""What a long prompt costs beside its products and its attention: the engine's time by the sum of the two alone.

python -m benchmarks.parts
python -m benchmarks.parts --prompts 8192,32768,100000 --rounds 1
python -m benchmarks.parts --shape 207m --prompts 2048,8192

Products: each matrix of a layer by a chunk of tokens, dense, in the same dtype, times layers and chunks. Attention: one
causal call over the whole prompt with keys and values at hand, times layers. Nothing else is in them: no norms, no
rotation, no cache, no masks between chunks.
"""

import time
from collections.abc import Callable, Sequence

import fire
import torch
from torch.nn import functional as F

from benchmarks.decode import make_engine
from benchmarks.machine import best_seconds, peak_bytes, random_model, report, reset_peak, synchronize
from benchmarks.prefill import first_token
from codellama.checkpoint import tensor_shapes
from codellama.config import ModelArgs, RuntimeArgs
from codellama.device import choose_device, choose_dtype


def parts(
    shape: str = "tiny",
    dtype: str | None = None,
    device: str | None = None,
    prompts: int | Sequence[int] = (512, 4096),
    rounds: int = 3,
) -> None:
    """Measure the three in turn, for each length; best of the rounds."""
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    lengths = [prompts] if isinstance(prompts, int) else list(prompts)
    chunk = RuntimeArgs().chunk_size
    reset_peak(place)
    model = random_model(shape, kind, place)
    compute = model.norm.weight.dtype
    engine = make_engine(model, 1, max(lengths) + 2)
    first_token(engine, min(64, min(lengths)), model.args.vocab_size, place, -1)  # warm
    rows = []
    for length in lengths:
        whole, linear, attention = [], [], []
        for seed in range(rounds):
            whole.append(first_token(engine, length, model.args.vocab_size, place, seed))
            linear.append(linear_seconds(model.args, min(chunk, length), compute, place) * max(1, length / chunk))
            attention.append(attention_seconds(model.args, length, compute, place))
        cost = min(linear) + min(attention)
        peak = peak_bytes(place)
        rows.append(
            {
                "prompt": length,
                "engine_s": min(whole),
                "products_s": min(linear),
                "attention_s": min(attention),
                "by_sum": min(whole) / cost,
                "peak_GB": None if peak is None else peak / 1e9,
            }
        )
    arguments = {"shape": shape, "dtype": str(kind).removeprefix("torch."), "device": str(place), "rounds": rounds}
    report("parts", arguments, rows, {"worst, engine by products and attention": max(row["by_sum"] for row in rows)})


def linear_seconds(args: ModelArgs, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """All layers' matrices by so many tokens; the output matrix, of which a prompt needs one row, is left out."""
    layer = [shape for name, shape in tensor_shapes(args).items() if name.startswith("layers.0.") and len(shape) == 2]
    calls = [
        (torch.randn(rows, shape[1], device=device).to(dtype), torch.randn(shape, device=device).to(dtype))
        for shape in layer
    ]
    return args.n_layers * sum(best_seconds(lambda x=x, w=w: F.linear(x, w), device, 3) for x, w in calls)


def attention_seconds(args: ModelArgs, length: int, dtype: torch.dtype, device: torch.device) -> float:
    """All layers' causal attention over the whole prompt."""
    query = torch.randn(1, args.n_heads, length, args.head_dim, device=device).to(dtype)
    key, value = (torch.randn(1, args.kv_heads, length, args.head_dim, device=device).to(dtype) for _ in range(2))
    grouped = args.n_heads > args.kv_heads

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    if length <= 4096:
        return args.n_layers * best_seconds(attend, device, 3)
    return args.n_layers * once(attend, device)


def once(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a single call, for what takes so long that a warm-up changes nothing."""
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


if __name__ == "__main__":
    fire.Fire(parts)
