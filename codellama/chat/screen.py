"""Where a chat is read and shown: plain lines, for any terminal. `rich_screen.py` is the other one.

It knows nothing of models or commands.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from codellama.printing import without_controls

PROMPT, MORE = "> ", "… "
AGAIN = "Ctrl-C again, or Ctrl-D, ends the chat"
_RICH = ("prompt_toolkit", "rich")


class Screen(Protocol):
    """Reads what is typed, shows what is answered."""

    def read(self) -> str:
        """Wait for a text that is not blank.

        Raises:
            EOFError: the chat is to end.
        """

    def answer(self) -> AbstractContextManager[Callable[[str], None]]:
        """Show an answer: the body gets a function that takes its pieces."""

    def say(self, text: str) -> None:
        """Show what a command says."""

    def warn(self, text: str) -> None:
        """Show what is wrong, or what the reader should know."""


class PlainScreen:
    """Lines from standard input, text to standard output as it comes, warnings to standard error."""

    def __init__(self, *, alone: bool = True) -> None:
        """Use the process's own terminal.

        Args:
            alone: Ctrl-C belongs to this process; else it ends other ones, too, and the chat with them.
        """
        self._alone = alone
        if sys.stdin.isatty() and sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # not in every Python
                import readline  # noqa: F401  input() uses it for keys and history once it is loaded

    def read(self) -> str:
        """See Screen. A backslash at the end of a line goes on in the next one."""
        was_interrupted = False
        while True:
            try:
                text = self._lines()
            except KeyboardInterrupt:
                print(file=sys.stderr)
                if was_interrupted or not self._alone:
                    raise EOFError from None
                was_interrupted = True
                self.warn(AGAIN)
                continue
            except UnicodeDecodeError as error:
                self.warn(f"what was typed is not UTF-8 text ({error.reason}), and is dropped")
                continue
            if text.strip():
                return text

    def _lines(self) -> str:
        line = input(PROMPT)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(MORE))
        return "\n".join(lines)

    @contextlib.contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        """See Screen."""
        clean = sys.stdout.isatty()

        def show(piece: str) -> None:
            print(without_controls(piece) if clean else piece, end="", flush=True)

        try:
            yield show
        finally:
            print(flush=True)

    def say(self, text: str) -> None:
        """See Screen."""
        print(text, flush=True)

    def warn(self, text: str) -> None:
        """See Screen."""
        print(f"codellama: {text}", file=sys.stderr, flush=True)


def choose_screen(*, alone: bool) -> Screen:
    """Take the screen with colours, history and Markdown where it works, else the plain one.

    Args:
        alone: Ctrl-C belongs to this process.
    """
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if not is_terminal or any(importlib.util.find_spec(name) is None for name in _RICH):
        return PlainScreen(alone=alone)
    from codellama.chat.rich_screen import RichScreen  # late: it needs the extra

    return RichScreen(history_file(), alone=alone)


def history_file() -> Path:
    """Say where the questions of earlier chats are kept: in the user's folder of state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return folder / "codellama" / "history"
