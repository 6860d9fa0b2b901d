"""What a visitor of the page has: chats, a text with a gap, and the answer that is being read.

It knows what may be done with them, and not how they look; of this package it knows an HTTP client and chats as data.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from codellama.chat.client import Answer, Model, Sampling, Server
from codellama.chat.conversation import (
    FRAME,
    Chat,
    Message,
    estimate_tokens,
    messages_to_leave_out,
    room_for_messages,
)

MARKER = "<FILL>"
EXAMPLE = f'''def remove_non_ascii(s: str) -> str:
    """ {MARKER}
    return result
'''


@dataclass
class Running:
    """An answer that is being read, and what to do with its text and a note at its end."""

    answer: Answer
    keep: Callable[[str, str], None]
    text: str = ""
    began: float = field(default_factory=time.monotonic)
    first: float | None = None

    def note(self, how: str = "") -> str:
        """Say how long it took, and how it ended if not by itself."""
        if self.answer.finish_reason == "length":
            how = how or "cut off at max new tokens"
        tokens, now = self.answer.completion_tokens, time.monotonic()
        parts = [] if tokens is None else [f"{tokens} token{'s' * (tokens != 1)}"]
        if tokens is not None and tokens > 1 and self.first is not None and now > self.first:
            parts.append(f"{(tokens - 1) / (now - self.first):.0f} a second")
        return " · ".join([*parts, how] if how else parts)


@dataclass
class Desk:
    """All that a visitor has: chats, the text with a gap, and the answer that is being read."""

    server: Server
    chats: list[Chat] = field(default_factory=lambda: [Chat()])
    at: int = 0
    models: list[Model] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    estimated: bool = False
    running: Running | None = None
    error: str = ""
    question: str | None = None
    is_editing: bool = False
    imported: int = 0
    code: str = EXAMPLE
    filled: tuple[str, str, str] | None = None
    filled_note: str = ""

    @property
    def chat(self) -> Chat:
        """The chat that is looked at."""
        return self.chats[self.at]

    def stop(self) -> None:
        """Hang up; what has come is kept."""
        self.is_editing, self.error, self.question = False, "", None
        if self.running is not None:
            running, self.running = self.running, None
            running.answer.close()
            running.keep(running.text, running.note("stopped"))

    def receive(self, question: str) -> None:
        """Keep a question until it is asked."""
        self.question = question

    def show(self, at: int) -> None:
        """Look at another chat."""
        self.stop()
        self.at = at

    def add(self, *chats: Chat) -> None:
        """Put chats in front, and look at the first of them."""
        self.stop()
        self.chats[:0] = chats
        self.at = 0

    def delete(self) -> None:
        """Forget the chat that is looked at."""
        self.stop()
        del self.chats[self.at]
        self.chats = self.chats or [Chat()]
        self.at = min(self.at, len(self.chats) - 1)

    def count(self, text: str, model: Model) -> int:
        """Count tokens, or estimate them where the server does not count."""
        if text not in self.counts and not self.estimated:  # a server that hangs is asked once
            counted = self.server.count_tokens(text, model.name)
            if counted is not None:
                self.counts[text] = counted
            self.estimated = counted is None
        return self.counts[text] if text in self.counts else estimate_tokens(text)

    def costs(self, model: Model) -> tuple[int, list[int]]:
        """Count the tokens of the chat's system message, and of each message."""
        chat = self.chat
        self.estimated = False
        system = self.count(chat.system, model) + FRAME if chat.system.strip() else 0
        return system, [self.count(message.content, model) + FRAME for message in chat.messages]

    def ask(self, model: Model, sampling: Sampling, question: str | None = None) -> None:
        """Have the chat's last question answered, or a new one."""
        self.stop()
        chat = self.chat
        if question is not None:
            chat.messages.append(Message("user", question))
        if model.context is not None:
            system, costs = self.costs(model)
            room = room_for_messages(model.context, sampling.max_tokens) - system
            chat.left_out = messages_to_leave_out(costs, [message.role for message in chat.messages], room)

        def keep(text: str, note: str) -> None:
            if text.strip():
                chat.messages.append(Message("assistant", text, note))

        self.running = Running(self.server.answer(model.name, chat.to_send(), sampling), keep)

    def ask_again(self, model: Model, sampling: Sampling, question: str | None = None) -> None:
        """Have the last question answered anew, or another one in its place."""
        self.stop()
        chat = self.chat
        assert chat.last_question is not None
        kept = chat.messages[: chat.last_question + 1]
        chat.messages = kept if question is None else [*kept[:-1], Message("user", question)]
        self.ask(model, sampling)

    def forget(self) -> None:
        """Forget the last question, and its answer: where a server refuses it, the chat can go on without it."""
        self.stop()
        chat = self.chat
        assert chat.last_question is not None
        del chat.messages[chat.last_question :]
        chat.left_out = min(chat.left_out, len(chat.messages))

    def fill(self, model: Model, sampling: Sampling) -> None:
        """Fill the gap."""
        self.stop()
        prefix, *suffixes = self.code.split(MARKER)
        if len(suffixes) != 1:
            self.error = f"The text holds {len(suffixes)} {MARKER} markers; exactly one was expected."
            return
        suffix = suffixes[0]

        def keep(text: str, note: str) -> None:
            self.filled, self.filled_note = (prefix, text, suffix), note

        self.filled = None
        self.running = Running(self.server.fill(model.name, prefix, suffix, sampling), keep)
