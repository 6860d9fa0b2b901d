"""A matrix in four-bit codes, a scale and a zero for each group of input features.

Shapes: N output features, K input features, R rows of activations, g input features in a group.
"""

import torch
from torch import Tensor

from codellama.linear.matrix import Matrix, find_kernels
from codellama.native.kernels import Kernels


class Int4(Matrix):
    """w = (code - 8) · scale + zero, the convention of torch's own int4 products.

    Attributes:
        codes: two a byte, `[N, K/2]`, the even input in the low half.
        scales: bfloat16 `[N, K/g]`, and zeros alike.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    packed: Tensor

    def __init__(
        self, out_features: int, in_features: int, compute: torch.dtype, device: torch.device, group: int
    ) -> None:
        """Make an empty matrix."""
        assert in_features % group == 0, "groups divide the input; Quantization.check has said so"
        super().__init__(out_features, in_features, compute)
        self.group = group
        count = in_features // group
        codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes, False)
        self.register_buffer("packed", None, False)
        self._few = 0
        self._native: Kernels | None = None
        for name in ("scales", "zeros"):
            self.register_buffer(name, torch.empty(out_features, count, dtype=torch.bfloat16, device=device), False)

    def put_(self, start: int, rows: Tensor, largest: Tensor | None = None) -> None:
        """Store rows, rounded to the nearest codes of their groups, which no other rank has a part in."""
        self.put_codes_(start, *quantize_int4(rows.to(self.codes.device), self.group))

    def put_codes_(self, start: int, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Store rows that are codes already."""
        stop = start + len(codes)
        self.codes[start:stop], self.scales[start:stop], self.zeros[start:stop] = codes, scales, zeros

    def finish_(self) -> None:
        """Pack for our own kernels, where they are the fastest here; the codes go."""
        self._few, self._native = find_kernels("int4", self.codes.device)
        if self._native is not None:
            self.packed = self._native.pack_int4(self.codes, self.scales, self.zeros)
            self.codes, self.scales, self.zeros = (self.packed.new_empty(0) for _ in range(3))

    def multiply(self, x: Tensor) -> Tensor:
        """Map `[R, K]` to `[R, N]`."""
        if self._native is None or len(x) > self._few:
            return self.multiply_unpacked(x)
        return self._native.int4_linear(x.contiguous(), self.packed, self.out_features, self.group)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Unpack the rows from start to stop."""
        if self._native is None:
            return unpack_int4(self.codes[start:stop], self.scales[start:stop], self.zeros[start:stop], self.compute)
        stop = self.out_features if stop is None else stop
        out = torch.empty(stop - start, self.in_features, dtype=self.compute, device="cpu")
        return self._native.unpack_int4(self.packed, self.out_features, self.group, out, start)


def quantize_int4(rows: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows `[n, K]` to codes `[n, K/2]`, two a byte, and bfloat16 scales and zeros `[n, K/g]`.

    Sixteen even steps from the smallest to the largest number of a group; scale and zero are rounded first, so that the
    codes are the nearest ones to what they stand for.
    """
    wide = rows.float().view(len(rows), -1, group)
    low, high = wide.amin(dim=-1), wide.amax(dim=-1)
    scales = ((high - low) / 15).bfloat16()
    zeros = (low + 8 * scales.float()).bfloat16()
    steps = torch.where(scales > 0, scales, 1).float()[..., None]  # a group of equal numbers
    codes = ((wide - zeros.float()[..., None]) / steps).round_().add_(8).clamp_(0, 15).to(torch.uint8)
    codes = codes.view(len(rows), -1)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales, zeros


def unpack_int4(codes: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn codes back into numbers: computed in float32, rounded once."""
    n, count = scales.shape
    values = torch.stack((codes & 15, codes >> 4), dim=-1).view(n, count, -1)  # [n, K/g, g]
    wide = (values.float() - 8) * scales.float()[..., None] + zeros.float()[..., None]
    return wide.view(n, -1).to(dtype)
