"""The chat itself: read, understand, answer, until the reader has enough.

Whatever goes wrong with a question is told, and the chat goes on. It knows neither which model nor which screen it is.
"""

from collections.abc import Generator
from contextlib import closing

from codellama.chat.commands import understand
from codellama.chat.dialogue import Conversation
from codellama.chat.interrupt import Interrupt
from codellama.chat.model import Model, TooLongError
from codellama.chat.screen import Screen
from codellama.errors import CodeLlamaError, RankError
from codellama.prompts import TAGS, TURN_TAGS

_ROOM = 256  # tokens that an answer should have, where nobody has said it


class Terminal:
    """One conversation of a reader with a model."""

    def __init__(self, conversation: Conversation, model: Model, screen: Screen, *, by_key: bool = False) -> None:
        """Join the parts.

        Args:
            conversation: what was said already.
            by_key: see Interrupt.
        """
        self._conversation = conversation
        self._model = model
        self._screen = screen
        self._by_key = by_key

    def run(self) -> None:
        """Talk until the reader ends it.

        Raises:
            RankError: another rank is gone.
        """
        ended = False
        while not ended:
            try:
                typed = self._screen.read()
            except EOFError:
                break
            try:
                reply = understand(self._conversation, typed, self._model)
                if reply.text:
                    self._screen.say(reply.text)
                ended = self._answer() if reply.asks else reply.ends
            except RankError:
                raise
            except KeyboardInterrupt:  # outside of an answer
                if self._by_key:
                    raise
                self._screen.warn("interrupted")
            except (CodeLlamaError, ValueError, OSError) as error:
                self._screen.warn(str(error))
        self._model.end()

    def _answer(self) -> bool:
        """Have the open question answered, with as much of what was said as fits; True where all is to end."""
        dropped = self._conversation.n_dropped
        self._make_room()
        interrupt = Interrupt(by_key=self._by_key, breaks=self._model.breaks)
        while True:
            if self._conversation.n_dropped > dropped:
                turns = (self._conversation.n_dropped - dropped) // 2
                self._screen.warn(f"the context is full: {turns} old turn{'s are' if turns > 1 else ' is'} left out")
                dropped = self._conversation.n_dropped
            try:
                self._take(*self._stream(interrupt))
            except TooLongError:
                if not self._conversation.drop_turn():
                    raise
                continue
            return interrupt.ended

    def _make_room(self) -> None:
        """Leave out old turns until an answer fits, as far as it can be told beforehand."""
        context, conversation = self._model.context, self._conversation
        if context is None:
            return
        room = min(conversation.settings.max_gen_len or _ROOM, _ROOM, context // 4)
        while (count := self._model.count(conversation.dialog())) is not None and count > context - room:
            if not conversation.drop_turn():
                return

    def _stream(self, interrupt: Interrupt) -> tuple[str, bool]:
        """Show the answer as it comes; returns what was shown, and whether it was stopped."""
        pieces = self._model.stream(self._conversation.dialog(), self._conversation.settings)
        shown: list[str] = []
        with interrupt.watching(), closing(pieces):
            first = self._next(pieces, interrupt)  # what is wrong with the question is told before anything is shown
            if first is None:
                return "", interrupt.asked
            with self._screen.answer() as show:
                piece: str | None = first
                while piece is not None:
                    shown.append(piece)
                    show(piece)
                    piece = None if interrupt.asked else self._next(pieces, interrupt)
        return "".join(shown), interrupt.asked

    @staticmethod
    def _next(pieces: Generator[str], interrupt: Interrupt) -> str | None:
        try:
            with interrupt.waiting():
                return next(pieces, None)
        except KeyboardInterrupt:
            return None

    def _take(self, answer: str, stopped: bool) -> None:
        """Keep what was shown as the answer, unless no later question could be asked with it."""
        conversation = self._conversation
        answer = answer.strip()
        if not answer:
            said = "stopped before the answer began" if stopped else "the answer is empty"
            self._screen.warn(f"{said}, so this turn is not kept; /retry asks again")
        elif any(tag in answer for tag in (*TAGS, *TURN_TAGS)):
            conversation.forget_turn()
            self._screen.warn("the answer holds tags of the chat format, so this turn is forgotten")
        else:
            conversation.answer(answer)
            if stopped:
                self._screen.warn("stopped; what was shown is kept as the answer")
