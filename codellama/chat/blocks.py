"""Where a Markdown text that still grows can be cut, so that what stands before is shown once and for all.

It knows nothing of how Markdown is shown.
"""

import re

_FENCE = re.compile(r"\s*(`{3,}|~{3,})(.*)", re.DOTALL)

_LINE = re.compile(r"[^\n]*\n|[^\n]+")


class Blocks:
    """Takes a text in pieces, and gives it back in blocks: each is shown alike alone and among the others.

    Attributes:
        rest: what is no finished block yet.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.rest = ""

    def push(self, piece: str) -> list[str]:
        """Take a piece, and return the blocks that it finishes."""
        self.rest += piece
        finished = []
        while (cut := _first_cut(self.rest)) > 0:
            finished.append(self.rest[:cut])
            self.rest = self.rest[cut:]
        return finished


def _first_cut(text: str) -> int:
    """Find the end of the first block: 0 where it may go on.

    A block ends behind its closing fence, before an opening one, and at an empty line that a line without indentation
    follows: an indented one may belong to the item of a list.
    """
    place, fence, was_empty = 0, "", False
    for line in _LINE.findall(text):
        whole = line.endswith("\n")
        found = _FENCE.fullmatch(line.rstrip("\n"))
        if fence:
            if whole and found and found[1].startswith(fence) and not found[2].strip():
                return place + len(line)
        elif found and whole:
            if place and not line[0].isspace() and text[:place].strip():
                return place
            fence = found[1]
        elif was_empty and text[:place].strip() and not line[0].isspace() and line[0] not in "`~":
            return place
        was_empty = not line.strip()
        place += len(line)
    return 0
