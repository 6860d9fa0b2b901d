"""What a chat is: messages with a role and content, and which sequences of them the models were trained on.

It knows nothing of how a dialog is written as tokens: that is `instruct.py`, `steps.py` and `gemma.py`.
"""

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

from codellama.errors import PromptError
from codellama.tokenizer import TURN_END, TURN_START

Role = Literal["system", "user", "assistant"]

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>")
"""Structure of Code Llama's two chat formats. Inside a message they could forge the words of another role."""
TURN_TAGS = (TURN_START, TURN_END)
"""Structure of CodeGemma's chat format, likewise."""


class Message(TypedDict):
    """One turn of a chat; destination exists in the 70B format alone."""

    role: Role
    content: str
    destination: NotRequired[str]


Dialog = Sequence[Message]


def check_dialog(dialog: Dialog, allow_tags: bool = False, tags: Sequence[str] = TAGS) -> None:
    """Refuse what no chat format can express.

    Args:
        dialog: an optional system message, then user and assistant in turn, user first and last.
        allow_tags: let messages contain the format's own tags, as plain text.
        tags: which these are.

    Raises:
        PromptError: naming the message, what was found and what was expected.
    """
    if isinstance(dialog, str) or not isinstance(dialog, Sequence):
        raise PromptError(f"a dialog is a list of messages; found {type(dialog).__name__}")
    if not dialog:
        raise PromptError("the dialog is empty; it needs at least one user message")
    for index, message in enumerate(dialog):
        _check_message(index, message, () if allow_tags else tags)
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns:
        raise PromptError("the dialog has a system message alone; a user message must follow it")
    for index, role in enumerate(turns, start=len(roles) - len(turns)):
        expected = "assistant" if (index - (len(roles) - len(turns))) % 2 else "user"
        if role != expected:
            raise PromptError(
                f"message {index} is from {role!r}; {expected!r} was expected: after an optional first system "
                f"message, user and assistant take turns"
            )
    if turns[-1] != "user":
        raise PromptError(f"message {len(roles) - 1}, the last one, is from {turns[-1]!r}; it must be from 'user'")


def _check_message(index: int, message: Message, tags: Sequence[str]) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise PromptError(f"message {index} is {message!r}; a dict with role and content was expected")
    unknown = sorted(message.keys() - {"role", "content", "destination"})
    if unknown:
        raise PromptError(f"message {index} has unknown keys: {', '.join(map(str, unknown))}")
    if message["role"] not in ("system", "user", "assistant"):
        raise PromptError(f"message {index} has role {message['role']!r}; system, user or assistant was expected")
    for key in ("content", "destination"):
        text = message.get(key, "")
        if not isinstance(text, str):
            raise PromptError(f"message {index} has a {key} of type {type(text).__name__}; a string was expected")
        tag = next((tag for tag in tags if tag in text), None)
        if tag is not None:
            raise PromptError(
                f"message {index} ({message['role']}) contains {tag}, which is structure of the chat format and could "
                f"forge another role's words: remove it (the library's chat calls can take it as plain text)"
            )
