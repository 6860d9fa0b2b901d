"""Decode attention over the two layouts of the cache: heads before positions (ours), and positions before heads.

python -m benchmarks.layout
"""

import fire
import torch
from torch.nn import functional as F

from benchmarks.machine import best_seconds, report


def layout(rows: int = 8, heads: int = 32, kv_heads: int = 4, head_dim: int = 64, device: str = "cpu") -> None:
    """Time one query per row against caches of two lengths, in two dtypes, alternating the layouts."""
    place = torch.device(device)
    table = []
    for dtype in (torch.float32, torch.bfloat16):
        for length in (512, 4096):
            ours = [torch.randn(rows, kv_heads, length, head_dim, device=place).to(dtype) for _ in range(2)]
            other = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in ours]
            query = torch.randn(rows, kv_heads, heads // kv_heads, head_dim, device=place).to(dtype)
            mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=place)

            def attend(cache: list[torch.Tensor], query: torch.Tensor = query, mask: torch.Tensor = mask) -> None:
                F.scaled_dot_product_attention(query, *cache, attn_mask=mask)

            seconds = {"ours": float("inf"), "other": float("inf")}
            for _ in range(5):
                seconds["ours"] = min(seconds["ours"], best_seconds(lambda ours=ours: attend(ours), place, 5))
                seconds["other"] = min(seconds["other"], best_seconds(lambda other=other: attend(other), place, 5))
            table.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "length": length,
                    "heads_first_ms": 1000 * seconds["ours"],
                    "pos_first_ms": 1000 * seconds["other"],
                    "ratio": seconds["other"] / seconds["ours"],
                }
            )
    report("layout", {"rows": rows, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}, table)


if __name__ == "__main__":
    fire.Fire(layout)
