"""Products of a few or many rows with one matrix: PyTorch's kernels and ours, and the share of bandwidth they reach.

Each candidate cycles through copies of its matrix that together exceed the caches, so weights come from memory as they
do in a model; tensors lie on large pages where the system has them. Candidates take turns, and the shortest of their
times counts. Those that unpack are for many rows.

python -m benchmarks.kernels
python -m benchmarks.kernels --shape 5632,2048 --rows 1,2,4,8,16,32,128,512 --megabytes 128 --repeats 8
OMP_NUM_THREADS=1 python -m benchmarks.kernels --shape 11008,4096 --rows 1,8 --megabytes 256 --only int4
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import fire
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import bandwidth, report
from codellama.native.kernels import Kernels, native_kernels
from codellama.native.pages import use_huge_pages

GROUP = 32
MANY = 32  # rows from which the work is arithmetic, and two copies are enough

Product = Callable[[Tensor], Any]


@dataclass
class Candidate:
    """A way to multiply: makes a packed copy of a matrix, which is a function of the activations."""

    name: str
    dtype: torch.dtype  # of the activations
    bits: float  # that are read for a weight
    pack: Callable[[], Product]


def kernels(
    shape: Sequence[int] = (256, 512),
    rows: int | Sequence[int] = (1, 8, 32),
    megabytes: int = 2,
    repeats: int = 2,
    only: str = "",
) -> None:
    """Time one product by rows of activations.

    Args:
        shape: outputs, inputs.
        megabytes: size of all copies of a matrix together; more than the caches hold.
        only: a part of the names of the candidates that are wanted.
    """
    n, k = shape
    if k % GROUP:
        raise ValueError(f"shape is {n},{k}; inputs in multiples of {GROUP} were expected")
    torch.manual_seed(0)
    device = torch.device("cpu")
    speed = bandwidth(device)
    wanted = [candidate for candidate in candidates(n, k) if only in candidate.name]
    if not wanted:
        raise ValueError(f"only is {only!r}, a part of no name here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of some of its own kernels
        packed = [[c.pack() for _ in range(max(2, int(megabytes * 8e6 / (n * k * c.bits))))] for c in wanted]
    table = []
    for count in [rows] if isinstance(rows, int) else rows:
        best = [float("inf")] * len(wanted)
        inputs = {dtype: torch.randn(count, k, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
        for _ in range(repeats + 1):
            for i, candidate in enumerate(wanted):
                copies = packed[i][:2] if count >= MANY else packed[i]
                best[i] = min(best[i], _seconds(copies, inputs[candidate.dtype]))
        for candidate, seconds in zip(wanted, best, strict=True):
            rate = n * k * candidate.bits / 8 / seconds
            table.append(
                {
                    "candidate": candidate.name,
                    "rows": count,
                    "ms": 1000 * seconds,
                    "GB_per_s": rate / 1e9,
                    "of_bandwidth": rate / speed,
                    "GFLOP_per_s": 2 * count * n * k / seconds / 1e9,
                }
            )
    arguments = {"shape": [n, k], "megabytes": megabytes, "repeats": repeats, "bandwidth_GB_per_s": speed / 1e9}
    report("kernels", arguments, table)


def _seconds(copies: Sequence[Product], x: Tensor) -> float:
    begin = time.perf_counter()
    for product in copies:
        product(x)
    return (time.perf_counter() - begin) / len(copies)


def _copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    copy = torch.empty(weight.shape, dtype=dtype)
    use_huge_pages(copy)
    return copy.copy_(weight)


def candidates(n: int, k: int) -> list[Candidate]:
    """List what can multiply by an [n, k] matrix here."""
    weight = torch.randn(n, k) / k**0.5
    native = native_kernels()
    return [
        *_dense(weight),
        *_int8(weight, native),
        *_int4(n, k, native),
    ]


def _dense(weight: Tensor) -> list[Candidate]:
    bf16, fp32 = torch.bfloat16, torch.float32

    def linear(dtype: torch.dtype) -> Product:
        copy = _copy(weight, dtype)
        return lambda x: F.linear(x, copy)

    def without_onednn() -> Product:
        copy = _copy(weight, bf16)

        def product(x: Tensor) -> Tensor:
            before = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)  # the public way warns each time
            try:
                return F.linear(x, copy)
            finally:
                torch._C._set_mkldnn_enabled(before)

        return product

    def unpacked() -> Product:
        copy, out = _copy(weight, bf16), torch.empty_like(weight)
        return lambda x: F.linear(x, out.copy_(copy))

    def blocked() -> Product:
        # oneDNN's own order of the weights, which would have to be kept beside or instead of the checkpoint's.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(bf16), None)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    def fbgemm() -> Product:
        packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)

    found = [
        Candidate("bf16 linear", bf16, 16, lambda: linear(bf16)),
        Candidate("bf16 no oneDNN", bf16, 16, without_onednn),
        Candidate("bf16 to fp32", fp32, 16, unpacked),
        Candidate("fp32 linear", fp32, 32, lambda: linear(fp32)),
    ]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found.append(Candidate("bf16 blocked", bf16, 16, blocked))
    if "fbgemm" in torch.backends.quantized.supported_engines:
        found.append(Candidate("fp16 fbgemm", fp32, 16, fbgemm))
    return found


def _int8(weight: Tensor, native: Kernels | None) -> list[Candidate]:
    bf16, fp32 = torch.bfloat16, torch.float32
    scales = weight.abs().amax(1) / 127
    codes = (weight / scales[:, None]).round().to(torch.int8)

    def weight_only() -> Product:
        copy, half = _copy(codes, torch.int8), scales.bfloat16()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, copy, half)

    def quantized(columns: Tensor) -> Any:
        matrix = torch._make_per_channel_quantized_tensor(columns, scales.double(), torch.zeros(len(scales)).long(), 0)
        return torch.ops.quantized.linear_prepack(matrix, None)

    def dynamic() -> Product:
        packed = quantized(codes)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)

    def dynamic_rows() -> Product:
        # One range serves all rows of a call. Rows divided by their size, beside a 1 and a -1 that meet zeros, have the
        # same range in every call, so that none depends on its neighbours.
        packed, ends = quantized(F.pad(codes, (0, 2))), torch.tensor([1.0, -1.0])

        def product(x: Tensor) -> Tensor:
            sizes = x.abs().amax(1, keepdim=True)
            scaled = torch.cat([x / sizes, ends.expand(len(x), 2)], 1)
            return torch.ops.quantized.linear_dynamic(scaled, packed, True).mul_(sizes)

        return product

    def ours(native: Kernels) -> Product:
        packed = native.pack_int8(codes)
        return lambda x: native.int8_linear(x, packed, scales)

    def unpacked(native: Kernels, dtype: torch.dtype) -> Product:
        packed, out = native.pack_int8(codes), torch.empty(codes.shape, dtype=dtype)
        return lambda x: F.linear(x, native.unpack_int8(packed, scales, out))

    found = [Candidate("int8 torch", bf16, 8, weight_only)]
    if torch.backends.quantized.engine in ("fbgemm", "x86"):
        found.append(Candidate("int8 dynamic", fp32, 8, dynamic))
        found.append(Candidate("int8 dyn. rows", fp32, 8, dynamic_rows))
    if native is not None:
        found.append(Candidate("int8 ours", bf16, 8, lambda: ours(native)))
        found.append(Candidate("int8 to bf16", bf16, 8, lambda: unpacked(native, bf16)))
        found.append(Candidate("int8 to fp32", fp32, 8, lambda: unpacked(native, fp32)))
    return found


def _int4(n: int, k: int, native: Kernels | None) -> list[Candidate]:
    bf16, fp32 = torch.bfloat16, torch.float32
    codes = torch.randint(16, (n, k), dtype=torch.uint8)
    scales, zeros = torch.rand(2, n, k // GROUP).to(bf16)

    def torchs() -> Product:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        packed = _copy(packed, packed.dtype)
        pairs = torch.stack([scales.t(), zeros.t()], dim=2).contiguous()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, pairs)

    def pack(native: Kernels) -> Tensor:
        return native.pack_int4(codes[:, 0::2] | codes[:, 1::2] << 4, scales, zeros)

    def ours(native: Kernels) -> Product:
        packed = pack(native)
        return lambda x: native.int4_linear(x, packed, n, GROUP)

    def unpacked(native: Kernels, dtype: torch.dtype) -> Product:
        packed, out = pack(native), torch.empty(n, k, dtype=dtype)
        return lambda x: F.linear(x, native.unpack_int4(packed, n, GROUP, out))

    found = [Candidate("int4 torch", bf16, 4 + 32 / GROUP, torchs)]
    if native is not None:
        found.append(Candidate("int4 ours", bf16, 4 + 32 / GROUP, lambda: ours(native)))
        found.append(Candidate("int4 to bf16", bf16, 4 + 32 / GROUP, lambda: unpacked(native, bf16)))
        found.append(Candidate("int4 to fp32", fp32, 4 + 32 / GROUP, lambda: unpacked(native, fp32)))
    return found


if __name__ == "__main__":
    fire.Fire(kernels)
