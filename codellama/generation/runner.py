"""Runs one batch through the model on this rank. It knows nothing of requests or sampling: numbers in, logits out.

Shapes: B rows of the batch, T new tokens per row, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from codellama.cache import KVCache
from codellama.generation.scheduler import LAST_DRAWN, Batch
from codellama.memory import logits_tile
from codellama.model import Transformer


class Runner:
    """The model and its cache on this rank.

    Attributes:
        drawn: the id that was drawn last in each row, int64 `[rows]`, as far as ids are read late.
    """

    def __init__(self, model: Transformer, cache: KVCache, device: torch.device) -> None:
        """Run this model with this cache, both on device."""
        self.model = model
        self.cache = cache
        self.device = device
        self.drawn = torch.zeros(cache.n_rows, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Iterator[Tensor]:
        """Run a batch and yield float32 logits `[B, t, V]` of its positions from logits_from on, in pieces.

        Every rank must take all pieces, since each is computed by all of them together.
        """
        for source, target, start, stop in batch.copies:
            self.cache.copy_row_(source, target, stop, start)
            self.drawn[target] = self.drawn[source]
        rows, width = len(batch.tokens), batch.width
        tokens = torch.tensor(batch.tokens, device=self.device)
        if any(row[0] == LAST_DRAWN for row in batch.tokens):
            last = self.drawn[batch.start : batch.start + rows, None]
            tokens = torch.where(tokens == LAST_DRAWN, last, tokens)
        first = torch.tensor(batch.positions, device=self.device)
        view = self.cache.rows(batch.start, batch.start + rows).first(batch.length)
        if min(batch.positions) < 0:  # rows that run along: they read position 0 and write nothing
            writing = [row for row, position in enumerate(batch.positions) if position >= 0]
            view = view.writing(torch.tensor(writing, device=self.device))
            first = first.clamp(min=0)
        positions = first[:, None] + torch.arange(width, device=self.device)  # [B, T]
        hidden = self.model(tokens, positions, view)[:, batch.logits_from :]
        tile = max(1, logits_tile(self.model.args.vocab_size, hidden.element_size()) // rows)
        for piece in hidden.split(tile, dim=1):
            if piece.shape[1]:
                yield self.model.logits(piece)

    def keep(self, rows: Sequence[int], drawn: Sequence[Tensor]) -> None:
        """Remember the id `[]` that each of these rows has drawn, for a batch that says LAST_DRAWN."""
        self.drawn[torch.tensor(rows, device=self.device)] = torch.stack(list(drawn))

    def forget(self) -> None:
        """Clear the cache, which may hold NaN after a failure."""
        self.cache.zero_()

    def free(self) -> None:
        """Give the memory of weights and cache back; nothing can run afterwards."""
        self.model.to("meta")
        self.cache.free()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
