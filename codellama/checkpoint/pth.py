"""The directory of a .pth file: which tensor lies where. Nothing of the file is run, and no weights are read.

Such a file is a zip archive, nothing compressed, of one record per storage, and a pickle that says which tensor is
which part of which record. A pickle is a program: of its operations this module allows those that build containers,
and of its functions those that name a tensor, which it replaces by its own. It knows nothing of models. Source:
PyTorch's torch/serialization.py and torch/_utils.py.
"""

import io
import pickle
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codellama.checkpoint.buffers import fill, memory_of, rows_of
from codellama.checkpoint.faults import refuse_page
from codellama.errors import CheckpointError, shown

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}
"""The dtypes that are read and written, by the names that the format gives them."""

_PICKLE_BYTES = 10 * 2**20  # the 723 tensors of the 70B model take 0.1 MB
_LOCAL_HEADER = 30

_OPERATIONS = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND",
    "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET",
    "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID",
})  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A tensor in a file; strides are in elements, begin is the byte of its first one."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    begin: int


class _Unsafe(pickle.UnpicklingError):
    """A pickle asks for something that is neither a tensor nor a container."""


class _Bad(Exception):
    """An archive or pickle contradicts itself."""


def read_directory(path: Path) -> dict[str, Place]:
    """Say where each tensor of a file lies.

    Raises:
        CheckpointError: another kind of file, a damaged or truncated one, or one that holds more than tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
        refuse_page(path, head)
        if not head.startswith(b"PK"):
            raise CheckpointError(f"{path} ({size} bytes) is not a PyTorch zip file; it begins {head[:8]!r}")
        try:
            with zipfile.ZipFile(file) as archive:
                records = _records(archive)
                content = _small(archive, records, "data.pkl", _PICKLE_BYTES)
                if "byteorder" in records and _small(archive, records, "byteorder", 16) != sys.byteorder.encode():
                    raise _Bad("the bytes of its numbers are in the other order")
            state = _unpickle(content)
            named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
            if not named:
                raise CheckpointError(f"{path} is not a dict of tensors with names")
            return {name: _place(path, file, name, value, records, size) for name, value in state.items()}
        except _Unsafe as error:
            raise CheckpointError(
                f"{path} holds more than tensors ({error}); loading it could run code of its author, so it is refused"
            ) from error
        except CheckpointError:
            raise
        except Exception as error:  # a damaged archive fails in zipfile, pickle or here in more ways than can be listed
            raise CheckpointError(
                f"{path} ({size} bytes) cannot be read, it is probably truncated: {error}. "
                f"Compare its md5 with checklist.chk and download it again"
            ) from error


def read_part(path: Path, place: Place, spans: list[tuple[int, int]], target: Tensor) -> None:
    """Copy a part of a tensor out of a file, reading no more than it, straight into memory.

    Args:
        path: the file that `place` belongs to.
        place: the tensor.
        spans: first and last + 1 of each axis.
        target: a tensor of that shape and dtype on the CPU, whose rows are contiguous.

    Raises:
        CheckpointError: the file has become shorter.
    """
    plain = torch.empty(place.shape, device="meta").stride() == place.stride
    with path.open("rb", buffering=0) as file:
        if 0 in target.shape:
            whole = True
        elif not plain:
            last = sum((count - 1) * step for count, step in zip(place.shape, place.stride, strict=True))
            flat = torch.empty(last + 1, dtype=place.dtype)
            whole = fill(memory_of(flat), file, place.begin)
            target.copy_(flat.as_strided(place.shape, place.stride)[tuple(slice(*span) for span in spans)])
        else:
            first = sum(low * step for (low, _), step in zip(spans, place.stride, strict=True))
            begin = place.begin + first * place.dtype.itemsize
            if target.shape[1:] == place.shape[1:] and target.is_contiguous():
                whole = fill(memory_of(target), file, begin)
            else:
                row = place.stride[0] * place.dtype.itemsize
                whole = all(fill(memory, file, begin + at * row) for at, memory in enumerate(rows_of(target)))
    if not whole:
        raise CheckpointError(f"{path} has become shorter since it was opened: is it still being downloaded?")


def _records(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Records by their names without the folder that all are in."""
    return {info.filename.partition("/")[2]: info for info in archive.infolist()}


