"""The key/value cache: preallocated tensors in which a row is a request slot.

It knows nothing of requests, of which rows are in use, or of what their tokens mean: the scheduler keeps those books.

Shapes: B rows of this view, T new tokens per row, S cache length of this view, K key/value heads here, D head_dim.
"""

import torch
from torch import Tensor

from codellama.config import ModelArgs


class KVCache:
    """Preallocated keys and values, one pair of tensors per layer.

    Layout: `[rows, K, max_seq_len, D]`. With the heads before the positions, decode attention reads each head's keys as
    one contiguous block: at 4,096 positions a little faster on a CPU than positions first (`python -m
    benchmarks.layout`).

    A free row keeps its last content until it is given away. An inactive row inside a slice writes nothing.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], writing: Tensor | None = None) -> None:
        """Wrap existing tensors; use `allocate` for new ones.

        Args:
            keys: one for each layer, and values alike.
            writing: the rows that `update_` writes to; None is all of them.
        """
        self.keys = keys
        self.values = values
        self._writing = writing

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
        return cls(keys, values)

    @property
    def n_rows(self) -> int:
        """Rows of this view."""
        return self.keys[0].shape[0]

    def rows(self, start: int, stop: int) -> "KVCache":
        """Rows start to stop as a view: a slice, since an index tensor would copy the cache in every layer."""
        return KVCache([k[start:stop] for k in self.keys], [v[start:stop] for v in self.values])

    def writing(self, rows: Tensor) -> "KVCache":
        """The same view, in which only these rows, int64 `[W]`, are written to; all are read."""
        return KVCache(self.keys, self.values, rows)

    def first(self, length: int) -> "KVCache":
        """The first `length` positions of every row as a view, so that a step reads only the part in use."""
        return KVCache([k[:, :, :length] for k in self.keys], [v[:, :, :length] for v in self.values])

    def update_(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values at their positions, in the rows that write, and return the layer's whole content.

        Args:
            layer: index of the layer.
            positions: `[B, T]`, each below S.
            key: `[B, T, K, D]`.
            value: `[B, T, K, D]`.

        Returns:
            Keys and values, each `[B, K, S, D]`.
        """
        rows = self._writing
        if rows is None and positions.min() < 0:  # padding
            rows, steps = (positions >= 0).nonzero(as_tuple=True)
            self.keys[layer][rows, :, positions[rows, steps]] = key[rows, steps]
            self.values[layer][rows, :, positions[rows, steps]] = value[rows, steps]
            return self.keys[layer], self.values[layer]
        if rows is None:
            rows = torch.arange(positions.shape[0], device=positions.device)
        else:
            positions, key, value = positions[rows], key[rows], value[rows]
        # Two index tensors around a slice: their axes [B, T] come first, then K and D, as in `key`.
        self.keys[layer][rows[:, None], :, positions] = key
        self.values[layer][rows[:, None], :, positions] = value
        return self.keys[layer], self.values[layer]

    def copy_row_(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Copy the positions from start up to length of one row to another one."""
        assert source != target, "a row is not copied to itself"
        for tensor in (*self.keys, *self.values):
            tensor[target, :, start:length] = tensor[source, :, start:length]

    def zero_(self) -> None:
        """Forget everything: masked NaN would still spread, since 0 · NaN is NaN."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    def free(self) -> None:
        """Let go of the tensors."""
        self.keys, self.values = [], []
