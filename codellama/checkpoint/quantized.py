"""Checkpoints whose matrices are codes of int8 or int4: a folder with quantized.safetensors and tokenizer.model.

The file's metadata say everything else: format, version, quantize, and params, which is what Meta's params.json holds.
A matrix is stored as the buffers of codellama.linear, `NAME.codes`, `NAME.scales` and, in int4, `NAME.zeros`; the
embedding and the norms are plain numbers under their canonical names. This module knows nothing of ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from codellama.checkpoint.faults import parse_json, some, vocabulary_hint
from codellama.checkpoint.layout import is_matrix, place_for, tensor_shapes
from codellama.checkpoint.pth import Place, read_part
from codellama.checkpoint.safetensors_header import CODES, DTYPES, Header, read_header
from codellama.config import ModelArgs
from codellama.errors import CheckpointError, QuantizationError, shown
from codellama.linear.int4 import unpack_int4
from codellama.linear.int8 import unpack_int8
from codellama.quantization import Quantization
from codellama.tokenizer import Tokenizer

WEIGHTS = "quantized.safetensors"
FORMAT, VERSION = "codellama.quantized", "1"
KEYS = ("format", "version", "quantize", "params")
"""Metadata of the file; all of them are there, and no others."""

Span = tuple[int, int]


class QuantizedCheckpoint:
    """A folder of codes, checked when it is opened: the description, every name, every shape and every dtype.

    Attributes:
        args: the architecture.
        quantization: what the codes are; never None.
    """

    format_name: ClassVar = "quantized"
    looks_like: ClassVar = f"a folder with {WEIGHTS} is what `codellama convert --quantize` writes"
    quantization: Quantization | None

    def __init__(self, folder: Path, tokenizer_path: Path | None = None, rope_theta: float | None = None) -> None:
        """Open a folder; nothing of the weights is read yet.

        Raises:
            CheckpointError: what is missing or wrong, the file, and what was expected.
        """
        self._path = folder / WEIGHTS
        if not self._path.is_file():
            raise CheckpointError(f"{folder} lacks {WEIGHTS}")
        self._tokenizer = Tokenizer(folder / "tokenizer.model" if tokenizer_path is None else tokenizer_path)
        header = read_header(self._path, CODES)
        self._quantization, params = _read_metadata(self._path, header)
        self.quantization = self._quantization
        try:
            self.args = ModelArgs.from_params(params, vocab_size=self._tokenizer.n_words, rope_theta=rope_theta)
        except CheckpointError as error:
            raise CheckpointError(f"{self._path} describes its model as params.json does, but {error}") from error
        if self.args.n_layers > len(header.entries):  # before names are made for a billion layers
            raise CheckpointError(
                f"{self._path} asks for {self.args.n_layers} layers, but it holds {len(header.entries)} tensors"
            )
        self._shapes = tensor_shapes(self.args)
        self._check(header)
        self._places = {
            name: Place(entry.dtype, entry.shape, _strides(entry.shape), header.begin + entry.begin)
            for name, entry in header.entries.items()
        }

    @staticmethod
    def probe(path: Path) -> bool:
        """Say whether a folder holds a file of codes."""
        return (path / WEIGHTS).is_file()

    @staticmethod
    def files(
        path: Path, tokenizer_path: Path | None = None, rope_theta: float | None = None
    ) -> Iterable[tuple[Path, Callable[[], object]]]:
        """List the file of codes, by its header, and the tokenizer."""
        weights, tokenizer = path / WEIGHTS, tokenizer_path or path / "tokenizer.model"
        yield weights, lambda: _read_metadata(weights, read_header(weights, CODES))
        yield tokenizer, partial(Tokenizer, tokenizer)

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
        """Copy a tensor, or its part from start to stop along dim: a matrix as the float32 numbers of its codes."""
        spans = self._spans(name, dim, start, stop)
        if not is_matrix(name):
            return self._copy(name, spans, out)
        rows, (first, last) = spans
        group = self._quantization.group or 1
        low = first - first % group
        codes, scales, *zeros = self._codes(name, rows, (low, last + -last % group))
        if zeros:
            numbers = unpack_int4(codes, scales, zeros[0], torch.float32)
        else:
            numbers = unpack_int8(codes, scales, torch.float32)
        part = numbers[:, first - low : last - low]
        return part if part.shape == numbers.shape else part.clone()

    def codes(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> tuple[Tensor, ...]:
        """Copy codes and scales, in int4 also zeros, of a matrix or its part."""
        rows, columns = self._spans(name, dim, start, stop)
        return self._codes(name, rows, columns)

    def _codes(self, name: str, rows: Span, columns: Span) -> tuple[Tensor, ...]:
        group = self._quantization.group
        if group is None:
            return self._copy(f"{name}.codes", [rows, columns]), self._copy(f"{name}.scales", [rows])
        first, last = columns
        assert first % group == 0, f"{name}: column {first} is not where a group of {group} begins"
        assert last % group == 0, f"{name}: column {last} is not where a group of {group} begins"
        halves, groups = (first // 2, last // 2), (first // group, last // group)
        codes = self._copy(f"{name}.codes", [rows, halves])
        return codes, *(self._copy(f"{name}.{part}", [rows, groups]) for part in ("scales", "zeros"))

    def _copy(self, stored: str, spans: list[Span], out: Tensor | None = None) -> Tensor:
        place = self._places[stored]
        tensor = place_for([high - low for low, high in spans], place.dtype, out)
        read_part(self._path, place, spans, tensor)
        return tensor

    def _spans(self, name: str, dim: int | None, start: int, stop: int | None) -> list[Span]:
        spans = [(0, size) for size in self._shapes[name]]
        if dim is not None:
            spans[dim] = (start, spans[dim][1] if stop is None else stop)
        return spans

    def _check(self, header: Header) -> None:
        """Compare names, shapes and dtypes with what the architecture needs in this quantization."""
        matrices = {name: shape[1] for name, shape in self._shapes.items() if is_matrix(name)}
        try:
            self._quantization.check(matrices)
        except QuantizationError as error:
            raise CheckpointError(f"{self._path} cannot be what its metadata say: {error}") from error
        found, plain = header.entries, dict.fromkeys(self._shapes, torch.float32)
        expected = {name: (shape, kind) for name, shape, kind in stored_tensors(self.args, self._quantization, plain)}
        missing = [name for name in expected if name not in found]
        if missing:
            raise CheckpointError(f"{self._path} lacks {some(missing)}; its metadata ask for {len(expected)} tensors")
        extra = [shown(name) for name in found if name not in expected]
        if extra:
            raise CheckpointError(f"{self._path} holds {some(extra)}, which its metadata have no place for")
        wrong = [
            f"{name} is {list(found[name].shape)}, expected {list(shape)}"
            for name, (shape, _) in expected.items()
            if found[name].shape != shape
        ]
        if wrong:
            hint = vocabulary_hint(wrong, self.args, self._tokenizer.n_words)
            raise CheckpointError(f"{self._path}: {some(wrong)}{hint}")
        kinds = {name: DTYPES.values() if name in self._shapes else [kind] for name, (_, kind) in expected.items()}
        other = [
            f"{name} as {found[name].dtype}" for name, allowed in kinds.items() if found[name].dtype not in allowed
        ]
        if other:
            raise CheckpointError(f"{self._path} holds {some(other)}; {self._quantization} has another dtype there")


def stored_tensors(
    args: ModelArgs, quantization: Quantization, dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """List name, shape and dtype of every tensor of a file, in its order.

    Args:
        args: the architecture.
        quantization: what the matrices are stored as.
        dtypes: of the embedding and the norms, by canonical name.
    """
    for name, shape in tensor_shapes(args).items():
        if not is_matrix(name):
            yield name, shape, dtypes[name]
        elif quantization.group is None:
            yield f"{name}.codes", shape, torch.int8
            yield f"{name}.scales", shape[:1], torch.float32
        else:
            rows, columns = shape
            yield f"{name}.codes", (rows, columns // 2), torch.uint8
            yield f"{name}.scales", (rows, columns // quantization.group), torch.bfloat16
            yield f"{name}.zeros", (rows, columns // quantization.group), torch.bfloat16


def _read_metadata(path: Path, header: Header) -> tuple[Quantization, dict[str, object]]:
    """Say what the codes are, and what a params.json would hold.

    Raises:
        CheckpointError: another format or version, or a description that is damaged.
    """
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} has the format {shown(metadata.get('format'))}; {FORMAT!r} was expected")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has the version {shown(metadata.get('version'))} of its format; {VERSION!r} can be read: use the "
            f"version of this package that wrote it, or convert the original weights again"
        )
    if metadata.keys() != set(KEYS):
        raise CheckpointError(f"{path} has the metadata {shown(sorted(metadata))}; {', '.join(KEYS)} were expected")
    try:
        quantization = Quantization.parse(metadata["quantize"])
    except QuantizationError as error:
        raise CheckpointError(f"{path} cannot be read: its {shown(str(error))}") from error
    assert quantization is not None, "only None is parsed as None"
    params = metadata["params"].encode("utf-8", "surrogatepass")  # half a pair is no UTF-8, which parse_json says
    return quantization, parse_json(params, f"the params of {path}")


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
