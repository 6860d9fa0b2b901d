"""The header of a GGUF file: key/value pairs, and where each tensor lies; versions 2 and 3, little-endian.

The file is not trusted. Every length is compared with what is left of the file before anything is read or allocated,
and a header has a largest size, so that a bad file gives an error, in bounded time and memory. It knows nothing of what
keys and names mean. Source: the GGUF specification in docs/gguf.md of the ggml project.
"""

import array
import ctypes
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import NoReturn, TypeAlias, TypeVar

from codellama.checkpoint.gguf_blocks import BLOCKS, UNREAD, Block
from codellama.errors import CheckpointError, shown

MAGIC = b"GGUF"
HEADER_BYTES = 2**26
"""A header may not be longer. Those of models with 256,000 pieces take about 10 MB, nearly all of it the vocabulary."""
MAX_DIMS = 4
MAX_KEY_BYTES = 2**16 - 1

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Value type → struct code; 7 is a boolean of one byte."""
_BOOL, _FLOAT32, _STRING, _ARRAY = 7, 6, 8, 9

Value: TypeAlias = "int | float | bool | bytes | list[bytes] | array.array[float]"
_V = TypeVar("_V", int, float, bool, bytes, list[bytes], "array.array[float]")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its block type, its shape (slowest axis first, as in torch), its first byte in the file."""

    block: Block
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) // self.block.values * self.block.nbytes


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights begin.

    Attributes:
        path: the file.
        values: the key/value pairs; strings as bytes, arrays of numbers as array.array.
        tensors: by the file's own names, in the order in which they lie.
    """

    path: Path
    values: dict[str, Value]
    tensors: dict[str, StoredTensor]

    def find(self, key: str, kind: type[_V]) -> _V | None:
        """Return a value, or None where the key is missing.

        Raises:
            CheckpointError: the value is of another kind.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) is not kind:
            raise CheckpointError(f"{self.path}: {key} is {self.spell(key)}; {_KINDS[kind]} was expected")
        return value

    def text(self, key: str) -> str | None:
        """Return a string, or None where the key is missing.

        Raises:
            CheckpointError: the value is no string, or no UTF-8.
        """
        value = self.find(key, bytes)
        if value is None:
            return None
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {key} is {self.spell(key)}, which is not UTF-8") from error

    def spell(self, key: str) -> str:
        """Spell a value for an error message, not at length."""
        value = self.values[key]
        if isinstance(value, list | array.array):
            return f"an array of {len(value)} values"
        return shown(value[:80].decode(errors="replace") if isinstance(value, bytes) else value)


