"""A text on standard output that grows. It knows nothing of what makes the text."""

from collections.abc import Iterator


def show(pieces: Iterator[str], is_first: bool, before: str = "", after: str = "") -> None:
    """Print a text as it grows.

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
    print(f"{before}{first}", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(after, end="" if after.endswith("\n") else "\n", flush=True)
