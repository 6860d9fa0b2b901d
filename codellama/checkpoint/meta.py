"""Checkpoints as Meta releases them: params.json and consolidated.NN.pth, one file per model-parallel rank of its time.

It knows nothing of how many ranks run now: `read` gives any part of a full tensor, whatever the files.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from codellama.checkpoint.faults import read_json, some, vocabulary_hint
from codellama.checkpoint.layout import shard_dim, tensor_shapes
from codellama.checkpoint.pth import Place, read_directory, read_part
from codellama.config import ModelArgs
from codellama.errors import CheckpointError
from codellama.tokenizer import Tokenizer

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
        self._shards = [read_directory(path) for path in self._paths]
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
        """Copy a tensor, or its part from start to stop along dim, reading no bytes but those that hold it."""
        spans = [(0, size) for size in self._shapes[name]]
        if dim is not None:
            spans[dim] = (start, spans[dim][1] if stop is None else stop)
        axis, offset = shard_dim(name), 0
        shards = self._shards if axis is not None else self._shards[:1]
        tensor = torch.empty([high - low for low, high in spans], dtype=shards[0][name].dtype)
        for path, shard in zip(self._paths, shards, strict=False):
            place = shard[name]
            if axis is None:
                read_part(path, place, spans, tensor)
                continue
            wanted, extent = spans[axis], place.shape[axis]
            low, high = max(wanted[0], offset), min(wanted[1], offset + extent)
            if low < high:
                part = [*spans[:axis], (low - offset, high - offset), *spans[axis + 1 :]]
                read_part(path, place, part, tensor.narrow(axis, low - wanted[0], high - low))
            offset += extent
        return tensor

    def _check(self, path: Path, shard: dict[str, Place]) -> None:
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
            found, kinds = list(shard[name].shape), (shard[name].dtype, self._shards[0][name].dtype)
            if kinds[0] != kinds[1]:
                raise CheckpointError(f"{path} holds {name} as {kinds[0]}, but {self._paths[0]} as {kinds[1]}")
            if found != expected:
                wrong.append(f"{name} is {found}, expected {expected}")
            if axis is not None and found[axis : axis + 1] and full[axis] % found[axis] == 0:
                factors.add(full[axis] // found[axis])
        if wrong:
            if len(factors) == 1 and count not in factors:
                hint = f". Such shapes belong to a checkpoint of {factors.pop()} files: are some missing here?"
            else:
                hint = vocabulary_hint(wrong, self.args, self._tokenizer.n_words)
            raise CheckpointError(f"{path}, one of {count} files: {some(wrong)}{hint}")


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
    return read_json(path)