def _small(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], name: str, limit: int) -> bytes:
    if name not in records:
        raise _Bad(f"it has no {name}")
    info = records[name]
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
        raise _Bad(f"its {name} is compressed, or larger than {limit} bytes")
    return archive.read(info)


@dataclass(frozen=True)
class _Storage:
    """A record, as a pickle refers to it; numel elements of the dtype of this name."""

    kind: str
    key: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    """A part of a record, as a pickle describes it; nothing of it is checked."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any


@dataclass(frozen=True)
class _Other:
    """A tensor that is not dense, or of another kind."""

    kind: str


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, stride)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Builds containers and descriptions of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name.startswith("_rebuild_"):
            return _REBUILDERS.get(name, _other(name))
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        if (module, name) in (("torch.serialization", "_get_layout"), ("torch", "Size")):
            return _other(name)
        if module == "torch" and hasattr(torch, name) and isinstance(getattr(torch, name), torch.dtype | torch.layout):
            return name
        raise _Unsafe(f"it asks for {shown(f'{module}.{name}')}")

    def persistent_load(self, reference: Any) -> _Storage:
        word, kind, key, _, numel = reference
        if word != "storage":
            raise _Bad(f"it refers to a {shown(word)}")
        return _Storage(kind, key, numel)


_REBUILDERS: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_parameter": _rebuild_parameter,
}


def _other(name: str) -> Callable[..., _Other]:
    return lambda *_: _Other(name)


def _unpickle(content: bytes) -> Any:
    """Look at every operation before the first is done, since some reserve memory at a word of the file."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name not in _OPERATIONS:
            raise _Unsafe(f"its pickle uses {operation.name}")
        if operation.name == "LONG_BINPUT" and isinstance(argument, int) and argument > len(content):
            raise _Bad("its pickle numbers more objects than it has")
    return _Unpickler(io.BytesIO(content)).load()


def _place(
    path: Path, file: io.BufferedReader, name: str, value: Any, records: dict[str, zipfile.ZipInfo], size: int
) -> Place:
    """Check a tensor against the record that it is said to lie in, and the record against the file."""
    kind = type(value).__name__
    if isinstance(value, _Other):
        kind = value.kind.removeprefix("_rebuild_")
    if isinstance(value, _Tensor) and isinstance(value.storage, _Storage):
        kind = str(value.storage.kind)
    if kind not in DTYPES:
        raise CheckpointError(
            f"{path} holds {shown(name)} as {shown(kind)}; a dense tensor of floating-point numbers was expected"
        )
    dtype, numel = DTYPES[kind], value.storage.numel
    shape, stride = tuple(value.shape), tuple(value.stride)
    sizes = (numel, value.offset, *shape, *stride)
    if len(shape) != len(stride) or not all(type(number) is int and 0 <= number < 2**48 for number in sizes):
        raise _Bad(f"{shown(name)} has no proper shape")
    last = value.offset + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
    empty = 0 in shape
    info = records.get(f"data/{value.storage.key}")
    if info is None:
        raise _Bad(f"it has no record for {shown(name)}")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size < numel * dtype.itemsize:
        raise _Bad(f"the record of {shown(name)} is compressed or too short")
    if not empty and last >= numel:
        raise _Bad(f"{shown(name)} is larger than its record")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    begin = info.header_offset + _LOCAL_HEADER + lengths
    if header[:4] != b"PK\x03\x04" or begin + info.file_size > size:
        raise _Bad(f"the record of {shown(name)} is not where the archive says")
    return Place(dtype, shape, stride, begin + value.offset * dtype.itemsize)
