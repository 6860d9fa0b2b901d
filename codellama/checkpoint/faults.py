"""Faults that files of any format can have, found and worded alike.

It knows nothing of any one format.
"""


def some(names: list[str]) -> str:
    """Name a few, count the rest: hundreds of lines help nobody."""
    line = "; ".join(names[:3])
    return line if len(names) <= 3 else f"{line}; and {len(names) - 3} more"
