"""Write Meta's layout as a stream: params.json, tokenizer.model, consolidated.NN.pth, checklist.chk.

A tensor arrives as pieces of its rows and leaves for all files at once, so memory holds one piece, whatever the size of
the model or of a file. It knows nothing of where the numbers come from, nor of what a reader makes of them.

A consolidated file is what `torch.save` writes for a dict of tensors: a zip archive, nothing compressed, of one record
per tensor, aligned to 64 bytes so that it can be mapped, and a pickle that says which record is which. Ours has the
pickle behind the records, because it is complete only then. Source: PyTorch's torch/serialization.py and
caffe2/serialize/inline_container.cc.
"""

import hashlib
import io
import json
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, BinaryIO, cast

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from codellama.checkpoint.buffers import memory_of
from codellama.checkpoint.layout import shard_dim, tensor_shapes
from codellama.checkpoint.pth import DTYPES
from codellama.config import BEYOND_PARAMS, ModelArgs
from codellama.errors import CheckpointError, ParallelSizeError

PIECE_BYTES = 32 * 2**20
"""Tensors pass through memory in pieces of about this size."""

ALIGNMENT = 64
_ZIP64_EXTRA, _LOCAL_HEADER = 20, 30

_STORAGES = {dtype: getattr(torch, name) for name, dtype in DTYPES.items()}
"""How a pickle of `torch.save` names a dtype."""


def write_meta(
    folder: Path,
    args: ModelArgs,
    tensors: Iterable[tuple[str, Iterable[Tensor]]],
    n_shards: int,
    tokenizer: bytes,
    dtype: torch.dtype | None = None,
) -> None:
    """Write full tensors as a folder in Meta's layout, with a checklist.chk of md5 sums.

    Args:
        folder: made if it does not exist.
        args: the architecture, as it goes to params.json.
        tensors: (canonical name, the full tensor as pieces along axis 0, in order); `[tensor]` is one piece.
        n_shards: number of consolidated files; must divide every split axis.
        tokenizer: content of tokenizer.model.
        dtype: what is written; None keeps each tensor's own.

    Raises:
        CheckpointError: a tensor of a dtype that the layout has no word for.
    """
    assert not args.beyond_params, "check_shards has refused it"
    folder.mkdir(parents=True, exist_ok=True)
    shapes = tensor_shapes(args)
    sums = {}
    shards = [_Shard(folder / f"consolidated.{index:02d}.pth") for index in range(n_shards)]
    with _closing(shards):
        for name, pieces in tensors:
            _write_tensor(shards, name, shapes.pop(name), pieces, dtype)
        assert not shapes, f"no tensors came for {list(shapes)}"
        for shard in shards:
            sums[shard.path.name] = shard.finish()
    params = {key: value for key, value in asdict(args).items() if value is not None and key not in BEYOND_PARAMS}
    small = {"params.json": (json.dumps(params) + "\n").encode(), "tokenizer.model": tokenizer}
    for name, content in small.items():
        (folder / name).write_bytes(content)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in small.items()} | sums
    (folder / "checklist.chk").write_text("".join(f"{md5}  {name}\n" for name, md5 in sums.items()))


def check_shards(args: ModelArgs, n_shards: int) -> None:
    """Refuse a model that the layout cannot describe, and a number of files that would cut a tensor or a head unevenly.

    Our reader joins cut heads again; Meta's own code, with a process for each file, could not use them.

    Raises:
        CheckpointError: params.json has no words for the architecture.
        ParallelSizeError: naming what does not divide.
    """
    if beyond := args.beyond_params:
        listed = ", ".join(f"{name} {value}" for name, value in beyond.items())
        raise CheckpointError(
            f"Meta's layout describes Llama only; its params.json has no words for {listed}: convert to huggingface"
        )
    if not 1 <= n_shards <= 100:  # names have two digits
        raise ParallelSizeError(f"a checkpoint of {n_shards} files was asked for; 1 to 100 are possible")
    sizes = {"n_heads": args.n_heads, "n_kv_heads": args.kv_heads}
    sizes |= {"dim": args.dim, "hidden_dim": args.hidden_dim, "vocab_size": args.vocab_size}
    odd = [f"{name} {value}" for name, value in sizes.items() if value % n_shards]
    if odd:
        raise ParallelSizeError(
            f"this checkpoint cannot be written as {n_shards} files, which does not divide {', '.join(odd)}: "
            f"choose another model_parallel_size"
        )


