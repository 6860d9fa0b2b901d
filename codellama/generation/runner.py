"""Runs one batch through the model on this rank. It knows nothing of requests or sampling: numbers in, logits out.

Shapes: B rows of the batch, T new tokens per row, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from codellama.cache import KVCache
from codellama.generation.graphs import DecodeGraphs, forget_workspaces
from codellama.generation.scheduler import Batch
from codellama.memory import logits_tile
from codellama.model import Transformer


class Runner:
    """The model and its cache on this rank."""

    def __init__(
        self, model: Transformer, cache: KVCache, device: torch.device, graphs: DecodeGraphs | None = None
    ) -> None:
        """Run this model with this cache, both on device; the steps that are recorded, from there."""
        self.model = model
        self.cache = cache
        self.graphs = graphs
        self._device = device

    @torch.inference_mode()
    def run(self, batch: Batch) -> Iterator[Tensor]:
        """Run a batch and yield float32 logits `[B, t, V]` of its positions from logits_from on, in pieces.

        Every rank must take all pieces, since each is computed by all of them together. A piece is valid until the
        next batch.
        """
        for source, target, start, stop in batch.copies:
            self.cache.copy_row_(source, target, stop, start)
        if self.graphs is not None and (logits := self.graphs.run(batch)) is not None:
            yield logits
            return
        rows, width = len(batch.tokens), batch.width
        tokens = torch.tensor(batch.tokens, device=self._device)
        first = torch.tensor(batch.positions, device=self._device)
        view = self.cache.rows(batch.start, batch.start + rows).first(batch.length)
        positions = first[:, None] + torch.arange(width, device=self._device)  # [B, T]
        if min(batch.positions) < 0:  # rows that run along
            positions.masked_fill_(first[:, None] < 0, -1)
        hidden = self.model(tokens, positions, view)[:, batch.logits_from :]
        tile = max(1, logits_tile(self.model.args.vocab_size, hidden.element_size()) // rows)
        for piece in hidden.split(tile, dim=1):
            if piece.shape[1]:
                yield self.model.logits(piece)

    def forget(self) -> None:
        """Clear the cache, which may hold NaN after a failure."""
        self.cache.zero_()

    def free(self) -> None:
        """Give the memory of weights and cache back; nothing can run afterwards."""
        if self.graphs is not None:
            self.graphs.free()
        self.model.release()
        self.cache.free()
        if self._device.type == "cuda":
            forget_workspaces()
            torch.cuda.empty_cache()
