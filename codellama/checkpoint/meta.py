"""Checkpoints as Meta releases them: params.json and consolidated.NN.pth, one file per model-parallel rank of its time.

It knows nothing of how many ranks run now: `read` gives any part of a full tensor, whatever the files.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from codellama.checkpoint.faults import some
from codellama.checkpoint.layout import shard_dim, tensor_shapes
from codellama.config import ModelArgs
from codellama.errors import CheckpointError
from codellama.tokenizer import Tokenizer

REOPEN_BYTES = 256 * 2**20
"""After so many bytes the files are mapped anew, which gives back the pages that were read."""

IGNORED = frozenset({"rope.freqs"})
"""Present in Meta's files and unused: the frequencies follow from rope_theta."""


class MetaCheckpoint:
    """A folder in Meta's layout, checked when it is opened: every name and every shape in every file."""

    format_name: ClassVar = "meta"
    looks_like: ClassVar = "a folder with params.json and consolidated.00.pth is Meta's layout"

    def __init__(self, folder: Path, tokenizer_path: Path | None = None, rope_theta: float | None = None) -> None:
        """Open a folder; nothing of the weights is read yet.

        Raises:
            CheckpointError: what is missing or wrong, the file, and what was expected.
        """
        self._paths = find_shards(folder)
        tokenizer = Tokenizer(folder / "tokenizer.model" if tokenizer_path is None else tokenizer_path)
        self._tokenizer = tokenizer
        params = _read_params(folder)
        self.args = ModelArgs.from_params(params, vocab_size=tokenizer.n_words, rope_theta=rope_theta)
        self._shapes = tensor_shapes(self.args)
        self._shards = [_open_shard(path) for path in self._paths]
        self._unreturned = 0
        for path, shard in zip(self._paths, self._shards, strict=True):
            self._check(path, shard)

    @staticmethod
    def probe(path: Path) -> bool:
        """Say whether a folder holds a consolidated file or params.json."""
        return path.is_dir() and ((path / "params.json").is_file() or any(path.glob("consolidated.[0-9][0-9].pth")))

    def names(self) -> Iterable[str]:
        """Canonical names of all tensors."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full tensor."""
        return self._shapes[name]

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the folder was opened with."""
        return self._tokenizer

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Copy a tensor, or its part from start to stop along dim, touching only the files and pages that hold it."""
        parts = [shard[name] for shard in self._shards]
        axis = shard_dim(name)
        if axis is None:
            parts = parts[:1]
        if dim is not None:
            stop = self._shapes[name][dim] if stop is None else stop
            if dim == axis:
                parts = _overlapping(parts, dim, start, stop)
            else:
                parts = [part.narrow(dim, start, stop - start) for part in parts]
        tensor = parts[0].clone() if len(parts) == 1 else torch.cat(parts, dim=axis or 0)
        del parts
        self._unreturned += tensor.nbytes
        if self._unreturned > REOPEN_BYTES:
            self._shards = [_open_shard(path) for path in self._paths]
            self._unreturned = 0
        return tensor

    def _check(self, path: Path, shard: dict[str, Tensor]) -> None:
        missing = [name for name in self._shapes if name not in shard]
        if missing:
            raise CheckpointError(f"{path} lacks {some(missing)}; params.json asks for {len(self._shapes)} tensors")
        extra = [name for name in shard if name not in self._shapes and name not in IGNORED]
        if extra:
            raise CheckpointError(f"{path} holds {some(extra)}, which params.json has no place for")
        count = len(self._paths)
        wrong, factors = [], set()
        for name, full in self._shapes.items():
            expected, axis = list(full), shard_dim(name)
            if axis is not None:
                if expected[axis] % count:
                    raise CheckpointError(f"{name} of {expected} cannot be spread over the {count} files found")
                expected[axis] //= count
            found = list(shard[name].shape)
            if found != expected:
                wrong.append(f"{name} is {found}, expected {expected}")
            if axis is not None and found[axis : axis + 1] and full[axis] % found[axis] == 0:
                factors.add(full[axis] // found[axis])
        if wrong:
            hint = ""
            if len(factors) == 1 and count not in factors:
                hint = f". Such shapes belong to a checkpoint of {factors.pop()} files: are some missing here?"
            elif any(name.startswith(("tok_embeddings", "output")) for name in wrong):
                hint = (
                    f". The vocabulary has {self.args.vocab_size} pieces (tokenizer: {self._tokenizer.n_words}): "
                    f"is this the tokenizer.model that came with these weights?"
                )
            raise CheckpointError(f"{path}, one of {count} files: {some(wrong)}{hint}")


def write_meta(
    folder: Path, args: ModelArgs, tensors: Iterable[tuple[str, Tensor]], n_shards: int, tokenizer: bytes
) -> None:
    """Write full tensors as a folder in Meta's layout, with a checklist.chk of md5 sums.

    Args:
        folder: made if it does not exist.
        args: the architecture, as it goes to params.json.
        tensors: (canonical name, full tensor).
        n_shards: number of consolidated files; must divide every split axis.
        tokenizer: content of tokenizer.model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{} for _ in range(n_shards)]
    for name, tensor in tensors:
        axis = shard_dim(name)
        parts = [tensor] * n_shards if axis is None else tensor.chunk(n_shards, dim=axis)
        assert len(parts) == n_shards, f"{name} {tuple(tensor.shape)} over {n_shards} files"
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()  # a view would save the whole storage
    for index, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{index:02d}.pth")
    params = {key: value for key, value in asdict(args).items() if value is not None}
    (folder / "params.json").write_text(json.dumps(params) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    names = ["params.json", "tokenizer.model", *(f"consolidated.{index:02d}.pth" for index in range(n_shards))]
    lines = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "checklist.chk").write_text("".join(lines))


def find_shards(folder: Path) -> list[Path]:
    """List the files of the weights in order.

    Raises:
        CheckpointError: there are none, or one between two others is missing.
    """
    numbered = {}
    for path in folder.iterdir():
        match = re.fullmatch(r"consolidated\.(\d\d)\.pth", path.name)
        if match and path.is_file():
            numbered[int(match[1])] = path
    if not numbered:
        raise CheckpointError(f"{folder} holds no consolidated.00.pth: it is not a checkpoint in Meta's layout")
    absent = [f"consolidated.{i:02d}.pth" for i in range(max(numbered) + 1) if i not in numbered]
    if absent:
        raise CheckpointError(f"{folder} lacks {some(absent)}: download what is missing (see download.sh)")
    return [numbered[index] for index in sorted(numbered)]


def _read_params(folder: Path) -> dict[str, object]:
    path = folder / "params.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks params.json")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON or bad UTF-8
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(params, dict):
        raise CheckpointError(f"{path} holds a {type(params).__name__}; a JSON object was expected")
    return params


def _open_shard(path: Path) -> dict[str, Tensor]:
    """Map one file. Only tensors are unpickled: a file that wants to run code is refused."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is an HTML page, not weights: the download saved a login or error page")
    if not head.startswith(b"PK"):
        raise CheckpointError(f"{path} ({path.stat().st_size} bytes) is not a PyTorch zip file; it begins {head[:8]!r}")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors; loading it could run code of its author, so it is refused"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read, it is probably truncated: "
            f"compare its md5 with checklist.chk and download it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} is not a dict of tensors with names")
    for name, tensor in state.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_floating_point()
        if not plain:
            kind = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(
                f"{path} holds {name} as {kind}; a dense tensor of floating-point numbers was expected"
            )
    return state


def _overlapping(parts: list[Tensor], dim: int, start: int, stop: int) -> list[Tensor]:
    """Cut [start, stop) along dim out of the parts' concatenation."""
    cut, offset = [], 0
    for part in parts:
        extent = part.shape[dim]
        low, high = max(start, offset), min(stop, offset + extent)
        if low < high:
            cut.append(part.narrow(dim, low - offset, high - low))
        offset += extent
    return cut
