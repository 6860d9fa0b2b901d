"""The key/value cache: preallocated tensors in which a row is a request slot.

It knows nothing of requests, of which rows are in use, or of what their tokens mean: the scheduler keeps those books.

Shapes: B rows of this view, T new tokens per row, S cache length of this view, K key/value heads here, D head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from codellama.config import ModelArgs

_EVERYTHING = slice(None)


@dataclass(frozen=True)
class Slots:
    """Where the new tokens of one forward go: found once, used by every layer.

    Attributes:
        spans: row, first position and end of the real tokens of each row that has any. None where only the device knows
            (`index` has one entry for each row then).
        together: all rows write the same positions, so one slice holds them.
        index: rows and positions, int64 `[W]` each, for one token in each of several rows.
        active: which rows write, bool `[B, 1, 1]`, where only the device knows.
    """

    spans: tuple[tuple[int, int, int], ...] | None
    together: bool = False
    index: tuple[Tensor, Tensor] | None = None
    active: Tensor | None = None

    @classmethod
    def find(cls, positions: Tensor) -> "Slots":
        """Read the positions `[B, T]` on the host. They rise by one along a row, then -1 may follow."""
        width = positions.shape[1]
        firsts = positions[:, 0].tolist()
        counts = [int(first >= 0) for first in firsts] if width == 1 else (positions >= 0).sum(dim=1).tolist()
        spans = tuple(
            (row, first, first + count) for row, (first, count) in enumerate(zip(firsts, counts, strict=True)) if count
        )
        together = len(spans) == len(firsts) and len({span[1:] for span in spans}) == 1
        index = None
        if width == 1 and not together:
            rows, starts = [row for row, _, _ in spans], [start for _, start, _ in spans]
            index = torch.tensor(rows, device=positions.device), torch.tensor(starts, device=positions.device)
        return cls(spans, together, index)

    @classmethod
    def on_device(cls, positions: Tensor) -> "Slots":
        """Take positions `[B, 1]` as they are, so that nothing waits for the device and a graph can be captured."""
        rows = torch.arange(positions.shape[0], device=positions.device)
        return cls(None, False, (rows, positions[:, 0].clamp(min=0)), (positions >= 0)[:, :, None])


class KVCache:
    """Preallocated keys and values, one pair of tensors per layer.

    Layout: `[rows, K, max_seq_len, D]`. With the heads before the positions, decode attention reads each head's keys as
    one contiguous block.

    An int8 cache holds codes, and beside them a float32 scale per position and head: a number is code · scale. Each
    vector is rounded by itself, so what a row holds depends on that row alone.

    A free row keeps its last content until it is given away. An inactive row inside a slice writes nothing.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], scales: list[tuple[Tensor, Tensor]] | None = None
    ) -> None:
        """Wrap existing tensors; use `allocate` for new ones.

        Args:
            keys: one for each layer, and values alike.
            scales: of keys and of values, `[rows, K, max_seq_len, 1]` each, where these are codes.
        """
        self.keys = keys
        self.values = values
        self.scales = scales

    @classmethod
    def allocate(
        cls,
        args: ModelArgs,
        *,
        rows: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        model_parallel_size: int = 1,
    ) -> "KVCache":
        """Allocate a rank's cache, `2 · n_layers · rows · K · max_seq_len · D` elements, all zero."""
        n_local_kv_heads = max(1, args.kv_heads // model_parallel_size)
        shape = (rows, n_local_kv_heads, max_seq_len, args.head_dim)
        keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(args.n_layers)]
        values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(args.n_layers)]
        if dtype != torch.int8:
            return cls(keys, values)
        shape = (*shape[:-1], 1)
        scales = [(torch.zeros(shape, device=device), torch.zeros(shape, device=device)) for _ in range(args.n_layers)]
        return cls(keys, values, scales)

    @property
    def n_rows(self) -> int:
        """Rows of this view."""
        return self.keys[0].shape[0]

    def rows(self, start: int, stop: int) -> "KVCache":
        """Rows start to stop as a view: a slice, since an index tensor would copy the cache in every layer."""
        return self._view((slice(start, stop),))

    def first(self, length: int) -> "KVCache":
        """The first `length` positions of every row as a view, so that a step reads only the part in use."""
        return self._view((_EVERYTHING, _EVERYTHING, slice(length)))

    def write_(self, layer: int, slots: Slots, key: Tensor, value: Tensor) -> None:
        """Write the new keys and values of a layer, `[B, T, K, D]` each, at their positions."""
        pairs = [(self.keys[layer], key), (self.values[layer], value)]
        if self.scales is not None:
            (key, key_scale), (value, value_scale) = _encode(key), _encode(value)
            key_scales, value_scales = self.scales[layer]
            pairs = [
                (self.keys[layer], key), (key_scales, key_scale),
                (self.values[layer], value), (value_scales, value_scale),
            ]  # fmt: skip
        for held, new in pairs:
            _write_(held, slots, new)

    def read_keys(
        self, layer: int, rows: slice, heads: slice, length: slice, dtype: torch.dtype, into: Tensor | None = None
    ) -> Tensor:
        """Keys of a part of a layer, `[rows, heads, positions, D]`, in this dtype.

        What is held in this dtype is a view; other numbers are converted.

        Args:
            layer: index of the layer.
            rows: of this view.
            heads: key/value heads.
            length: positions.
            dtype: of the result.
            into: at least as many elements of this dtype, where converted numbers go; None is a new tensor.
        """
        scales = None if self.scales is None else self.scales[layer][0]
        return _decode(self.keys[layer], scales, (rows, heads, length), dtype, into)

    def read_values(
        self, layer: int, rows: slice, heads: slice, length: slice, dtype: torch.dtype, into: Tensor | None = None
    ) -> Tensor:
        """Values of a part of a layer; see `read_keys`."""
        scales = None if self.scales is None else self.scales[layer][1]
        return _decode(self.values[layer], scales, (rows, heads, length), dtype, into)

    def copy_row_(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Copy the positions from start up to length of one row to another one."""
        assert source != target, "a row is not copied to itself"
        for tensor in self._tensors():
            tensor[target, :, start:length] = tensor[source, :, start:length]

    def zero_(self) -> None:
        """Forget everything: masked NaN would still spread, since 0 · NaN is NaN."""
        for tensor in self._tensors():
            tensor.zero_()

    def free(self) -> None:
        """Let go of the tensors."""
        self.keys, self.values, self.scales = [], [], None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.keys
        yield from self.values
        for pair in self.scales or ():
            yield from pair

    def _view(self, where: tuple[slice, ...]) -> "KVCache":
        scales = None if self.scales is None else [(k[where], v[where]) for k, v in self.scales]
        return KVCache([k[where] for k in self.keys], [v[where] for v in self.values], scales)


def _encode(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Round each vector to int8 codes and a scale: the largest magnitude is 127, and zeros have scale 0."""
    numbers = numbers.float()
    scale = numbers.abs().amax(dim=-1, keepdim=True) / 127
    codes = (numbers / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    return codes, scale


def _decode(
    held: Tensor, scales: Tensor | None, where: tuple[slice, slice, slice], dtype: torch.dtype, into: Tensor | None
) -> Tensor:
    """What `_encode` rounded, or what is held as it is."""
    part = held[where]
    if part.dtype == dtype:
        return part
    wide = torch.empty(part.shape, dtype=dtype, device=part.device) if into is None else into[: part.numel()]
    wide = wide.view(part.shape).copy_(part)
    return wide if scales is None else wide.mul_(scales[where])


def _write_(held: Tensor, slots: Slots, new: Tensor) -> None:
    """Write `[B, T, K, ·]` to `[B, K, S, ·]`."""
    if slots.active is not None:
        assert slots.index is not None, "the device knows where"
        rows, positions = slots.index
        held[rows, :, positions] = torch.where(slots.active, new[:, 0], held[rows, :, positions])
        return
    assert slots.spans is not None, "the host knows where"
    if slots.together:
        _, start, stop = slots.spans[0]
        held[:, :, start:stop] = new[:, : stop - start].transpose(1, 2)
    elif slots.index is not None:
        rows, positions = slots.index
        held[rows, :, positions] = new[rows, 0]
    else:
        for row, start, stop in slots.spans:
            held[row, :, start:stop] = new[row, : stop - start].transpose(0, 1)
