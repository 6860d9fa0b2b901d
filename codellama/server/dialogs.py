"""From the histories that clients send to chats that the models know: forgiving, where the library is strict.

It knows nothing of token ids. `prompts/dialog.py` says what a chat must look like; that check still follows.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field

from codellama.errors import PromptError, shown
from codellama.prompts import Message

_Dicts = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_CONTINUE = "Continue."


class ChatMessage(BaseModel):
    """A message as clients send it; what is not named here is ignored.

    Attributes:
        content: a text, parts of one, or nothing.
        tool_calls: what an assistant asked tools for; told as text.
    """

    role: Annotated[str, Field(json_schema_extra={"enum": list(ROLES)})]
    content: str | _Dicts | None = None
    name: str | None = None
    tool_calls: _Dicts | None = None


def normalize_dialog(messages: Sequence[ChatMessage]) -> list[Message]:
    """Put a history in the order that the chat formats can express, without losing a word of it.

    System messages (developer is the same) are joined and come first; results of tools are told by the user; neighbours
    of one role become one message. Where a user's message is missing, at the begin or at the end, one is put there; a
    system message alone is the user's.

    Raises:
        PromptError: no messages at all, an unknown role, or a part that is no text.
    """
    if not messages:
        raise PromptError("messages is empty; at least one message was expected")
    system: list[str] = []
    turns: list[Message] = []
    for index, message in enumerate(messages):
        text = _text(message, index)
        match message.role:
            case "system" | "developer":
                system.append(text)
            case "user":
                _add(turns, "user", text)
            case "tool" | "function":
                _add(turns, "user", f"Result of {message.name or 'the tool'}:\n{text}")
            case "assistant":
                _add(turns, "assistant", text)
            case role:
                raise PromptError(
                    f"message {index} has role {shown(role)}; system, developer, user, assistant, tool or function "
                    f"was expected"
                )
    if not turns:
        return [{"role": "user", "content": "\n\n".join(system)}]
    if turns[0]["role"] == "assistant":
        turns.insert(0, {"role": "user", "content": ""})
    if turns[-1]["role"] == "assistant":
        turns.append({"role": "user", "content": _CONTINUE})
    if system:
        turns.insert(0, {"role": "system", "content": "\n\n".join(system)})
    return turns


def _add(turns: list[Message], role: Any, text: str) -> None:
    if turns and turns[-1]["role"] == role:
        turns[-1]["content"] = "\n\n".join(filter(None, [turns[-1]["content"], text]))
    else:
        turns.append({"role": role, "content": text})


def _text(message: ChatMessage, index: int) -> str:
    """All that a message says, as text."""
    parts = [message.content] if isinstance(message.content, str) else []
    if isinstance(message.content, list):
        for part in message.content:
            text = part.get("text", part.get("refusal"))
            if not isinstance(text, str):
                raise PromptError(f"message {index} has a part of type {shown(part.get('type'))}; text was expected")
            parts.append(text)
    for call in message.tool_calls or []:
        function = call.get("function")
        if isinstance(function, dict):
            parts.append(f"{function.get('name', '')}({function.get('arguments', '')})")
    return "\n".join(parts)
