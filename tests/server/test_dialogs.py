"""Histories as clients send them, and the chats that they become."""

import pytest

from codellama.errors import PromptError
from codellama.prompts import check_dialog
from codellama.server.dialogs import ChatMessage, normalize_dialog

HISTORIES = {
    "parts": (
        [("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
        [("user", "a\nb")],
    ),
    "null": ([("user", "a"), ("assistant", None), ("user", "b")], [("user", "a"), ("assistant", ""), ("user", "b")]),
    "developer": ([("developer", "s"), ("user", "a")], [("system", "s"), ("user", "a")]),
    "late system": ([("user", "a"), ("system", "s")], [("system", "s"), ("user", "a")]),
    "two systems": ([("system", "s"), ("system", "t"), ("user", "a")], [("system", "s\n\nt"), ("user", "a")]),
    "lone system": ([("system", "s")], [("user", "s")]),
    "tool": ([("user", "a"), ("tool", "42")], [("user", "a\n\nResult of the tool:\n42")]),
    "same role": ([("user", "a"), ("user", "b")], [("user", "a\n\nb")]),
    "cut history": (
        [("system", "s"), ("assistant", "x"), ("user", "a")],
        [("system", "s"), ("user", ""), ("assistant", "x"), ("user", "a")],
    ),
    "ends with the assistant": (
        [("user", "a"), ("assistant", "x")],
        [("user", "a"), ("assistant", "x"), ("user", "Continue.")],
    ),
}


@pytest.mark.parametrize(("sent", "expected"), HISTORIES.values(), ids=HISTORIES)
def test_a_history_becomes_a_chat(sent: list[tuple[str, object]], expected: list[tuple[str, str]]) -> None:
    dialog = normalize_dialog([ChatMessage.model_validate({"role": role, "content": text}) for role, text in sent])
    assert [(message["role"], message["content"]) for message in dialog] == expected
    check_dialog(dialog)


def test_tool_calls_are_told_as_text() -> None:
    call = {"type": "function", "function": {"name": "run", "arguments": '{"x": 1}'}}
    sent = [ChatMessage(role="user", content="a"), ChatMessage(role="assistant", tool_calls=[call])]
    assert normalize_dialog([*sent, ChatMessage(role="tool", name="run", content="2")])[1:] == [
        {"role": "assistant", "content": 'run({"x": 1})'},
        {"role": "user", "content": "Result of run:\n2"},
    ]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty"),
        ([{"role": "king", "content": "a"}], "message 0 has role 'king'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "part of type 'image_url'"),
    ],
)
def test_what_is_no_history(messages: list[dict[str, object]], reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        normalize_dialog([ChatMessage.model_validate(message) for message in messages])
