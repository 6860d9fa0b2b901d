"""A matrix in eight-bit codes, one scale for each output channel.

Shapes: N output features, K input features, R rows of activations.
"""

import torch
from torch import Tensor

from codellama.linear.matrix import Matrix


class Int8(Matrix):
    """w = code · scale: codes int8 `[N, K]` from -127 to 127, scales float32 `[N]`."""

    codes: Tensor
    scales: Tensor

    def __init__(self, out_features: int, in_features: int, compute: torch.dtype, device: torch.device) -> None:
        """Make an empty matrix."""
        super().__init__(out_features, in_features, compute)
        self.register_buffer("codes", torch.empty(out_features, in_features, dtype=torch.int8, device=device), False)
        self.register_buffer("scales", torch.empty(out_features, device=device), False)

    def put_(self, start: int, rows: Tensor, largest: Tensor | None = None) -> None:
        """Store rows, rounded to the nearest code."""
        codes, scales = quantize_int8(rows.to(self.scales.device), largest)
        self.put_codes_(start, codes, scales)

    def put_codes_(self, start: int, codes: Tensor, scales: Tensor) -> None:
        """Store rows that are codes already."""
        self.codes[start : start + len(codes)] = codes
        self.scales[start : start + len(codes)] = scales

    def multiply(self, x: Tensor) -> Tensor:
        """Map `[R, K]` to `[R, N]`."""
        return self.multiply_unpacked(x)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Unpack the rows from start to stop."""
        return unpack_int8(self.codes[start:stop], self.scales[start:stop], self.compute)


def quantize_int8(rows: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round rows `[n, K]` to codes `[n, K]` and scales `[n]`.

    Args:
        rows: the numbers.
        largest: magnitude that code 127 stands for, `[n]`; None is the largest of each row.
    """
    wide = rows.float()
    if largest is None:
        largest = wide.abs().amax(dim=1)
    scales = largest.float() / 127
    steps = torch.where(scales > 0, scales, 1)  # a row of zeros
    return (wide / steps[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def unpack_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn codes back into numbers: the product in float32, rounded once."""
    return (codes.float() * scales[:, None]).to(dtype)
