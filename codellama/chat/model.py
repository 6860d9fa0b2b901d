"""What a chat asks: the model in this process, and what every other rank of it does meanwhile.

A model streams the answer to a dialog and counts tokens. It knows nothing of terminals.
"""

import signal
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Protocol

from codellama.chat.dialogue import Settings
from codellama.errors import CodeLlamaError, ContextLengthError, PromptError, RankError
from codellama.prompts import Dialog, dialog_prompt_tokens

if TYPE_CHECKING:
    from codellama.llama import Llama


class TooLongError(PromptError):
    """The dialog leaves no room for an answer."""


class Model(Protocol):
    """Answers dialogs.

    Attributes:
        context: tokens of dialog and answer together; None where nobody says.
        breaks: an answer may be interrupted inside of a piece, and the next one be asked for.
    """

    context: int | None
    breaks: bool

    def count(self, dialog: Dialog) -> int | None:
        """Count a dialog's tokens; None where that cannot be told.

        Raises:
            PromptError: it cannot be expressed as tokens.
        """

    def stream(self, dialog: Dialog, settings: Settings) -> Generator[str]:
        """Yield an answer as it grows; closing ends it.

        Raises:
            TooLongError: the dialog leaves no room.
            CodeLlamaError: it is refused, or the answer broke off.
        """

    def end(self) -> None:
        """Say that nothing more will be asked."""


class LocalModel:
    """A generator of this process, as world rank 0 uses it; the other ranks `follow`."""

    breaks = False  # what is interrupted inside of the model forgets all that was read

    def __init__(self, llama: "Llama") -> None:
        """Use a generator that nobody else uses meanwhile."""
        self._llama = llama
        self.context: int | None = llama.runtime.max_seq_len

    def count(self, dialog: Dialog) -> int:
        """See Model."""
        return len(dialog_prompt_tokens(self._llama.tokenizer, dialog))

    def stream(self, dialog: Dialog, settings: Settings) -> Generator[str]:
        """See Model."""
        turn = dialog, settings
        self._llama.parallel.share(lambda: turn)
        try:
            yield from _ask(self._llama, dialog, settings)
        except ContextLengthError as error:
            raise TooLongError(str(error)) from error

    def end(self) -> None:
        """See Model: the other ranks return."""
        self._llama.parallel.share(lambda: None)


def follow(llama: "Llama") -> None:
    """Take part in the answers of world rank 0's chat until it ends. It sleeps between them.

    Ctrl-C is world rank 0's affair: it ends an answer on all ranks.

    Raises:
        RankError: another rank is gone.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while (turn := llama.parallel.share(_nothing)) is not None:
            try:
                for _ in _ask(llama, *turn):
                    pass
            except RankError:
                raise
            except CodeLlamaError:  # world rank 0 has the same one, and tells it
                continue
    finally:
        signal.signal(signal.SIGINT, before)


def _nothing() -> tuple[Dialog, Settings] | None:
    raise AssertionError("world rank 0 alone says what is asked")


def _ask(llama: "Llama", dialog: Dialog, settings: Settings) -> Iterator[str]:
    return llama.stream_chat(dialog, settings.temperature, settings.top_p, settings.max_gen_len, seed=settings.seed)
