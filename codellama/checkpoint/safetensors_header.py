"""The header of a safetensors file: walked with bounds before the library sees the file, and made to be written.

A file is the length of the header (8 bytes, little endian), the header (JSON: for each tensor its dtype, its shape,
and where its data begin and end, counted from the end of the header), and the data, without gaps. This module knows
nothing of models. Source: the description of the format in the README of github.com/huggingface/safetensors.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from codellama.checkpoint.faults import parse_json, refuse_page
from codellama.errors import CheckpointError, shown

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The dtypes of plain numbers that are read and written, by the names that the format gives them."""

CODES = {**DTYPES, "I8": torch.int8, "U8": torch.uint8}
"""The dtypes of files that hold codes as well."""

MODEL = {"format": "pt"}
"""Metadata of a file of plain numbers; transformers refuses one without it."""

MAX_HEADER_BYTES = 10 * 2**20
"""A hundred times what the 723 tensors of the 70B model need. Decoded, JSON takes up to thirty times its size."""

_LARGEST = 2**48  # no size, offset or length of a file comes near


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor; begin and end are in bytes, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What stands before the data.

    Attributes:
        metadata: words of whoever wrote the file.
        entries: the tensors, by their names.
        begin: the byte of the file from which on their begin and end are counted.
    """

    metadata: dict[str, str]
    entries: dict[str, Entry]
    begin: int


def read_header(path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> Header:
    """Walk the header of a file and check it against the size of the file; no data are read.

    Args:
        path: the file.
        dtypes: what tensors may be, by the format's names; another one is refused.

    Raises:
        CheckpointError: another kind of file, a truncated one, or a header that contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
        refuse_page(path, head)
        if head.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer, not weights: run `git lfs pull` in its repository")
        length = int.from_bytes(head[:8], "little")
        if size < 10 or head[8:9] != b"{":
            raise CheckpointError(f"{path} ({size} bytes) is not a safetensors file; it begins {head[:9]!r}")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path} announces a header of {length} bytes; {MAX_HEADER_BYTES} are the most allowed"
            )
        if length > size - 8:
            raise CheckpointError(_truncated(path, size, f"its header alone has {length}"))
        file.seek(8)
        content = file.read(length)
    table = parse_json(content, f"the header of {path}")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"the header of {path} has a __metadata__ that is no table of strings")
    entries = {name: _entry(f"the header of {path}", name, raw, dtypes) for name, raw in table.items()}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise CheckpointError(
                f"the header of {path} puts {shown(name)} at byte {entry.begin}, where {at} is due: tensors overlap, "
                f"or there is a gap between them"
            )
        at = entry.end
    if at > size - 8 - length:
        raise CheckpointError(_truncated(path, size, f"its header announces {at + 8 + length}"))
    if at < size - 8 - length:
        raise CheckpointError(f"{path} has {size - 8 - length - at} bytes behind its last tensor, none were expected")
    return Header(metadata, entries, 8 + length)


def _truncated(path: Path, size: int, announced: str) -> str:
    return f"{path} has {size} bytes, but {announced}: it is probably truncated, download it again"


def _entry(where: str, name: str, raw: object, dtypes: Mapping[str, torch.dtype]) -> Entry:
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where} describes {shown(name)} by {shown(raw)}; dtype, shape, data_offsets were expected"
        )
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise CheckpointError(f"{where} gives {shown(name)} as {shown(dtype)}; {', '.join(dtypes)} can be read")
    if not _sizes(shape) or len(shape) > 8:
        raise CheckpointError(f"{where} gives {shown(name)} the shape {shown(shape)}; up to 8 sizes were expected")
    if not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} gives {shown(name)} the offsets {shown(offsets)}; begin and end were expected")
    begin, end = offsets
    expected = math.prod(shape) * dtypes[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(f"{where} gives {shown(name)} {end - begin} bytes, but its shape needs {expected}")
    return Entry(dtypes[dtype], tuple(shape), begin, end)


def _sizes(values: object) -> bool:
    """Say whether this is a list of integers from 0 on; True and False are none."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _LARGEST for value in values)


def place_tensors(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> dict[str, Entry]:
    """Place tensors one behind the other."""
    entries, at = {}, 0
    for name, shape, dtype in tensors:
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = Entry(dtype, shape, at, end)
        at = end
    return entries


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str] = MODEL) -> bytes:
    """Make what stands before the data: the length and the header, padded so that the data begin at a multiple of 8."""
    names = {dtype: name for name, dtype in CODES.items()}
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, entry in entries.items():
        table[name] = {
            "dtype": names[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
