"""Attention with a cache: as it is planned, against masks, 16-bit numbers as they are, and a cache of 8 bits.

decode: one token for each row; "ragged" are rows of which all but one hold half as much.
chunk: many tokens of one row behind what it holds.

python -m benchmarks.attention
python -m benchmarks.attention --lengths 128,512,4096 --rows 1,4,8 --kv_heads 16,4 --chunks 64,512,2048 --rounds 20
"""

from collections.abc import Callable, Sequence
from typing import Any

import fire
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import best_seconds, report
from codellama.attention import AttentionPlan
from codellama.cache import KVCache
from codellama.config import ModelArgs


def attention(
    rows: int | Sequence[int] = (1, 8),
    lengths: int | Sequence[int] = (128, 512),
    chunks: int | Sequence[int] = (512,),
    heads: int = 16,
    kv_heads: int | Sequence[int] = (16, 4),
    head_dim: int = 128,
    rounds: int = 5,
    device: str = "cpu",
) -> None:
    """Time every case, its variants in turn, and show each as a ratio to ours."""
    place = torch.device(device)
    table = []
    for dtype in (torch.float32, torch.bfloat16):
        for shared in _listed(kv_heads):
            for length in _listed(lengths):
                cases = [("decode", [length] * count, 1) for count in _listed(rows)]
                cases += [("ragged", [length] + [length // 2] * (count - 1), 1) for count in _listed(rows) if count > 1]
                cases += [("chunk", [length + width], width) for width in _listed(chunks)]
                for kind, stops, width in cases:
                    case = Case(heads, shared, head_dim, stops, width, dtype, place)
                    name = {"dtype": str(dtype).removeprefix("torch."), "kv_heads": shared}
                    shape = {"case": kind, "rows": len(stops), "length": length, "new": width}
                    table.append({**name, **shape, **case.measure(rounds)})
    report("attention", {"heads": heads, "head_dim": head_dim, "device": str(place)}, table)


class Case:
    """One layer's attention, in several ways."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, stops: list[int], width: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Make a cache, and the tokens that end at these positions."""
        args = ModelArgs(
            dim=heads * head_dim, n_layers=1, n_heads=heads, n_kv_heads=kv_heads, vocab_size=8, rope_theta=1e6
        )
        count, longest = len(stops), max(stops)
        self.device = device
        self.positions = torch.tensor([list(range(stop - width, stop)) for stop in stops], device=device)
        self.query = torch.randn(count, width, heads, head_dim, device=device).to(dtype)
        self.key, self.value = (
            torch.randn(count, width, kv_heads, head_dim, device=device).to(dtype) for _ in range(2)
        )
        self.caches = [
            KVCache.allocate(args, rows=count, max_seq_len=longest, dtype=held, device=device)
            for held in (dtype, torch.int8)
        ]
        with torch.inference_mode():
            self.plans = [AttentionPlan(self.positions, args, cache) for cache in self.caches]
        hidden = torch.arange(longest, device=device) > self.positions[:, :, None]
        self.mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)[:, None]

    @torch.inference_mode()
    def measure(self, rounds: int) -> dict[str, Any]:
        """Milliseconds of ours, and the others as ratios to it: above 1 is slower."""
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: self.plans[0].attend(0, self.query, self.key, self.value),
            "mask": self.masked,
            "int8": lambda: self.plans[1].attend(0, self.query, self.key, self.value),
        }
        seconds = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for name, way in ways.items():
                seconds[name] = min(seconds[name], best_seconds(way, self.device, 1))
        ours = seconds.pop("ours")
        return {"ms": 1000 * ours, **{f"{name}_ratio": value / ours for name, value in seconds.items()}}

    def masked(self) -> Tensor:
        """Attend to all that the cache holds, with one mask that is made before; nothing is written."""
        B, T, H, D = self.query.shape
        keys, values = self.caches[0].keys[0], self.caches[0].values[0]
        if T == 1:
            return F.scaled_dot_product_attention(self.query.view(B, keys.shape[1], -1, D), keys, values, self.mask)
        keys, values = (held.transpose(0, 1).expand(-1, H // keys.shape[1], -1, -1) for held in (keys, values))
        grouped = self.query.view(T, keys.shape[0], -1, D).permute(1, 2, 0, 3)  # [K, G, T, D]
        return F.scaled_dot_product_attention(grouped, keys, values, self.mask)


def _listed(values: int | Sequence[int]) -> Sequence[int]:
    return [values] if isinstance(values, int) else values


if __name__ == "__main__":
    fire.Fire(attention)