_KINDS: dict[type, str] = {
    int: "an integer", float: "a number", bool: "a boolean", bytes: "a string", list: "an array of strings",
    array.array: "an array of numbers",
}  # fmt: skip


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: what is wrong with it, and at which byte.
    """
    with path.open("rb") as file:
        walk = _Walk(path, file)
        magic = walk.take(4)
        if magic != MAGIC:
            walk.fail(f"it begins {magic!r}; {MAGIC!r} was expected")
        version = walk.integer("I")
        if version not in (2, 3):
            walk.fail(f"it is GGUF version {version}; 2 and 3, little-endian, are read: convert it with llama.cpp")
        n_tensors, n_values = walk.integer("Q"), walk.integer("Q")
        values = dict(walk.values(n_values))
        header = Header(path, values, {})
        alignment = header.find("general.alignment", int)
        if alignment is None:
            alignment = 32
        if alignment < 1 or alignment & (alignment - 1):
            walk.fail(f"general.alignment is {alignment}; a power of two was expected")
        found = list(walk.tensors(n_tensors, alignment))
        begin = -(-walk.at // alignment) * alignment
    end, last = begin, "the header"
    for name, tensor in sorted(found, key=lambda entry: entry[1].offset):
        offset = begin + tensor.offset
        if offset < end:
            walk.fail(f"{shown(name)} begins at byte {offset}, inside {last}")
        end, last = offset + tensor.nbytes, shown(name)
        if end > walk.size:
            walk.fail(f"{shown(name)} ends at byte {end}; {_TRUNCATED}")
        header.tensors[name] = StoredTensor(tensor.block, tensor.shape, offset)
    return header


_TRUNCATED = "it is probably truncated: compare its size with its source's, and download it again"


class _Walk:
    """Goes through a header from its first byte to its last, and refuses every step beyond the end."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self._path = path
        self._file = file
        self.size = path.stat().st_size
        self.at = 0

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path} ({self.size} bytes) cannot be read as GGUF, byte {self.at}: {what}")

    def check(self, nbytes: int) -> None:
        """Fail unless so many bytes can follow."""
        if self.at + nbytes > self.size:
            self.fail(f"{nbytes} more bytes were announced; {_TRUNCATED}")
        if self.at + nbytes > HEADER_BYTES:
            self.fail(f"the header is longer than {HEADER_BYTES} bytes, so it is probably damaged")

    def take(self, nbytes: int) -> bytes:
        self.check(nbytes)
        content = self._file.read(nbytes)
        if len(content) != nbytes:
            self.fail(_TRUNCATED)
        self.at += nbytes
        return content

    def integer(self, code: str) -> int:
        value: int
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return value

    def string(self) -> bytes:
        return self.take(self.integer("Q"))

    def name(self, what: str) -> str:
        """Read a key, or a tensor's name."""
        length = self.integer("Q")
        if not 0 < length <= MAX_KEY_BYTES:
            self.fail(f"{what} has {length} bytes; 1 to {MAX_KEY_BYTES} were expected")
        content = self.take(length)
        try:
            return content.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} {shown(content)} is not UTF-8")

    def values(self, count: int) -> Iterator[tuple[str, Value]]:
        seen = set()
        for _ in range(count):
            key = self.name("a key")
            if key in seen:
                self.fail(f"the key {shown(key)} stands there twice")
            seen.add(key)
            yield key, self.value(key)

    def value(self, key: str) -> Value:
        kind = self.integer("I")
        if kind in _SCALARS:
            return self.scalar(kind)
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            self.fail(f"{shown(key)} has value type {kind}, which is not known")
        kind, count = self.integer("I"), self.integer("Q")
        if kind == _STRING:
            self.check(8 * count)  # each has a length at least
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            self.fail(f"{shown(key)} is an array of value type {kind}; strings and numbers are read, not nested arrays")
        code = _SCALARS[kind].replace("?", "B")
        numbers: array.array[float] = array.array(code, self.take(count * struct.calcsize(f"<{code}")))
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers

    def scalar(self, kind: int) -> int | float | bool:
        value: int | float | bool
        (value,) = struct.unpack(f"<{_SCALARS[kind]}", self.take(struct.calcsize(f"<{_SCALARS[kind]}")))
        return _shortest(value) if kind == _FLOAT32 else value

    def tensors(self, count: int, alignment: int) -> Iterator[tuple[str, StoredTensor]]:
        """Yield names and tensors, with offsets relative to where the weights begin."""
        seen = set()
        for _ in range(count):
            name = self.name("a tensor's name")
            if name in seen:
                self.fail(f"the tensor {shown(name)} stands there twice")
            seen.add(name)
            n_dims = self.integer("I")
            if not 1 <= n_dims <= MAX_DIMS:
                self.fail(f"{shown(name)} has {n_dims} dimensions; 1 to {MAX_DIMS} were expected")
            shape = tuple(self.integer("Q") for _ in range(n_dims))[::-1]
            if 0 in shape:
                self.fail(f"{shown(name)} has the shape {list(shape)}; positive sizes were expected")
            number, offset = self.integer("I"), self.integer("Q")
            block = BLOCKS.get(number)
            if block is None:
                known = ", ".join(known.name for known in BLOCKS.values())
                kind = UNREAD.get(number, f"of the unknown type {number}")
                self.fail(f"{shown(name)} is {kind}, which this package does not read; it reads {known}")
            if shape[-1] % block.values:
                self.fail(f"{shown(name)} has rows of {shape[-1]}, no multiple of {block.name}'s {block.values}")
            if offset % alignment:
                self.fail(f"{shown(name)} has the offset {offset}, no multiple of the alignment {alignment}")
            yield name, StoredTensor(block, shape, offset)


def _shortest(value: float) -> float:
    """Return the shortest decimal number that rounds to this float32: 1e-05, where the float32 is 9.99999974e-06."""
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if ctypes.c_float(short).value == value:
            return short
    return value
