"""What the free rows of the cache hold, and which of them a request is given.

It knows nothing of the cache itself or of torch: token ids and numbers of rows.
"""

from collections.abc import Sequence

LEAST_REUSE = 8
"""A shorter common beginning is not worth a copy; prompts share their first ids anyway."""


class RowTable:
    """The ids that free rows hold, and when each row was last given back."""

    def __init__(self, rows: int) -> None:
        """Start with empty rows, all free."""
        self._held: dict[int, Sequence[int]] = {row: () for row in range(rows)}
        self._order = list(range(rows))  # the row that was given back longest ago comes first

    def take(self, prompt: Sequence[int]) -> tuple[int, int] | None:
        """Give a row away, and say how many of the prompt's ids are in the cache there already; None if none is free.

        The last id of a prompt always counts as new, since its logits are wanted. A row that begins as the prompt does
        is taken if that is at least half of what it holds. Else one that holds nothing is taken, or the one that was
        given back longest ago: a long chat is not given up for the system message that it begins with, which can be
        copied.

        Args:
            prompt: ids, at least one.
        """
        if not self._held:
            return None
        lengths = {row: common_length(held, prompt[:-1]) for row, held in self._held.items()}
        row = max(self._held, key=lambda row: (lengths[row], -len(self._held[row])))
        if lengths[row] < LEAST_REUSE or 2 * lengths[row] < len(self._held[row]):
            row = min(self._held, key=lambda row: (len(self._held[row]) > 0, self._order.index(row)))
        del self._held[row]
        return row, lengths[row] if lengths[row] >= LEAST_REUSE else 0

    def n_held(self, row: int) -> int:
        """Count the ids that a free row holds."""
        return len(self._held[row])

    def take_row(self, row: int) -> None:
        """Give this free row away; what it holds is lost."""
        del self._held[row]

    def give_back(self, row: int, ids: Sequence[int]) -> None:
        """Note what a row holds when its request has ended."""
        self._held[row] = ids
        self._order.remove(row)
        self._order.append(row)

    def longest(self, prompt: Sequence[int]) -> tuple[int, int]:
        """Find the longest beginning of a prompt that a free row holds: how many ids, and the row; 0 of any if none."""
        found = [(common_length(held, prompt), row) for row, held in self._held.items()]
        return max(found, default=(0, 0))

    def forget(self) -> None:
        """Note that all rows are free, and that nothing in them can be relied on."""
        self._held = dict.fromkeys(range(len(self._order)), ())


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the ids at the beginning in which two sequences agree."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # comparing slices is fast; going id by id in Python is not
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
