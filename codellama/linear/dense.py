"""A matrix in full numbers: bfloat16, float16 or float32.

Shapes: N output features, K input features, R rows of activations.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from codellama.linear.matrix import KERNEL_GROUP, Matrix, find_kernels
from codellama.native.kernels import Kernels
from codellama.native.pages import use_huge_pages

LARGE = 2**21
"""Numbers of a matrix from which on our own kernel is looked for: a model of smaller ones stands in the processor's
caches, and is not worth the compilation."""


class Dense(Matrix):
    """Held as it is multiplied; its rows are parameters of the layers, as views."""

    weight: Tensor

    def __init__(self, out_features: int, in_features: int, compute: torch.dtype, device: torch.device) -> None:
        """Make an empty matrix in the dtype of the activations."""
        super().__init__(out_features, in_features, compute)
        weight = torch.empty(out_features, in_features, dtype=compute, device=device)
        if device.type == "cpu":
            use_huge_pages(weight)
        self.register_buffer("weight", weight, persistent=False)  # the layers' parameters are what is saved

        self._few = 0
        self._native: Kernels | None = None

    def put_(self, start: int, rows: Tensor, largest: Tensor | None = None) -> None:
        """Store rows, rounded to the dtype of this matrix."""
        self.weight[start : start + len(rows)] = rows

    def finish_(self) -> None:
        """Find the kernel for few rows, if there is so much to read that it pays."""
        large = self.weight.numel() >= LARGE and self.in_features % KERNEL_GROUP == 0
        if large and self.compute == torch.bfloat16:
            self._few, self._native = find_kernels("bfloat16", self.weight.device)

    def multiply(self, x: Tensor) -> Tensor:
        """Map `[R, K]` to `[R, N]`."""
        if self._native is None or len(x) > self._few or torch.compiler.is_compiling():
            return F.linear(x, self.weight)
        return self._native.bf16_linear(x.contiguous(), self.weight)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Show the rows from start to stop, as a view."""
        return self.weight[start:stop]


class PackedHalf(Matrix):
    """float16, packed by fbgemm for float32 activations: half the bytes of float32 on a CPU that has no bfloat16.

    float16 holds a language model's bfloat16 weights exactly, except for tiny ones. `python -m benchmarks.kernels`
    compares.
    """

    def __init__(self, out_features: int, in_features: int, compute: torch.dtype) -> None:
        """Make an empty matrix on the CPU; the activations are float32."""
        assert compute == torch.float32, "fbgemm multiplies float32 activations"
        super().__init__(out_features, in_features, compute)
        self._loose: Tensor | None = torch.empty(out_features, in_features, dtype=torch.float16, device="cpu")
        self._packed: Any = None

    def put_(self, start: int, rows: Tensor, largest: Tensor | None = None) -> None:
        """Store rows, rounded to float16."""
        assert self._loose is not None, "rows come before the packing"
        self._loose[start : start + len(rows)] = rows

    def finish_(self) -> None:
        """Pack; the loose numbers go."""
        assert self._loose is not None, "a matrix is packed once"
        self._packed = torch.ops.quantized.linear_prepack_fp16(self._loose.float(), None)
        self._loose = None

    def multiply(self, x: Tensor) -> Tensor:
        """Map `[R, K]` to `[R, N]`."""
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.contiguous(), self._packed)
        return y

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Unpack the rows from start to stop: all of them first, since fbgemm's order is its own."""
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return weight[start:stop]

    @property
    def nbytes(self) -> int:
        """Two bytes a number."""
        return 2 * self.out_features * self.in_features