def _write_tensor(
    shards: list["_Shard"], name: str, shape: tuple[int, ...], pieces: Iterable[Tensor], dtype: torch.dtype | None
) -> None:
    """Give each file its part of every piece: all of it, some of its rows, or some of its columns."""
    axis, count, row = shard_dim(name), len(shards), 0
    for piece in pieces:
        if row == 0:
            held = list(shape)
            if axis is not None:
                assert shape[axis] % count == 0, f"{name} {shape} over {count} files"
                held[axis] //= count
            for shard in shards:
                shard.begin(name, tuple(held), dtype or piece.dtype)
        end = row + len(piece)
        for index, shard in enumerate(shards):
            if axis == 0:
                share = shape[0] // count
                low, high = max(row, index * share), min(end, (index + 1) * share)
                part = piece[max(0, low - row) : max(0, high - row)]
            else:
                part = piece if axis is None else piece.chunk(count, dim=axis)[index]
            shard.write(part)
        row = end
    assert row == shape[0], f"{name}: {row} rows of {shape[0]}"
    for shard in shards:
        shard.end()


class _Sink:
    """Where a zip archive goes: counts and hashes what passes, so that no file is read again for its md5.

    It cannot seek, so zipfile writes sizes behind a record and never goes back.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.md5 = hashlib.md5()
        self.position = 0
        self.discards = False
        """Set after a failure: zipfile insists on writing the end of an archive that it closes."""

    def write(self, data: bytes | bytearray | memoryview) -> int:
        if not self.discards:
            self._file.write(data)
            self.md5.update(data)
        self.position += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


class _Shard:
    """One consolidated file while it is written, record by record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._sink = _Sink(self._file)
        self._archive = zipfile.ZipFile(cast(IO[bytes], self._sink), "w")  # of a file it uses write and flush alone
        self._state: dict[str, _Placed] = {}
        self._record: IO[bytes] | None = None

    def begin(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if dtype not in _STORAGES:
            raise CheckpointError(f"{name} is {dtype}, which Meta's layout has no word for: pass dtype")
        placed = _Placed(str(len(self._state)), dtype, shape)
        self._state[name] = placed
        self._dtype = dtype
        self._record = self._open(f"archive/data/{placed.key}")

    def write(self, part: Tensor) -> None:
        assert self._record is not None
        rows = max(1, PIECE_BYTES // max(1, part[:1].numel() * self._dtype.itemsize))
        for row in range(0, len(part), rows):
            piece = part[row : row + rows].to(self._dtype).contiguous()
            self._record.write(memory_of(piece))

    def end(self) -> None:
        assert self._record is not None
        self._record.close()
        self._record = None

    def finish(self) -> str:
        """Write the pickle and the end of the archive; returns the md5 of the whole file."""
        for name, content in {
            "data.pkl": _pickled(self._state),
            "byteorder": sys.byteorder.encode(),
            "version": b"3\n",
        }.items():
            with self._open(f"archive/{name}") as record:
                record.write(content)
        self._archive.close()
        return self._sink.md5.hexdigest()

    def _open(self, name: str) -> IO[bytes]:
        info = zipfile.ZipInfo(name)
        begin = self._sink.position + _LOCAL_HEADER + len(name) + _ZIP64_EXTRA + 4
        padding = -begin % ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)  # as PyTorch names its own padding
        record: IO[bytes] = self._archive.open(info, "w", force_zip64=True)
        info.extra = b""  # the directory at the end needs none
        return record

    def close(self, failed: bool) -> None:
        self._sink.discards = failed
        if self._record is not None:
            self._record.close()
        self._archive.close()
        self._file.close()


@contextmanager
def _closing(shards: list[_Shard]) -> Iterator[None]:
    failed = True
    try:
        yield
        failed = False
    finally:
        for shard in shards:
            shard.close(failed)


class _Placed:
    """A tensor whose numbers are in a record of their own; pickled as `torch.save` pickles a tensor."""

    def __init__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.key, self.dtype, self.shape = key, dtype, shape
        self.stride = torch.empty(shape, device="meta").stride()

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_tensor_v2, (_Storage(self), 0, self.shape, self.stride, False, OrderedDict())


class _Storage:
    """The record of a tensor, as a pickle refers to it."""

    def __init__(self, placed: _Placed) -> None:
        numel = torch.Size(placed.shape).numel()
        self.reference = ("storage", _STORAGES[placed.dtype], placed.key, "cpu", numel)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.reference if isinstance(obj, _Storage) else None


def _pickled(state: dict[str, _Placed]) -> bytes:
    content = io.BytesIO()
    _Pickler(content, protocol=2).dump(state)
    return content.getvalue()
