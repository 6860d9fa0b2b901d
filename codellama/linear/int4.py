"""A matrix in four-bit codes, a scale and a zero for each group of input features.

Shapes: N output features, K input features, R rows of activations, g input features in a group.
"""

from types import ModuleType

import torch
from torch import Tensor

from codellama.linear.matrix import Matrix, find_gpu, find_kernels
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
        self._gpu: ModuleType | None = None
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
        self._gpu = find_gpu(self.codes.device)
        self._few, self._native = find_kernels("int4", self.codes.device)
        if self._native is not None:
            self.packed = self._native.pack_int4(self.codes, self.scales, self.zeros)
            self.codes, self.scales, self.zeros = (self.packed.new_empty(0) for _ in range(3))

    def multiply(self, x: Tensor) -> Tensor:
        """Map `[R, K]` to `[R, N]`."""
        if self._gpu is not None and len(x) <= self._gpu.ROWS:
            y: Tensor = self._gpu.int4_product(x.contiguous(), self.codes, self.scales, self.zeros)
            return y
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


SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Parts of a group's range that are tried, largest first."""

PIECE = 2**18
"""Numbers that are rounded at once on a CPU, so that what is made of them stays in caches."""


def quantize_int4(rows: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows `[n, K]` to codes `[n, K/2]`, two a byte, and bfloat16 scales and zeros `[n, K/g]`.

    Sixteen even steps over the range of a group, or over a narrower one where the squared error is smaller: cutting the
    outermost numbers a little brings all others nearer. A group's codes depend on its own numbers alone, bit by bit.
    """
    n, count = len(rows), rows.numel() // group
    codes = torch.empty(count, group, dtype=torch.uint8, device=rows.device)
    scales, zeros = (torch.empty(count, dtype=torch.bfloat16, device=rows.device) for _ in range(2))
    step = (PIECE if rows.device.type == "cpu" else 2**6 * PIECE) // group
    for start in range(0, count, step):
        piece = slice(start, start + step)
        wide = rows.reshape(count, group)[piece].T.float().contiguous()  # [g, groups]: what is per group is contiguous
        scales[piece], zeros[piece] = _choose_steps(wide)
        codes[piece] = _nearest(wide, scales[piece], zeros[piece])[1].add_(8).T
    codes = codes.view(n, -1)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales.view(n, -1), zeros.view(n, -1)


def _choose_steps(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Find scale and zero of each column of `[g, groups]`; of equal errors the first one counts."""
    low, high = wide.amin(dim=0), wide.amax(dim=0)
    middle, span = (low + high) / 2, high - low
    best, least = None, torch.full_like(low, float("inf"))
    for share in SHARES:
        scale = (span * (share / 15)).bfloat16()
        best, least = _better(wide, scale, (middle + scale.float() / 2).bfloat16(), best, least)
    assert best is not None
    codes = _nearest(wide, *best)[1]  # for these codes, the line that is nearest to the numbers
    mean, center = _sum(codes) / len(wide), _sum(wide) / len(wide)
    codes -= mean
    spread = _sum(codes.square())
    slope = _sum(codes.mul(wide)) / torch.where(spread > 0, spread, 1)
    scale = torch.where(spread > 0, slope, best[0].float()).bfloat16()
    return _better(wide, scale, (center - scale.float() * mean).bfloat16(), best, least)[0]


def _better(
    wide: Tensor, scale: Tensor, zero: Tensor, best: tuple[Tensor, Tensor] | None, least: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Take another scale and zero where their squared error is smaller."""
    off, codes = _nearest(wide, scale, zero)
    error = _sum(off.sub_(codes).square_()) * scale.float().square()
    if best is None:
        return (scale, zero), error
    better = error < least
    return (torch.where(better, scale, best[0]), torch.where(better, zero, best[1])), torch.where(better, error, least)


def _nearest(wide: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Say where the numbers lie, in steps from zero, and which codes are nearest, from -8 to 7."""
    steps = torch.where(scale > 0, scale, 1).float()  # a group of equal numbers
    off = wide.sub(zero.float()).div_(steps)
    return off, off.round().clamp_(-8, 7)


def _sum(values: Tensor) -> Tensor:
    """Add up each column of `[g, groups]` in an order that does not depend on how many there are."""
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return values[0]


def unpack_int4(codes: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn codes back into numbers: computed in float32, rounded once."""
    n, count = scales.shape
    values = torch.stack((codes & 15, codes >> 4), dim=-1).view(n, count, -1)  # [n, K/g, g]
    wide = (values.float() - 8) * scales.float()[..., None] + zeros.float()[..., None]
    return wide.view(n, -1).to(dtype)
