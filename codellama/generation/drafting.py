"""Guesses of what comes next, out of what a request holds already: they cost nothing, and the model judges them.

It knows nothing of models, of sampling, or of torch. Source: prompt lookup, as a way to draft for speculative decoding
(arXiv 2211.17192 has the verification that does not change what is drawn).
"""

from collections.abc import Sequence

SIZES = (4, 3, 2)
"""Ids that must have occurred before in this order, the longest first; a single one says too little."""


class Drafter:
    """Looks up where the last few ids of a text occurred before, and what followed them there."""

    def __init__(self, ids: Sequence[int]) -> None:
        """Begin with a prompt; takes time in proportion to it."""
        self._ids: list[int] = []
        self._following: dict[tuple[int, ...], int] = {}  # where the id stands that came after, the last time
        self.extend(ids)

    def __len__(self) -> int:
        """Count the ids so far."""
        return len(self._ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Add to the text."""
        for id in ids:
            for size in SIZES:
                if len(self._ids) >= size:
                    self._following[tuple(self._ids[-size:])] = len(self._ids)
            self._ids.append(id)

    def draft(self, n: int) -> list[int]:
        """Guess up to n ids: what followed the last time, again from its beginning where it comes to the end."""
        for size in SIZES:
            at = self._following.get(tuple(self._ids[-size:])) if len(self._ids) >= size else None
            if at is not None:
                period = len(self._ids) - at
                return [self._ids[at + index % period] for index in range(n)]
        return []
