"""Between files and the memory of tensors, without a copy in between.

It knows nothing of formats.
"""

import ctypes
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

READ_BYTES = 2**30
"""One call reads at most so much; Linux stops at 2 GB."""


class Source(Protocol):
    """An open file without a buffer of its own."""

    def seek(self, offset: int, /) -> int:
        """Go to a byte."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill a buffer, or a part of it; 0 at the end of the file."""


def memory_of(tensor: Tensor) -> memoryview:
    """Bytes of a contiguous tensor on the CPU, valid as long as the tensor; torch shows them only through numpy."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def rows_of(tensor: Tensor) -> Iterator[memoryview]:
    """Bytes of each row of a matrix on the CPU, whose rows may stand apart from one another."""
    count, width = tensor.shape
    assert tensor.stride(1) == 1 or width == 1
    kind = ctypes.c_char * (width * tensor.itemsize)
    for row in range(count):
        yield memoryview(kind.from_address(tensor.data_ptr() + row * tensor.stride(0) * tensor.itemsize)).cast("B")


def fill(buffer: memoryview, file: Source, offset: int) -> bool:
    """Read a buffer full, from a byte of a file on; False where the file ends before."""
    file.seek(offset)
    while buffer.nbytes:
        count = file.readinto(buffer[:READ_BYTES])
        if not count:
            return False
        buffer = buffer[count:]
    return True
