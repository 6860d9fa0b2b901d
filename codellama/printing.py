"""A text on standard output that grows. It knows nothing of what makes the text."""

import sys
from collections.abc import Iterator
from itertools import chain

# What moves the cursor, or does other things to a terminal, is no text of an answer.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}") | {13: ""}


def show(pieces: Iterator[str], is_first: bool, before: str = "", after: str = "") -> None:
    """Print a text as it grows. In a terminal a sign stands for each control character, which it would obey.

    Args:
        pieces: the text; what is wrong with a prompt is raised by the first one, before anything is printed.
        is_first: this is world rank 0, the only one that prints.
        before: printed before it; after: printed after it, and then the end of the line.
    """
    first = next(pieces, "")
    if not is_first:
        for _ in pieces:
            pass
        return
    clean = sys.stdout.isatty()
    print(before, end="")
    for piece in chain([first], pieces):
        print(without_controls(piece) if clean else piece, end="", flush=True)
    print(after, end="" if after.endswith("\n") else "\n", flush=True)


def without_controls(text: str) -> str:
    """Put a sign in place of what a terminal would obey."""
    return text.translate(_CONTROLS)
