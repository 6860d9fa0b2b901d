"""Runs one batch through the model on this rank. It knows nothing of requests or sampling: numbers in, logits out.

Shapes: B rows of the batch, T new tokens per row, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import compress, count
from typing import Any

import torch
from torch import Tensor

from codellama.cache import KVCache
from codellama.generation.batch import LAST_DRAWN, Batch
from codellama.generation.graphs import DecodeGraphs, forget_workspaces
from codellama.memory import logits_tile
from codellama.model import Transformer


class Runner:
    """The model and its cache on this rank.

    Attributes:
        drawn: the id that was drawn last in each row, int64 `[rows]`, as far as ids are read late.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, device: torch.device, graphs: DecodeGraphs | None = None
    ) -> None:
        """Run this model with this cache, both on device; the steps that are recorded, from there."""
        self.model = model
        self.cache = cache
        self.graphs = graphs
        self.device = device
        self.drawn = torch.zeros(cache.n_rows, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Iterator[Tensor]:
        """Run a batch and yield float32 logits `[n, V]` of the tokens that it wants them of, row by row, in pieces.

        Every rank must take all pieces, since each is computed by all of them together. A piece is valid until the
        next batch.
        """
        for source, target, start, stop in batch.copies:
            self.cache.copy_row_(source, target, stop, start)
            self.drawn[target] = self.drawn[source]
        if self.graphs is not None and (logits := self.graphs.run(batch, self.drawn)) is not None:
            yield logits if all(batch.wanted) else logits[self._send([*compress(count(), batch.wanted)])]
            return
        rows, width = len(batch.tokens), batch.width
        lengths = [len(row) for row in batch.tokens]
        padded = [[*row, *[0] * (width - length)] for row, length in zip(batch.tokens, lengths, strict=True)]
        tokens = self._send(padded)  # [B, T]
        if any(row and row[0] == LAST_DRAWN for row in batch.tokens):
            last = self.drawn[batch.start : batch.start + rows, None]
            tokens = torch.where(tokens == LAST_DRAWN, last, tokens)
        steps = torch.arange(width, device=self.device)
        positions = self._send(batch.positions)[:, None] + steps  # [B, T]
        if min(lengths) < width:  # behind a row's end, and in rows that run along, nothing is written
            positions = torch.where(steps < self._send(lengths)[:, None], positions, -1)
        view = self.cache.rows(batch.start, batch.start + rows).first(batch.length)
        hidden = self._select(self.model(tokens, positions, view), batch, lengths)
        tile = logits_tile(self.model.args.vocab_size, hidden.element_size())
        for start in range(0, len(hidden), tile):
            yield self.model.logits(hidden[start : start + tile])

    def _select(self, hidden: Tensor, batch: Batch, lengths: Sequence[int]) -> Tensor:
        """Of `[B, T, dim]`, what logits are wanted of: `[n, dim]`, row by row."""
        rows, width, dim = hidden.shape
        flat = hidden.reshape(rows * width, dim)
        if rows == 1:
            return flat[lengths[0] - batch.wanted[0] : lengths[0]]
        if sum(batch.wanted) == rows * width:
            return flat
        index = [
            row * width + at
            for row, (length, wanted) in enumerate(zip(lengths, batch.wanted, strict=True))
            for at in range(length - wanted, length)
        ]
        return flat[self._send(index)]

    def keep(self, rows: Sequence[int], drawn: Sequence[Tensor]) -> None:
        """Remember the id `[]` that each of these rows has drawn, for a batch that says LAST_DRAWN."""
        self.drawn[self._send(rows)] = torch.stack(list(drawn))

    def _send(self, values: Sequence[Any]) -> Tensor:
        """Make a tensor of integers on the device. A plain transfer would wait for all that a GPU has still to do."""
        tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def forget(self) -> None:
        """Clear the cache, which may hold NaN after a failure."""
        self.cache.zero_()

    def free(self) -> None:
        """Give the memory of weights and cache back; nothing can run afterwards."""
        if self.graphs is not None:
            self.graphs.free()
        self.model.release()
        self.cache.free()
        if self.device.type == "cuda":
            forget_workspaces()
            torch.cuda.empty_cache()
