"""Chats as data: what is left out, and files."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from codellama.chat import transcript
from codellama.chat.conversation import (
    Chat,
    ChatFileError,
    Message,
    estimate_tokens,
    export_chats,
    import_chats,
    messages_to_leave_out,
    room_for_messages,
)
from codellama.chat.dialogue import Conversation

ROLES = ["user", "assistant", "user", "assistant", "user"]


def test_what_is_left_out_is_the_least() -> None:
    """With every choice of costs: what is sent fits, begins with a question, and one turn more would not fit."""
    for costs in itertools.product((1, 4, 7), repeat=5):
        for room in range(1, 36):
            n = messages_to_leave_out(costs, ROLES, room)
            starts = [start for start in (0, 2, 4) if sum(costs[start:]) <= room]
            assert n == min(starts, default=4)


def test_a_chat_without_questions_stays() -> None:
    assert messages_to_leave_out([9], ["assistant"], 1) == 0
    assert messages_to_leave_out([], [], -5) == 0


def test_room() -> None:
    assert room_for_messages(2048, 100) == 1948
    assert room_for_messages(2048, 2048) == 1536


def test_what_is_sent() -> None:
    chat = Chat([Message(role, str(n)) for n, role in enumerate(ROLES)], system="Be brief.", left_out=2)
    chat.messages.append(Message("user", "5", "a note"))
    assert chat.to_send() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4\n\n5"},
    ]
    assert chat.last_question == 5


def test_titles() -> None:
    assert Chat().title == "Empty chat"
    assert Chat([Message("user", "one\n two")]).title == "one two"
    title = Chat([Message("user", "가나다라 " * 20)]).title
    assert len(title) <= 32
    assert title.endswith("…")


def test_estimates_are_not_too_low_for_other_scripts() -> None:
    assert estimate_tokens("abcdef") == 2
    assert estimate_tokens("한글") == 6
    assert estimate_tokens("") == 0


def test_files_return_what_was_written() -> None:
    chats = [
        Chat([Message("user", "안녕 🦙\n"), Message("assistant", "```python\n1\n```")], system="짧게"),
        Chat([Message("user", "second")]),
    ]
    text = export_chats(chats)
    assert "안녕 🦙" in text
    again = import_chats(text.encode())
    assert [(chat.messages, chat.system) for chat in again] == [(chat.messages, chat.system) for chat in chats]
    assert len({chat.id for chat in [*chats, *again]}) == 4


def test_other_forms() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    for form in (messages, {"messages": messages}, {"chats": [{"messages": messages}]}):
        (chat,) = import_chats(json.dumps(form).encode())
        assert (chat.system, chat.messages) == ("s", [Message("user", "q")])


def test_a_chat_of_the_terminal_keeps_its_system_message(tmp_path: Path) -> None:
    asked: list[Any] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    transcript.save(Conversation("짧게", messages=asked, question="r"), tmp_path / "chat.json")
    (chat,) = import_chats((tmp_path / "chat.json").read_bytes())
    assert chat.system == "짧게"
    assert chat.messages == [Message("user", "q"), Message("assistant", "a"), Message("user", "r")]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ('{"system": 3, "messages": []}', "system message of chat 1 is no text"),
        ("\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "holds no chats"),
        ('{"chats": []}', "holds no chats"),
        ('{"chats": [3]}', "chat 1 of the file has no list of messages"),
        ("{}", "chat 1 of the file has no list of messages"),
        ('[{"role": "tool", "content": "x"}]', "Message 1 of chat 1 was not understood"),
        ('[{"role": "user", "content": "x"}, {"role": "user"}]', "Message 2 of chat 1 was not understood"),
        ('[{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]', "only the first one can be"),
    ],
)
def test_files_that_are_no_chats(content: str, told: str) -> None:
    with pytest.raises(ChatFileError, match=told):
        import_chats(content.encode("latin-1"))
