"""The kernels as functions of tensors.

They read a weight once for a few rows of activations. What is read many rows at a time is unpacked once instead, and
multiplied by PyTorch. A row's result is the same, bit for bit, whatever rows stand beside it and however many threads
there are. They know nothing of models, and nothing of which kernel is faster where.
"""

# Shapes: R rows of activations, K inputs, N outputs, G a group of inputs that share a scale.

import ctypes
import functools
import logging

import torch
from torch import Tensor

from codellama.native.build import UnavailableError, load_library
from codellama.native.pages import use_huge_pages

logger = logging.getLogger(__name__)


@functools.cache
def native_kernels() -> "Kernels | None":
    """Get the kernels for this CPU, built now if they never were; None, with one line in the log, where there are none.

    The answer is kept for the life of the process, so that the reason is told once.
    """
    return load_kernels()


def load_kernels() -> "Kernels | None":
    """Get them without remembering the answer."""
    try:
        return Kernels(load_library())
    except UnavailableError as reason:
        logger.warning("without our own CPU kernels: %s", reason)
        return None


class Kernels:
    """The kernels of one library. All tensors are contiguous and on the CPU; activations bfloat16 or float32."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take a library that `load_library` has loaded."""
        self._library = library
        library.packed_int4_bytes.restype = library.packed_int8_bytes.restype = ctypes.c_int64

    def pack_int4(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Lay a 4-bit matrix out as `int4_linear` reads it.

        Args:
            codes: uint8 [N, K / 2], two codes a byte, the even input in the low half.
            scales: bfloat16 [N, K / G], G one of 32, 64 and 128: w = (code - 8) * scale + zero.
            zeros: bfloat16 [N, K / G].

        Returns:
            uint8, one axis: 4 bits a weight, and 32 for each group; N is rounded up to whole registers.
        """
        (n, half), groups = codes.shape, scales.shape[1]
        group = 2 * half // groups
        assert scales.shape == zeros.shape == (n, 2 * half // group)
        packed = _memory(self._packed_int4_bytes(n, 2 * half, group))
        arrays = _address(codes, torch.uint8), _address(scales, torch.bfloat16), _address(zeros, torch.bfloat16)
        self._library.pack_int4(*arrays, _address(packed), *_sizes(n, 2 * half, group), torch.get_num_threads())
        return packed

    def int4_linear(self, x: Tensor, packed: Tensor, n: int, group: int) -> Tensor:
        """Multiply a few rows by a packed matrix. Activations are rounded to 8 bits, in groups of 32 with a scale each.

        Args:
            x: [R, K].

        Returns:
            [R, N], in x's dtype.
        """
        rows, k = x.shape
        assert packed.numel() == self._packed_int4_bytes(n, k, group)
        out = x.new_empty(rows, n)
        arrays = _address(x), _is_bf16(x.dtype), _address(packed, torch.uint8), _address(out)
        self._library.int4_linear(*arrays, *_sizes(rows, n, k, group), torch.get_num_threads())
        return out

    def unpack_int4(self, packed: Tensor, n: int, group: int, out: Tensor, start: int = 0) -> Tensor:
        """Write the weights of some outputs of a packed matrix, from `start` on, into a dense one.

        Args:
            out: [outputs, K], bfloat16 or float32; each weight is rounded once.

        Returns:
            out.
        """
        count, k = out.shape
        assert 0 <= start <= start + count <= n
        assert packed.numel() == self._packed_int4_bytes(n, k, group)
        arrays = _address(packed, torch.uint8), _address(out), _is_bf16(out.dtype)
        self._library.unpack_int4(*arrays, *_sizes(k, group, start, start + count), torch.get_num_threads())
        return out

    def pack_int8(self, codes: Tensor) -> Tensor:
        """Lay an 8-bit matrix out as `int8_linear` reads it.

        Args:
            codes: int8 [N, K] from -127 to 127, K a multiple of 32.

        Returns:
            uint8, one axis: a byte a weight; N is rounded up to whole registers.
        """
        n, k = codes.shape
        assert int(codes.min()) >= -127
        packed = _memory(self._packed_int8_bytes(n, k))
        arrays = _address(codes, torch.int8), _address(packed)
        self._library.pack_int8(*arrays, *_sizes(n, k), torch.get_num_threads())
        return packed

    def int8_linear(self, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        """Multiply a few rows by a packed matrix. Activations are rounded to 8 bits, in groups of 32 with a scale each.

        Args:
            x: [R, K].
            scales: float32 [N]: w = code * scale.

        Returns:
            [R, N].
        """
        (rows, k), n = x.shape, len(scales)
        assert packed.numel() == self._packed_int8_bytes(n, k)
        out = x.new_empty(rows, n)
        weights = _address(packed, torch.uint8), _address(scales, torch.float32)
        arrays = _address(x), _is_bf16(x.dtype), *weights, _address(out)
        self._library.int8_linear(*arrays, *_sizes(rows, n, k), torch.get_num_threads())
        return out

    def unpack_int8(self, packed: Tensor, scales: Tensor, out: Tensor, start: int = 0) -> Tensor:
        """Write the weights of some outputs of a packed matrix, from `start` on, into a dense one.

        Args:
            scales: float32 [N].
            out: [outputs, K], bfloat16 or float32; each weight is rounded once.

        Returns:
            out.
        """
        n, (count, k) = len(scales), out.shape
        assert 0 <= start <= start + count <= n
        assert packed.numel() == self._packed_int8_bytes(n, k)
        arrays = _address(packed, torch.uint8), _address(scales, torch.float32), _address(out), _is_bf16(out.dtype)
        self._library.unpack_int8(*arrays, *_sizes(k, start, start + count), torch.get_num_threads())
        return out

    def bf16_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply a few rows of bfloat16 by a bfloat16 matrix as it is stored; sums are float32.

        Args:
            x: [R, K], K a multiple of 32.
            weight: [N, K].

        Returns:
            [R, N].
        """
        (rows, k), n = x.shape, weight.shape[0]
        assert k % 32 == 0
        assert weight.shape == (n, k)
        out = x.new_empty(rows, n)
        arrays = (_address(tensor, torch.bfloat16) for tensor in (x, weight, out))
        self._library.bf16_linear(*arrays, *_sizes(rows, n, k), torch.get_num_threads())
        return out

    def _packed_int8_bytes(self, n: int, k: int) -> int:
        assert k % 32 == 0
        return int(self._library.packed_int8_bytes(*_sizes(n, k)))

    def _packed_int4_bytes(self, n: int, k: int, group: int) -> int:
        assert group in (32, 64, 128)
        assert k % group == 0
        return int(self._library.packed_int4_bytes(*_sizes(n, k, group)))


def _memory(nbytes: int) -> Tensor:
    packed = torch.empty(nbytes, dtype=torch.uint8)
    use_huge_pages(packed)  # a quarter to two fifths faster at one row
    return packed


def _address(tensor: Tensor, dtype: torch.dtype | None = None) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    assert dtype in (None, tensor.dtype)
    return ctypes.c_void_p(tensor.data_ptr())


def _sizes(*sizes: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in sizes]


def _is_bf16(dtype: torch.dtype) -> bool:
    assert dtype in (torch.bfloat16, torch.float32)
    return dtype == torch.bfloat16
