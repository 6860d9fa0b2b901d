"""Chats as data: messages, what of them fits into a context, and files of them.

It knows nothing of pages and of servers, and imports nothing else of this package.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

FRAME = 14
"""Tokens that the tags of a chat format add to a message, at most: the system message of Llama 2's is framed by 13."""

ROOM_FOR_ANSWERS = 0.25
"""The part of a context that is kept for the answer, where it may be that long."""


class ChatFileError(ValueError):
    """A file that should hold chats does not."""


@dataclass
class Message:
    """What was said; the note tells people how it came about, and no model."""

    role: str
    content: str
    note: str = ""


@dataclass
class Chat:
    """A dialog.

    Attributes:
        system: how to answer; empty for the model's own way.
        left_out: how many of the oldest messages were not sent with the last question.
    """

    messages: list[Message] = field(default_factory=list)
    system: str = ""
    left_out: int = 0
    id: str = field(default_factory=lambda: uuid4().hex)

    @property
    def last_question(self) -> int | None:
        """The place of the last message of the user."""
        return max((at for at, message in enumerate(self.messages) if message.role == "user"), default=None)

    @property
    def title(self) -> str:
        """The beginning of the first question."""
        first = next((message.content for message in self.messages if message.role == "user"), "")
        line = " ".join(first.split())
        return (line if len(line) <= 32 else line[:31].rstrip() + "…") or "Empty chat"

    def to_send(self) -> list[dict[str, str]]:
        """Return what a model is sent: the system message, and what was not left out; neighbours of a role joined."""
        sent = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for message in self.messages[self.left_out :]:
            if sent and sent[-1]["role"] == message.role:
                sent[-1]["content"] += f"\n\n{message.content}"
            else:
                sent.append({"role": message.role, "content": message.content})
        return sent


def estimate_tokens(text: str) -> int:
    """Guess how many tokens a text has: three letters of code share one, and other scripts take one per byte."""
    n_ascii = sum(character < "\x80" for character in text)
    return math.ceil(n_ascii / 3) + len(text.encode(errors="replace")) - n_ascii


def messages_to_leave_out(costs: Sequence[int], roles: Sequence[str], room: int) -> int:
    """Return how many of the oldest messages to leave out, so that the rest fits.

    What remains begins with a question, and holds the last one, even if that alone is too long.

    Args:
        costs: tokens of each message.
        roles: whose it is.
        room: tokens that all of them may have.
    """
    questions = [index for index, role in enumerate(roles) if role == "user"]
    total = sum(costs)
    if total <= room or not questions:
        return 0
    return next((start for start in questions if total - sum(costs[:start]) <= room), questions[-1])


def room_for_messages(context: int, max_tokens: int) -> int:
    """Return how many tokens of a context a prompt may take, beside an answer of so many."""
    return context - min(max_tokens, int(context * ROOM_FOR_ANSWERS))


def export_chats(chats: Sequence[Chat]) -> str:
    """Write chats as JSON."""
    listed = []
    for chat in chats:
        system = [{"role": "system", "content": chat.system}] if chat.system else []
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        listed.append({"title": chat.title, "messages": [*system, *messages]})
    return json.dumps({"chats": listed}, ensure_ascii=False, indent=2)


def import_chats(data: bytes) -> list[Chat]:
    """Read what `export_chats` wrote, one chat as an object with messages, or a list of messages alone.

    The object may have its system message beside the messages, as the terminal's files do.

    Raises:
        ChatFileError: it is anything else; the message says where.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ChatFileError(f"The file is not JSON: {error}") from error
    if isinstance(value, list):
        value = {"messages": value}
    listed = value.get("chats", [value]) if isinstance(value, dict) else None
    if not isinstance(listed, list) or not listed:
        raise ChatFileError("The file holds no chats; an object with a list of chats, or of messages, was expected.")
    return [_chat(item, f"chat {number}") for number, item in enumerate(listed, start=1)]


def _chat(value: Any, place: str) -> Chat:
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list):
        raise ChatFileError(f"{place} of the file has no list of messages.")
    system = value.get("system", "")
    if not isinstance(system, str):
        raise ChatFileError(f"The system message of {place} is no text.")
    chat = Chat(system=system)
    for number, message in enumerate(messages, start=1):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise ChatFileError(
                f"Message {number} of {place} was not understood; a role (system, user or assistant) and a content, "
                "which is a text, were expected."
            )  # fmt: skip
        if role == "system" and number > 1:
            raise ChatFileError(f"Message {number} of {place} is a system message; only the first one can be.")
        if role == "system":
            chat.system = content
        else:
            chat.messages.append(Message(role, content))
    return chat
