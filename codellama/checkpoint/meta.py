"""Checkpoints as Meta releases them: params.json and consolidated.NN.pth, one file per model-parallel rank of its time.

It knows nothing of how many ranks run now: `read` gives any part of a full tensor, whatever the files.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from codellama.checkpoint.faults import read_json, some, vocabulary_hint
from codellama.checkpoint.layout import PlainNumbers, place_for, shard_dim, tensor_shapes
from codellama.checkpoint.pth import Place, read_directory, read_part
from codellama.config import ModelArgs
from codellama.errors import CheckpointError, shown
from codellama.tokenizer import Tokenizer

IGNORED = frozenset({"rope.freqs"})
"""Present in Meta's files and unused: the frequencies follow from rope_theta."""


class MetaCheckpoint(PlainNumbers):
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
        self._shards = [read_directory(path) for path in self._paths]
        for path, shard in zip(self._paths, self._shards, strict=True):
            _check_shard(path, shard, len(self._paths), self.args, tokenizer.n_words)
        self._shapes = tensor_shapes(self.args)
        first = self._shards[0]
        for path, shard in zip(self._paths, self._shards, strict=True):
            other = [
                f"{name} as {shard[name].dtype}" for name in self._shapes if shard[name].dtype != first[name].dtype
            ]
            if other:
                raise CheckpointError(f"{path} holds {some(other)}; {self._paths[0].name} holds it in another dtype")

    @staticmethod
    def probe(path: Path) -> bool:
        """Say whether a folder holds a consolidated file or params.json."""
        return path.is_dir() and ((path / "params.json").is_file() or any(path.glob("consolidated.[0-9][0-9].pth")))

    @staticmethod
    def files(
        path: Path, tokenizer_path: Path | None = None, rope_theta: float | None = None
    ) -> Iterable[tuple[Path, Callable[[], object]]]:
        """List params.json, the tokenizer and the consolidated files; those against what the first two say, if any."""
        tokenizer, params = tokenizer_path or path / "tokenizer.model", path / "params.json"

        def read_args(words: int) -> ModelArgs:
            return ModelArgs.from_params(_read_params(path), vocab_size=words, rope_theta=rope_theta)

        yield params, lambda: read_args(1)  # any size: here it is the other keys that count
        yield tokenizer, lambda: Tokenizer(tokenizer)
        shards = sorted(path.glob("consolidated.[0-9][0-9].pth"))
        try:
            words = Tokenizer(tokenizer).n_words
            args = read_args(words)
        except CheckpointError:  # the two above say it
            yield from ((shard, partial(read_directory, shard)) for shard in shards)
            return
        count = 1 + max((int(shard.name[-6:-4]) for shard in shards), default=0)
        yield from ((shard, partial(_read_checked, shard, count, args, words)) for shard in shards)

    def names(self) -> Iterable[str]:
        """Canonical names of all tensors."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full tensor."""
        return self._shapes[name]

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the folder was opened with."""
        return self._tokenizer

    def read(
        self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Copy a tensor, or its part from start to stop along dim, reading no bytes but those that hold it."""
        spans = [(0, size) for size in self._shapes[name]]
        if dim is not None:
            spans[dim] = (start, spans[dim][1] if stop is None else stop)
        axis, offset = shard_dim(name), 0
        shards = self._shards if axis is not None else self._shards[:1]
        tensor = place_for([high - low for low, high in spans], shards[0][name].dtype, out)
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


def _read_checked(path: Path, count: int, args: ModelArgs, words: int) -> None:
    _check_shard(path, read_directory(path), count, args, words)


def _check_shard(path: Path, shard: dict[str, Place], count: int, args: ModelArgs, words: int) -> None:
    """Compare names and shapes of one of `count` files with the architecture."""
    if args.n_layers > len(shard):  # before names are made for a billion layers
        raise CheckpointError(f"params.json asks for {args.n_layers} layers, but {path} holds {len(shard)} tensors")
    shapes = tensor_shapes(args)
    missing = [name for name in shapes if name not in shard]
    if missing:
        raise CheckpointError(f"{path} lacks {some(missing)}; params.json asks for {len(shapes)} tensors")
    extra = [shown(name) for name in shard if name not in shapes and name not in IGNORED]
    if extra:
        raise CheckpointError(f"{path} holds {some(extra)}, which params.json has no place for")
    wrong, factors = [], set()
    for name, full in shapes.items():
        expected, axis = list(full), shard_dim(name)
        if axis is not None:
            if expected[axis] % count:
                raise CheckpointError(f"{name} of {expected} cannot be spread over the {count} files found")
            expected[axis] //= count
        found = list(shard[name].shape)
        if found != expected:
            wrong.append(f"{name} is {found}, expected {expected}")
        if axis is not None and len(found) == 2 and found[axis] and full[axis] % found[axis] == 0:
            factors.add(full[axis] // found[axis])
    if wrong:
        if len(factors) == 1 and count not in factors:
            hint = f". Such shapes belong to a checkpoint of {factors.pop()} files: are some missing here?"
        else:
            hint = vocabulary_hint(wrong, args, words)
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
