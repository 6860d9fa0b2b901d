"""From an open checkpoint into a model: this rank's part of each tensor, read ahead, rounded, and put into its matrix.

It knows nothing of formats, and nothing of how a matrix holds its numbers.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codellama.checkpoint.layout import EMBEDDING, OUTPUT, Checkpoint, rank_span, row_pieces, shard_dim, stored_name
from codellama.device import compute_dtype
from codellama.errors import CheckpointError
from codellama.layers import Held
from codellama.linear import Dense, Int4, Int8, Matrix, make_matrix
from codellama.model import Transformer
from codellama.parallel import Parallel
from codellama.quantization import Quantization

READERS = 2
"""Threads that read: most of the time goes into fresh pages of memory, which the system prepares for each by itself."""

PIECE_BYTES = 32 * 2**20
"""Rows that go on in other ranks are read whole in pieces of this size, to find their largest numbers."""


@dataclass(frozen=True)
class _Part:
    """What was read of a tensor for this rank.

    Attributes:
        tensors: the numbers alone; or codes, scales, and in int4 zeros.
        largest: magnitude of the largest number of each row, where int8 is made of numbers that go on in other ranks.
    """

    tensors: tuple[Tensor, ...]
    largest: Tensor | None = None


@dataclass(eq=False)
class _Group:
    """Layers that share a matrix, which is made when the first of their tensors is read."""

    layers: tuple[Held, ...]
    missing: int
    matrix: Matrix | None = None


class Loading:
    """Fills one model from one checkpoint; the arguments are those of `load_model`.

    Attributes:
        names: the weights to load, in order. A tied output is none where one matrix can be the embedding, too.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Transformer,
        parallel: Parallel,
        device: torch.device,
        dtype: torch.dtype,
        quantization: Quantization | None,
    ) -> None:
        """Find where each tensor goes; nothing is read yet."""
        self._checkpoint = checkpoint
        self._model = model
        self._device = device
        self._dtype = dtype
        self._compute = compute_dtype(dtype, device)
        self._quantization = quantization
        args = checkpoint.args
        plain = quantization is None and dtype == self._compute
        one = args.tied_output and parallel.size == 1 and plain  # matrix, which is the embedding and the output
        self.names = [*checkpoint.names(), *([OUTPUT] if args.tied_output and not one else [])]
        self._spans = {name: rank_span(name, args, parallel.rank, parallel.size) for name in self.names}
        names = {id(module): name for name, module in model.named_modules()}
        self._homes: dict[str, tuple[_Group, int]] = {}
        for layers in model.matrices():
            group = _Group(layers, len(layers))
            for index, layer in enumerate(layers):
                self._homes[f"{names[id(layer)]}.weight"] = group, index
        if one:
            self._homes[EMBEDDING] = self._homes.pop(OUTPUT)

    def run(self, names: list[str]) -> Iterator[str]:
        """Load these weights in this order, some read at once; yield each name when it is in its place."""
        with ThreadPoolExecutor(READERS) as pool:
            pending: deque[tuple[str, Tensor | None, Future[_Part]]] = deque()
            for name in names:
                room = self._room(name)
                pending.append((name, room, pool.submit(self._read, name, room)))
                if len(pending) > READERS:
                    yield self._settle(*pending.popleft())
            while pending:
                yield self._settle(*pending.popleft())

    def _room(self, name: str) -> Tensor | None:
        """Make the matrix that a tensor belongs to, and show where its numbers may be read to."""
        if name not in self._homes:
            return None
        group, index = self._homes[name]
        layers = group.layers
        if group.matrix is None:
            rows = sum(layer.local_shape[0] for layer in layers)
            columns = layers[0].local_shape[1]
            group.matrix = make_matrix(rows, columns, self._dtype, self._compute, self._device, self._quantization)
            first = 0
            for layer in layers:
                layer.hold(group.matrix, first)
                first += layer.local_shape[0]
        if not isinstance(group.matrix, Dense):
            return None
        room = layers[index].dense()
        self._model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(room, requires_grad=False)
        return room

    def _read(self, name: str, room: Tensor | None) -> _Part:
        """Read this rank's part; for int8 also the largest number of each row, where rows go on in other ranks."""
        span, stored = self._spans[name], stored_name(name, self._checkpoint.args)
        if self._checkpoint.quantization is not None and name in self._homes:
            return _Part(self._checkpoint.codes(stored, *(span or ())))
        goes_on = span is not None and shard_dim(name) == 1 and name in self._homes
        if span is None or not goes_on or self._quantization is None or self._quantization.group is not None:
            dim, start, stop = span or (None, 0, None)
            return _Part((self._checkpoint.read(stored, dim, start, stop, out=room),))
        parts, largest = [], []
        for piece in row_pieces(self._checkpoint, stored, PIECE_BYTES):
            largest.append(piece.abs().amax(dim=1))
            parts.append(piece[:, span[1] : span[2]].clone())
        return _Part((torch.cat(parts),), torch.cat(largest))

    def _settle(self, name: str, room: Tensor | None, future: Future[_Part]) -> str:
        part = future.result()
        tensor, *rest = part.tensors
        if name not in self._homes:
            kind = self._compute if shard_dim(name) is None else self._dtype
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(self._rounded(name, tensor, kind).to(self._device), requires_grad=False)
            assert parameter.shape == self._model.get_parameter(name).shape, f"{name}: {tuple(parameter.shape)}"
            setattr(self._model.get_submodule(owner), leaf, parameter)
            return name
        group, index = self._homes[name]
        layer, matrix = group.layers[index], group.matrix
        assert matrix is not None, "a matrix is made before its rows are read"
        if rest:
            assert isinstance(matrix, Int4 | Int8), f"{name}: {type(matrix).__name__} holds no codes"
            matrix.put_codes_(layer.first, *part.tensors)
        elif tensor is not room:
            assert tensor.shape == layer.local_shape, f"{name}: {tuple(tensor.shape)} for {layer.local_shape}"
            rounded = tensor if self._quantization else self._rounded(name, tensor, self._dtype)
            matrix.put_(layer.first, rounded, part.largest)
        group.missing -= 1
        if not group.missing:
            matrix.finish_()
        return name

    def _rounded(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert to a dtype; float16 is the one that may be too small."""
        rounded = tensor.to(dtype)
        narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
        if narrower and not torch.equal(rounded.isfinite(), tensor.isfinite()):
            raise CheckpointError(
                f"{name} holds {tensor.abs().max().item():g}, too large for {dtype}, which ends at "
                f"{torch.finfo(dtype).max:g}: choose another dtype"
            )
        return rounded
