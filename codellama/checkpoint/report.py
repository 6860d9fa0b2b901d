"""What an inspection found, as rows that a program reads and a table that a person reads.

It knows nothing of what is inspected.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from codellama.errors import CheckpointError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        subject: the file or tensors.
        check: what was looked at.
        found: what was found; where it is wrong, the message of the error.
        ok: whether it is right.
    """

    subject: str
    check: str
    found: str
    ok: bool = True


@dataclass
class Report:
    """All checks of one run, in the order in which they were made."""

    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True where nothing is wrong."""
        return not self.faults

    @property
    def faults(self) -> list[Row]:
        """What is wrong."""
        return [row for row in self.rows if not row.ok]

    def add(self, subject: str, check: str, found: str, ok: bool = True) -> None:
        """Add a row; a fault that is already there in the same words is not added again."""
        if ok or found not in [row.found for row in self.faults]:
            self.rows.append(Row(subject, check, found, ok))

    def attempt(
        self, subject: str, check: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """Call a function and return its value; what it raises becomes a fault, and None is returned."""
        try:
            return function(*args, **kwargs)
        except CheckpointError as error:
            self.add(subject, check, str(error), ok=False)
        except Exception as error:  # whatever bad input does must not hide the rest of the report
            self.add(subject, check, f"{type(error).__name__}: {error}", ok=False)
        return None

    def format(self) -> str:
        """Write the rows as a table, and a last line that says how many faults there are."""
        marked = [("ok" if row.ok else "FAULT", row.subject, row.check, row.found) for row in self.rows]
        count = len(self.faults)
        end = "no faults" if count == 0 else f"{count} fault{'s' if count > 1 else ''}"
        return f"{format_table(marked)}\n{end} in {len(self.rows)} checks"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns to the left; the last one may be as long as it is."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)][:-1]
    lines = []
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*padded, row[-1]]))
    return "\n".join(lines)
