"""Products of a few rows with quantized weights on a GPU, written in Triton, which comes with PyTorch's CUDA build.

A program reads BN rows of codes once, for all rows of activations, and makes numbers of them in registers: the memory
that is read is that of the codes. The numbers are those of the unpacked matrix, in the dtype of the activations.
They know nothing of models. Written without a GPU at hand: checked by Triton's interpreter on a CPU; tests/gpu compares
them on a real one, and benchmarks/gpu.py measures.
"""

# Shapes: R rows of activations, at most ROWS; K inputs; N outputs; G groups of inputs that share a scale.

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Rows of activations that one product takes: the least that a tensor core multiplies."""

_BN, _BK = 32, 256


def int8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Multiply by an 8-bit matrix.

    Args:
        x: `[R, K]`, bfloat16, float16 or float32, contiguous.
        codes: int8 `[N, K]`: w = code · scale.
        scales: float32 `[N]`.

    Returns:
        `[R, N]` in x's dtype.
    """
    (rows, k), n = x.shape, len(codes)
    assert rows <= ROWS, "few rows"
    y = x.new_empty(rows, n)
    _int8[(triton.cdiv(n, _BN),)](x, codes, scales, y, rows, n, k, BN=_BN, BK=_BK, ROWS=ROWS)
    return y


def int4_product(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Multiply by a 4-bit matrix.

    Args:
        x: `[R, K]`, as above.
        codes: uint8 `[N, K / 2]`, the even input in the low half: w = (code - 8) · scale + zero.
        scales: bfloat16 `[N, G]`, and zeros alike.

    Returns:
        `[R, N]` in x's dtype.
    """
    (rows, k), (n, groups) = x.shape, scales.shape
    assert rows <= ROWS, "few rows"
    y = x.new_empty(rows, n)
    sizes = {"BN": _BN, "BK": _BK, "ROWS": ROWS, "GROUP": k // groups}
    _int4[(triton.cdiv(n, _BN),)](x, codes, scales, zeros, y, rows, n, k, **sizes)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _int8(x, codes, scales, y, rows, n, k, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    outputs = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, BN), tl.float32)
    for start in range(0, k, BK):
        inputs = start + tl.arange(0, BK)
        given = tl.load(
            x + row[:, None] * k + inputs[None, :], mask=(row[:, None] < rows) & (inputs[None, :] < k), other=0.0
        )
        weight = tl.load(
            codes + outputs[:, None].to(tl.int64) * k + inputs[None, :],
            mask=(outputs[:, None] < n) & (inputs[None, :] < k),
            other=0,
        )
        sums = tl.dot(given, tl.trans(weight.to(given.dtype)), sums, input_precision="ieee")
    sums *= tl.load(scales + outputs, mask=outputs < n, other=0.0)[None, :]
    place = y + row[:, None] * n + outputs[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=(row[:, None] < rows) & (outputs[None, :] < n))


@triton.jit  # type: ignore[untyped-decorator]
def _int4(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, y, rows, n, k,
    BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, BN), tl.float32)
    wide = outputs[:, None].to(tl.int64)
    for start in range(0, k // 2, BK // 2):
        pairs = start + tl.arange(0, BK // 2)
        here = (outputs[:, None] < n) & (pairs[None, :] < k // 2)
        both = tl.load(codes + wide * (k // 2) + pairs[None, :], mask=here, other=0)
        group = wide * (k // GROUP) + (2 * pairs[None, :]) // GROUP
        scale = tl.load(scales + group, mask=here, other=0.0).to(tl.float32)
        zero = tl.load(zeros + group, mask=here, other=0.0).to(tl.float32)
        real = (row[:, None] < rows) & (pairs[None, :] < k // 2)
        even = tl.load(x + row[:, None] * k + 2 * pairs[None, :], mask=real, other=0.0)
        odd = tl.load(x + row[:, None] * k + 2 * pairs[None, :] + 1, mask=real, other=0.0)
        low = ((both & 15).to(tl.float32) - 8.0) * scale + zero
        high = ((both >> 4).to(tl.float32) - 8.0) * scale + zero
        sums = tl.dot(even, tl.trans(low.to(even.dtype)), sums, input_precision="ieee")
        sums = tl.dot(odd, tl.trans(high.to(odd.dtype)), sums, input_precision="ieee")
    place = y + row[:, None] * n + outputs[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=(row[:, None] < rows) & (outputs[None, :] < n))
