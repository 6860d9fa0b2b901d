"""What each row of the cache holds, and which free row a request is given: the one that begins as its prompt does.

It knows nothing of the cache itself or of torch: token ids and numbers of rows.
"""

from collections.abc import Sequence

LEAST_REUSE = 8
"""A shorter common beginning is not worth the rest of what a row holds; prompts share their first ids anyway."""


class RowTable:
    """The ids that rows hold, and when each was last given back."""

    def __init__(self, rows: int) -> None:
        """Start with empty rows."""
        self._held: list[Sequence[int]] = [()] * rows
        self._order = list(range(rows))  # the row that was given back longest ago comes first

    def choose(self, free: Sequence[int], prompt: Sequence[int]) -> tuple[int, int]:
        """Choose a free row for a prompt, and say how many of its ids are in the cache there already.

        The last id of a prompt always counts as new, since its logits are wanted. Where no row begins alike, one that
        holds nothing is taken, else the one that was given back longest ago.

        Args:
            free: rows, at least one.
            prompt: ids, at least one.
        """
        lengths = {row: common_length(self._held[row], prompt[:-1]) for row in free}
        best = max(free, key=lambda row: lengths[row])
        if lengths[best] >= LEAST_REUSE:
            return best, lengths[best]
        return min(free, key=lambda row: (len(self._held[row]) > 0, self._order.index(row))), 0

    def take(self, row: int, ids: Sequence[int]) -> None:
        """Note that a row was given away, and holds no more than these ids."""
        self._held[row] = ids

    def give_back(self, row: int, ids: Sequence[int]) -> None:
        """Note what a row holds when its request has ended."""
        self._held[row] = ids
        self._order.remove(row)
        self._order.append(row)

    def forget(self) -> None:
        """Note that nothing can be relied on."""
        self._held = [()] * len(self._held)


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
