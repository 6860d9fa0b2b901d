"""A matrix in eight-bit codes, one scale for each output channel.

Shapes: N output features, K input features, R rows of activations.
"""

from types import ModuleType

import torch
from torch import Tensor

from codellama.linear.matrix import KERNEL_GROUP, Matrix, find_gpu, find_kernels
from codellama.native.kernels import Kernels


class Int8(Matrix):
    """w = code · scale: codes int8 `[N, K]` from -127 to 127, scales float32 `[N]`."""

    codes: Tensor
    scales: Tensor
    packed: Tensor

    def __init__(self, out_features: int, in_features: int, compute: torch.dtype, device: torch.device) -> None:
        """Make an empty matrix."""
        super().__init__(out_features, in_features, compute)
        self.register_buffer("codes", torch.empty(out_features, in_features, dtype=torch.int8, device=device), False)
        self.register_buffer("scales", torch.empty(out_features, dtype=torch.float32, device=device), False)
        self.register_buffer("packed", None, False)
        self._few = 0
        self._gpu: ModuleType | None = None
        self._native: Kernels | None = None

    def put_(self, start: int, rows: Tensor, largest: Tensor | None = None) -> None:
        """Store rows, rounded to the nearest code."""
        codes, scales = quantize_int8(rows.to(self.scales.device), largest)
        self.put_codes_(start, codes, scales)

    def put_codes_(self, start: int, codes: Tensor, scales: Tensor) -> None:
        """Store rows that are codes already."""
        self.codes[start : start + len(codes)] = codes
        self.scales[start : start + len(codes)] = scales

    def finish_(self) -> None:
        """Pack for our own kernels, where they are the fastest here; the codes go."""
        self._gpu = find_gpu(self.codes.device)
        if self.in_features % KERNEL_GROUP == 0:
            self._few, self._native = find_kernels("int8", self.codes.device)
        if self._native is not None:
            self.packed = self._native.pack_int8(self.codes)
            self.codes = self.packed.new_empty(0)

    def multiply(self, x: Tensor) -> Tensor:
        """Map `[R, K]` to `[R, N]`."""
        if self._gpu is not None and len(x) <= self._gpu.ROWS:
            y: Tensor = self._gpu.int8_product(x.contiguous(), self.codes, self.scales)
            return y
        if self._native is None or len(x) > self._few:
            return self.multiply_unpacked(x)
        return self._native.int8_linear(x.contiguous(), self.packed, self.scales)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Unpack the rows from start to stop."""
        if self._native is None:
            return unpack_int8(self.codes[start:stop], self.scales[start:stop], self.compute)
        stop = self.out_features if stop is None else stop
        out = torch.empty(stop - start, self.in_features, dtype=self.compute, device="cpu")
        return self._native.unpack_int8(self.packed, self.scales, out, start)


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
