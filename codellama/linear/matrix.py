"""What every way to hold a weight matrix has in common.

It knows nothing of ranks, layers or files: rows of numbers in, products out.

Shapes: N output features, K input features, R rows of activations.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codellama.device import few_rows
from codellama.memory import UNPACKED_BYTES
from codellama.native.kernels import Kernels, native_kernels

TILE_BYTES = UNPACKED_BYTES // 6
"""Bound of the unpacked part of a matrix that exists at once; making it in float32 takes five times as much."""

KERNEL_GROUP = 32
"""Inputs of a matrix come in multiples of this for our own kernels."""


def find_kernels(held: str, device: torch.device) -> tuple[int, Kernels | None]:
    """Say for how many rows of activations our own kernels are to be taken for a way to hold weights, and get them.

    They are compiled here, where nobody has done so before. Without them, the rows are 0.
    """
    count = few_rows(held, device)
    kernels = native_kernels() if count else None
    return (count if kernels is not None else 0), kernels


def find_gpu(device: torch.device) -> ModuleType | None:
    """Get our products for a GPU, where there is one and PyTorch brings Triton."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("codellama.native.gpu")


class Matrix(nn.Module):
    """A weight `[N, K]`: filled row by row, then packed as its kernels want it, then multiplied.

    One rule for all of them: few rows of activations are multiplied by the kernel that reads the packed weight fastest
    on this machine; for many the weight is unpacked, tile by tile, and the dense product is used.

    Attributes:
        out_features: N.
        in_features: K.
        compute: dtype of activations and results.
    """

    def __init__(self, out_features: int, in_features: int, compute: torch.dtype) -> None:
        """Make an empty matrix."""
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.compute = compute

    def put_(self, start: int, rows: Tensor, largest: Tensor | None = None) -> None:
        """Store rows `[n, K]` of any floating dtype, from row `start` on.

        Args:
            start: the first of them.
            rows: the numbers.
            largest: magnitude of the largest number of each row, `[n]`, where the row goes on in other ranks.
        """
        raise NotImplementedError

    def finish_(self) -> None:
        """Pack, once every row is there."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., K]` to `[..., N]` in the dtype `compute`."""
        y = self.multiply(x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)

    def multiply(self, x: Tensor) -> Tensor:
        """Map `[R, K]` to `[R, N]`."""
        raise NotImplementedError

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Unpack the rows from start to stop, `[stop - start, K]` in the dtype `compute`."""
        raise NotImplementedError

    def multiply_unpacked(self, x: Tensor) -> Tensor:
        """Map `[R, K]` to `[R, N]` by the dense product, a tile of the weight at a time."""
        if self.out_features <= self._tile():
            return F.linear(x, self.dense())
        y = x.new_empty(len(x), self.out_features)
        for start, stop in self.tiles():
            y[:, start:stop] = F.linear(x, self.dense(start, stop))
        return y

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Cut the rows of the weight into pieces of at most TILE_BYTES, unpacked."""
        step = self._tile()
        for start in range(0, self.out_features, step):
            yield start, min(start + step, self.out_features)

    def _tile(self) -> int:
        return max(1, TILE_BYTES // (self.in_features * self.compute.itemsize))

    @property
    def nbytes(self) -> int:
        """Bytes that the numbers take as they are held."""
        return sum(buffer.nbytes for buffer in self.buffers())
