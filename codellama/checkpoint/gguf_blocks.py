"""How GGUF stores numbers, plain or in blocks of small integers with scales, and how a part of a matrix is read.

It knows nothing of names, of the header, or of models. A row is a whole number of blocks, so rows can be cut anywhere,
and columns after widening the cut to whole blocks. Source of sizes and type numbers: ggml.h and ggml-common.h
of llama.cpp, and the `gguf` package, whose `quants.dequantize` does the arithmetic of the block types.
"""

from dataclasses import dataclass
from io import RawIOBase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from codellama.errors import CheckpointError

if TYPE_CHECKING:
    import numpy

PIECE_VALUES = 2**18
"""Blocks are de-quantized in pieces of rows of about so many values, which bounds the workspace whatever the tensor."""


@dataclass(frozen=True)
class Block:
    """A type of block: its name, how many values it holds, in how many bytes."""

    name: str
    values: int
    nbytes: int


BLOCKS: dict[int, Block] = {
    0: Block("F32", 1, 4),
    1: Block("F16", 1, 2),
    30: Block("BF16", 1, 2),
    8: Block("Q8_0", 32, 34),
    2: Block("Q4_0", 32, 18),
    3: Block("Q4_1", 32, 20),
    6: Block("Q5_0", 32, 22),
    7: Block("Q5_1", 32, 24),
    20: Block("IQ4_NL", 32, 18),
    10: Block("Q2_K", 256, 84),
    11: Block("Q3_K", 256, 110),
    12: Block("Q4_K", 256, 144),
    13: Block("Q5_K", 256, 176),
    14: Block("Q6_K", 256, 210),
}
"""What this package reads, by ggml's type number. Mixed files need the small blocks, too: where a row is no multiple of
256, llama.cpp writes one of them in place of a K type."""

UNREAD: dict[int, str] = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""What it does not read, to refuse it by name."""

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that are numbers already, and need no package."""

NUMBERS = {block.name: number for number, block in BLOCKS.items()}


def check_package(names: set[str]) -> None:
    """Refuse block types where the package that de-quantizes them is not installed.

    Raises:
        CheckpointError: naming the types and the extra.
    """
    blocks = sorted(names - PLAIN.keys())
    if not blocks:
        return
    try:
        import gguf.quants  # noqa: F401
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"the weights are {', '.join(blocks)}; reading these needs the gguf package: "
            f'pip install "codellama[gguf]" (F32, F16 and BF16 need none)'
        ) from error


def read_part(
    file: RawIOBase, offset: int, block: Block, width: int, rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor:
    """Copy rows and columns out of a matrix, reading only the blocks that hold them.

    Args:
        file: open for reading, unbuffered.
        offset: where the matrix begins in the file.
        block: how it is stored.
        width: columns of the whole matrix, a multiple of the block's values.
        rows: first row and the one after the last.
        columns: first column and the one after the last.

    Returns:
        A tensor of rows × columns: the file's own type where it is plain, else float32. A scale of 11 bits times an
        integer of 4 to 8 bits does not fit the mantissa of a 16-bit type.
    """
    assert width % block.values == 0, f"rows of {width} in blocks of {block.values}"
    shape = rows[1] - rows[0], columns[1] - columns[0]
    if 0 in shape:
        return torch.empty(shape, dtype=PLAIN.get(block.name, torch.float32))
    first, last = columns[0] // block.values, -(-columns[1] // block.values)
    row_bytes = width // block.values * block.nbytes
    begin = offset + rows[0] * row_bytes + first * block.nbytes
    nbytes = (last - first) * block.nbytes
    if block.name in PLAIN:
        content = _read_rectangle(file, begin, row_bytes, shape[0], nbytes)
        return torch.frombuffer(content, dtype=PLAIN[block.name]).view(shape)
    part = torch.empty(shape)
    skipped = columns[0] - first * block.values
    step = max(1, PIECE_VALUES // ((last - first) * block.values))
    for row in range(0, shape[0], step):
        count = min(step, shape[0] - row)
        content = _read_rectangle(file, begin + row * row_bytes, row_bytes, count, nbytes)
        # Assigned by NumPy: torch would wake all its threads for each piece.
        part.numpy()[row : row + count] = _dequantize(content, block, count)[:, skipped : skipped + shape[1]]
    return part


def _read_rectangle(file: RawIOBase, begin: int, row_bytes: int, rows: int, nbytes: int) -> bytearray:
    """Read the first nbytes of each of some rows, which lie row_bytes apart."""
    content = bytearray(rows * nbytes)
    if nbytes == row_bytes:
        rows, nbytes = 1, rows * nbytes
    with memoryview(content) as view:
        for row in range(rows):
            file.seek(begin + row * row_bytes)
            at, end = row * nbytes, (row + 1) * nbytes
            while at < end:  # a read may give less than was asked for, 2 GiB on Linux at most
                got = file.readinto(view[at:end])
                if not got:
                    raise EOFError("the file became shorter after it was opened")
                at += got
    return content


def _dequantize(content: bytearray, block: Block, rows: int) -> "numpy.ndarray[Any, Any]":
    """Turn the bytes of whole blocks into numbers [rows, ...]."""
    import numpy
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = numpy.frombuffer(content, dtype=numpy.uint8).reshape(rows, -1)
    # A scale that is NaN or infinite is a fault of the weights. It shows as NaN logits, as from any other format.
    with numpy.errstate(invalid="ignore", over="ignore"):
        return dequantize(blocks, GGMLQuantizationType(NUMBERS[block.name]))
