"""One step as numbers: all that a rank needs to run it. It knows nothing of how rows are chosen, or of torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from codellama.generation.request import Request

LAST_DRAWN = -1
"""In place of an id: the one that was drawn last in this row, which the device holds and the host has not read."""


@dataclass(frozen=True)
class Batch:
    """One step: new tokens in the cache rows start … start + B - 1, as many in each as there are.

    Attributes:
        start: first cache row.
        tokens: B lists of ids, or LAST_DRAWN where a row decodes before its last id was read. Empty for a row that runs
            along because rows are a slice: it writes nothing.
        positions: where each row's first new token stands; the others follow it. -1 for a row that runs along.
        wanted: for how many of each row's last tokens logits are wanted.
        requests: whose rows these are, on the leader; None for a row that runs along.
        copies: what goes from row to row before the step, in this order: source, target, first position, end.
        shared: the ids that are drawn from this step are given to all ranks' devices, since a later one may need them.
    """

    start: int
    tokens: Sequence[Sequence[int]]
    positions: Sequence[int]
    wanted: Sequence[int]
    requests: Sequence[Request | None] = field(default=(), compare=False)
    copies: Sequence[tuple[int, int, int, int]] = ()
    shared: bool = False

    @property
    def width(self) -> int:
        """T, the new tokens of the row that has most."""
        return max(map(len, self.tokens))

    @property
    def length(self) -> int:
        """Cache positions that this step reads or writes."""
        return max(position + len(row) for position, row in zip(self.positions, self.tokens, strict=True))

    def spans(self) -> Iterator[tuple[Request, int, int, int]]:
        """Where the logits of each request stand among all that are wanted, which follow each other row by row.

        Yields:
            The request, the first and the end of its logits, and the position of the first one's token.
        """
        start = 0
        for request, tokens, first, wanted in zip(self.requests, self.tokens, self.positions, self.wanted, strict=True):
            if request is not None and wanted:
                yield request, start, start + wanted, first + len(tokens) - wanted
            start += wanted

    def to_integers(self) -> list[int]:
        """Flatten for another rank, which never sees the requests."""
        copies = [value for copy in self.copies for value in copy]
        lengths = [len(row) for row in self.tokens]
        tokens = [token for row in self.tokens for token in row]
        sizes = [len(self.tokens), len(self.copies), int(self.shared)]
        return [self.start, *sizes, *copies, *self.positions, *self.wanted, *lengths, *tokens]

    @classmethod
    def from_integers(cls, values: Sequence[int]) -> "Batch":
        """Read what `to_integers` wrote."""
        start, rows, n_copies, shared = values[:4]
        at = 4 + 4 * n_copies
        copies = tuple((values[i], values[i + 1], values[i + 2], values[i + 3]) for i in range(4, at, 4))
        positions, wanted, lengths = (values[at + i * rows : at + (i + 1) * rows] for i in range(3))
        at += 3 * rows
        tokens = []
        for length in lengths:
            tokens.append(values[at : at + length])
            at += length
        return cls(start, tokens, positions, wanted, copies=copies, shared=bool(shared))
