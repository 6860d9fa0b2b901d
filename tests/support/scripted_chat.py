"""A chat's model and screen that follow a script."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from codellama.chat.dialogue import Settings
from codellama.prompts import Dialog

Step = str | Exception | Callable[[], Any]


class ScriptedModel:
    """Each answer is a list of pieces to yield, exceptions to raise, and functions to call in between.

    A message has two tokens, and one for each of its letters after the first.
    """

    def __init__(self, answers: Sequence[Sequence[Step]], context: int | None = None, breaks: bool = False) -> None:
        self.answers = list(answers)
        self.context = context
        self.breaks = breaks
        self.asked: list[list[str]] = []
        self.closed = 0
        self.ended = False

    def count(self, dialog: Dialog) -> int:
        return sum(2 + max(0, len(message["content"]) - 1) for message in dialog)

    def stream(self, dialog: Dialog, settings: Settings) -> Generator[str]:
        self.asked.append([message["content"] for message in dialog])
        try:
            for step in self.answers.pop(0):
                if isinstance(step, Exception):
                    raise step
                if callable(step):
                    step()
                else:
                    yield step
        finally:
            self.closed += 1

    def end(self) -> None:
        self.ended = True


class ScriptedScreen:
    """Types lines, then Ctrl-D; keeps what is shown."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.answers: list[str] = []
        self.said: list[str] = []
        self.warned: list[str] = []

    def read(self) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    @contextlib.contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        pieces: list[str] = []
        try:
            yield pieces.append
        finally:
            self.answers.append("".join(pieces))

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)
