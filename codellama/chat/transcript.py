"""A conversation as a file: JSON that other programs write and read, too, so all of it is checked.

The form: {"version": 1, "system": TEXT, "settings": {NAME: VALUE}, "messages": [{"role": …, "content": …}, …]}, where
user and assistant take turns. It knows nothing of models.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from codellama.chat.dialogue import Conversation, Settings
from codellama.errors import CodeLlamaError, shown
from codellama.prompts import Message

VERSION = 1
_ROLES = ("user", "assistant")


class TranscriptError(CodeLlamaError):
    """A file that holds no conversation."""


def save(conversation: Conversation, path: Path) -> None:
    """Write a conversation; the file is whole or not there. Only a file that holds a conversation is overwritten.

    Raises:
        TranscriptError: there is a file of something else.
        OSError: it cannot be written.
    """
    if path.exists():
        try:
            load(path)
        except TranscriptError as error:
            raise TranscriptError(f"{error}; it is not overwritten: save under another name") from error
    messages = list(conversation.messages)
    if conversation.question is not None:
        messages.append({"role": "user", "content": conversation.question})
    content = {
        "version": VERSION,
        "system": conversation.system,
        "settings": asdict(conversation.settings),
        "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
    }
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def load(path: Path) -> Conversation:
    """Read a conversation. One that ends with a question has it as its open one.

    Raises:
        TranscriptError: it is none; says what was found and what was expected.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TranscriptError(f"{path} is no JSON ({error}); a file of /save was expected") from error
    content = _of_page(content, path)
    expected = {"version", "system", "settings", "messages"}
    if not isinstance(content, dict) or content.keys() != expected:
        raise TranscriptError(f"{path} is {shown(content)}; an object with {', '.join(sorted(expected))} was expected")
    if content["version"] != VERSION:
        raise TranscriptError(f"{path} is of version {shown(content['version'])}; {VERSION} was expected")
    if not _is_text(content["system"]):
        raise TranscriptError(f"{path} has system {shown(content['system'])}; a text was expected")
    messages = _messages(content["messages"], path)
    question = messages.pop()["content"] if len(messages) % 2 else None
    return Conversation(content["system"], _settings(content["settings"], path), messages, question)


def _of_page(content: Any, path: Path) -> Any:
    """Put the chat that a page exports into our form: a list of chats, with the system message as the first message."""
    if not isinstance(content, dict) or content.keys() != {"chats"} or not isinstance(content["chats"], list):
        return content
    chats = content["chats"]
    if len(chats) != 1:
        raise TranscriptError(f"{path} holds {len(chats)} chats; one was expected: the page exports one by itself, too")
    messages: Any = chats[0].get("messages") if isinstance(chats[0], dict) else None
    first = messages[0] if isinstance(messages, list) and messages else None
    system: Any = ""
    if isinstance(messages, list) and isinstance(first, dict) and first.get("role") == "system":
        system, messages = first.get("content"), messages[1:]
    if isinstance(messages, list):
        messages = _joined(messages)
    return {"version": VERSION, "system": system, "settings": {}, "messages": messages}


def _joined(messages: list[Any]) -> list[Any]:
    """Join questions in a row, as the page does when it asks: the first of them was not answered."""
    joined: list[Any] = []
    for message in messages:
        pair = [joined[-1], message] if joined else []
        if pair and all(isinstance(one, dict) and one.get("role") == "user" and _is_text(one.get("content"))
                        for one in pair):  # fmt: skip
            joined[-1] = {"role": "user", "content": "\n\n".join(one["content"] for one in pair)}
        else:
            joined.append(message)
    return joined


def _settings(found: Any, path: Path) -> Settings:
    known = asdict(Settings())
    if not isinstance(found, dict) or not found.keys() <= known.keys():
        raise TranscriptError(f"{path} has settings {shown(found)}; some of {', '.join(known)} were expected")
    try:
        return Settings(**found)
    except (TypeError, ValueError) as error:
        raise TranscriptError(f"{path}: {error}") from error


def _messages(found: Any, path: Path) -> list[Message]:
    if not isinstance(found, list):
        raise TranscriptError(f"{path} has messages {shown(found)}; a list was expected")
    messages: list[Message] = []
    for index, message in enumerate(found):
        role = _ROLES[index % 2]
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise TranscriptError(f"{path}: message {index} is {shown(message)}; role and content were expected")
        if message["role"] != role or not _is_text(message["content"]):
            raise TranscriptError(f"{path}: message {index} is {shown(message)}; a text from {role!r} was expected")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _is_text(found: Any) -> bool:
    r"""Say whether it is a text; one half of a pair such as \ud83d is none."""
    return isinstance(found, str) and not any("\ud800" <= letter <= "\udfff" for letter in found)
