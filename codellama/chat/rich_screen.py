"""The screen with a line editor, a history across starts, and Markdown that is shown while it grows.

It needs prompt_toolkit and rich, from the extra `chat`. It knows nothing of models or commands.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from codellama.chat.blocks import Blocks
from codellama.chat.screen import AGAIN, MORE, PROMPT
from codellama.printing import without_controls

_PER_SECOND = 8  # times that the block which grows is drawn


class RichScreen:
    """Reads with prompt_toolkit, shows with rich."""

    def __init__(self, history: Path, *, alone: bool) -> None:
        """Use the process's own terminal.

        Args:
            history: the file of what was typed; its folder is made.
            alone: a signal is a Ctrl-C of this process; else it means that all processes are to end.
        """
        self._console = Console()
        self._session: PromptSession[str] = PromptSession(
            history=self._open(history), multiline=True, key_bindings=_keys(alone), enable_open_in_editor=False
        )

    def read(self) -> str:
        """See Screen."""
        was_interrupted = False
        while True:
            try:
                text = self._session.prompt(PROMPT, prompt_continuation=MORE)
            except KeyboardInterrupt:
                was_empty = not self._session.default_buffer.text
                if was_interrupted and was_empty:
                    raise EOFError from None
                was_interrupted = was_empty
                if was_empty:
                    self.warn(AGAIN)
                continue
            was_interrupted = False
            if text.strip():
                return text

    @contextlib.contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        """See Screen. Finished blocks are printed for good; the one that grows is drawn again and again below them."""
        blocks = Blocks()
        live = Live(console=self._console, transient=True, refresh_per_second=_PER_SECOND, vertical_overflow="visible")

        def show(piece: str) -> None:
            for block in blocks.push(without_controls(piece)):
                live.update(Text(""))
                self._console.print(Markdown(block))
                self._console.print()
            live.update(_Bottom(blocks.rest))

        try:
            with live:
                yield show
        finally:
            if blocks.rest.strip():
                self._console.print(Markdown(blocks.rest))

    def say(self, text: str) -> None:
        """See Screen."""
        self._console.print(without_controls(text), style="cyan", markup=False, highlight=False)

    def warn(self, text: str) -> None:
        """See Screen."""
        self._console.print(without_controls(f"codellama: {text}"), style="yellow", markup=False, highlight=False)

    def _open(self, path: Path) -> History:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o600))  # what people ask is nobody else's
        except OSError as error:
            self.warn(f"the history is not kept: {path} cannot be written ({error.strerror})")
            return InMemoryHistory()
        return FileHistory(str(path))


class _Bottom:
    """A Markdown text, of which the last lines are shown where it is higher than the terminal."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(Markdown(self._text), options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def _keys(alone: bool) -> KeyBindings:
    """Let Enter send unless a backslash stands before it; pasted lines come in as they are."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def go_on(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    if not alone:

        @keys.add("<sigint>")
        def end(event: KeyPressEvent) -> None:
            event.app.exit(exception=EOFError)

    return keys
