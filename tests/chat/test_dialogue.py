"""The conversation and its commands, without any model."""

import json
from pathlib import Path
from typing import Any

import pytest

from codellama.chat.commands import COMMANDS, KEYS, Reply, understand
from codellama.chat.dialogue import Conversation, Settings
from codellama.chat.transcript import TranscriptError, load, save
from codellama.errors import CodeLlamaError
from tests.support.scripted_chat import ScriptedModel
from tests.test_docs import ROOT, section

MODEL = ScriptedModel([], context=100)


def talked(*turns: str) -> Conversation:
    conversation = Conversation("be brief")
    for turn in turns:
        conversation.question = turn
        conversation.answer(turn.upper())
    return conversation


def contents(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.dialog()]


def test_what_a_model_is_shown() -> None:
    conversation = talked("a", "b")
    assert understand(conversation, "c", MODEL) == Reply(asks=True)
    assert contents(conversation) == ["be brief", "a", "A", "b", "B", "c"]
    assert [message["role"] for message in conversation.dialog()] == ["system", *["user", "assistant"] * 2, "user"]
    assert conversation.drop_turn()
    assert contents(conversation) == ["be brief", "b", "B", "c"]
    assert conversation.drop_turn()
    assert not conversation.drop_turn()
    assert contents(conversation) == ["be brief", "c"]
    conversation.answer("C")
    understand(conversation, "d", MODEL)
    assert contents(conversation) == ["be brief", "c", "C", "d"]
    assert len(conversation.messages) == 6


def test_retry_and_undo() -> None:
    conversation = talked("a", "b")
    assert understand(conversation, "/retry", MODEL) == Reply(asks=True)
    assert contents(conversation) == ["be brief", "a", "A", "b"]
    assert understand(conversation, "/retry", MODEL) == Reply(asks=True)  # it was not answered
    assert contents(conversation) == ["be brief", "a", "A", "b"]
    understand(conversation, "/undo", MODEL)
    assert contents(conversation) == ["be brief", "a", "A"]
    understand(conversation, "/undo", MODEL)
    assert contents(conversation) == ["be brief"]
    for command in ("/undo", "/retry"):
        with pytest.raises(CodeLlamaError, match="there is no"):
            understand(conversation, command, MODEL)


def test_undo_of_what_was_left_out() -> None:
    conversation = talked("a", "b")
    conversation.n_dropped = 4
    understand(conversation, "/undo", MODEL)
    conversation.question = "c"
    assert contents(conversation) == ["be brief", "c"]
    conversation.answer("C")
    conversation.question = "d"
    assert contents(conversation) == ["be brief", "c", "C", "d"]


def test_system_reset_and_exit() -> None:
    conversation = talked("a")
    understand(conversation, "/set temperature 1", MODEL)
    understand(conversation, "/system speak\nplainly", MODEL)
    understand(conversation, "/reset", MODEL)
    assert contents(conversation) == ["speak\nplainly"]
    assert conversation.settings.temperature == 1
    understand(conversation, "/system none", MODEL)
    assert contents(conversation) == []
    assert understand(conversation, "/exit", MODEL) == Reply(ends=True)


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("/set temperature 0.7", "temperature", 0.7),
        ("/set temperature=1", "temperature", 1.0),
        ("/set top_p 0", "top_p", 0),
        ("/set max-gen-len 12", "max_gen_len", 12),
        ("/set max_gen_len none", "max_gen_len", None),
        ("/set seed -3", "seed", -3),
    ],
)
def test_set(typed: str, name: str, value: float | None) -> None:
    conversation = Conversation(settings=Settings(temperature=0.5, top_p=0.5, max_gen_len=5, seed=5))
    understand(conversation, typed, MODEL)
    expected = {"temperature": 0.5, "top_p": 0.5, "max_gen_len": 5, "seed": 5} | {name: value}
    assert vars(conversation.settings) == expected


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("/set temperature warm", "temperature is 'warm'; a number was expected"),
        ("/set temperature -1", "temperature is -1"),
        ("/set temperature none", "temperature is 'none'; a number was expected"),
        ("/set top_p", "top_p is ''; a number was expected"),
        ("/set top_p nan", "top_p is nan"),
        ("/set seed 0.5", "seed is '0.5'; an integer or none was expected"),
        ("/set max_tokens 3", "max_tokens is no setting; the settings are temperature, top_p, max_gen_len, seed"),
        ("/set", "/set needs NAME VALUE"),
        ("/sytem x", "/sytem is no command; did you mean /system?"),
        ("/tmp is full", "/tmp is no command; .* written //tmp"),
        ("/show all", "/show takes nothing, but 'all' follows"),
        ("/load", "/load needs FILE"),
        ("/load /nowhere/at/all", "No such file"),
        ("broken \udcff", "not UTF-8"),
    ],
)
def test_what_cannot_be_done_changes_nothing(typed: str, message: str) -> None:
    conversation = talked("a")
    before = repr(conversation)
    with pytest.raises((CodeLlamaError, ValueError, OSError), match=message):
        understand(conversation, typed, MODEL)
    assert repr(conversation) == before


@pytest.mark.parametrize(
    ("typed", "question"),
    [("/usr/bin/python fails", "/usr/bin/python fails"), ("//set x", "/set x"), ("a\n/set x", "a\n/set x"), ("/", "/")],
)
def test_questions_with_slashes(typed: str, question: str) -> None:
    conversation = Conversation()
    assert understand(conversation, typed, MODEL).asks
    assert conversation.question == question


def test_show_and_help() -> None:
    conversation = talked("a", "b")
    shown = understand(conversation, "/show", MODEL).text.splitlines()
    assert shown[:2] == ["system       be brief", "temperature  0.2"]
    assert shown[-2:] == ["turns        2, of which 0 are no longer shown", "tokens       19 of 100"]
    said = understand(conversation, "/help", MODEL).text
    assert all(f"/{name} " in said for name in COMMANDS)
    assert said.endswith(KEYS)


def test_the_documentation_lists_the_commands() -> None:
    rows = section(ROOT / "docs/chat.md", "command")
    assert [row[0].split()[0] for row in rows] == [f"/{name}" for name in COMMANDS]


def test_a_saved_chat_is_the_same_chat(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    conversation = talked("질문 <|>", "b")
    conversation.settings = Settings(temperature=0, top_p=1, max_gen_len=7, seed=3)
    understand(conversation, f"/save {path}", MODEL)
    assert json.loads(path.read_text()) == {
        "version": 1,
        "system": "be brief",
        "settings": {"temperature": 0, "top_p": 1, "max_gen_len": 7, "seed": 3},
        "messages": [
            {"role": "user", "content": "질문 <|>"}, {"role": "assistant", "content": "질문 <|>"},
            {"role": "user", "content": "b"}, {"role": "assistant", "content": "B"},
        ],
    }  # fmt: skip
    other = talked("x")
    assert understand(other, f"/load {path}", MODEL).text == "2 turns are loaded"
    assert other == conversation
    understand(other, "c", MODEL)
    understand(other, f"/save {path}", MODEL)  # a file of ours is written anew
    assert "/retry" in understand(conversation, f"/load {path}", MODEL).text
    assert conversation == other
    assert [file.name for file in tmp_path.iterdir()] == ["chat.json"]


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TranscriptError, match="not overwritten"):
        save(talked("a"), tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_chat_that_a_page_exported(tmp_path: Path) -> None:
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    path = tmp_path / "chats.json"
    path.write_text(json.dumps({"chats": [{"title": "t", "messages": messages}]}))
    conversation = load(path)
    assert (conversation.system, conversation.messages) == ("system", messages[1:])
    unanswered = [{"role": "user", "content": text} for text in ("a", "b", "c")]
    path.write_text(json.dumps({"chats": [{"title": "t", "messages": [*messages, *unanswered]}]}))
    conversation = load(path)
    assert (conversation.messages, conversation.question) == (messages[1:], "a\n\nb\n\nc")
    path.write_text(json.dumps({"chats": [{"title": "t", "messages": messages}] * 2}))
    with pytest.raises(TranscriptError, match="holds 2 chats; one was expected: the page exports one by itself"):
        load(path)


GOOD: dict[str, Any] = {"version": 1, "system": "", "settings": {}, "messages": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ([], "settings, system, version was expected"),
        (GOOD | {"more": 1}, "messages, settings, system, version was expected"),
        (GOOD | {"version": 2}, "is of version 2; 1 was expected"),
        (GOOD | {"system": None}, "has system None; a text"),
        (GOOD | {"system": "\ud83d"}, "a text was expected"),
        (GOOD | {"settings": {"temperature": "0"}}, "temperature is '0'; a number"),
        (GOOD | {"settings": {"warmth": 1}}, "some of temperature, top_p, max_gen_len, seed were expected"),
        (GOOD | {"messages": {}}, "a list was expected"),
        (GOOD | {"messages": [{"role": "assistant", "content": "x"}]}, "message 0 is .* from 'user' was expected"),
        (GOOD | {"messages": [{"role": "user", "content": "x"}] * 2}, "message 1 is .* from 'assistant' was expected"),
        (GOOD | {"messages": [{"role": "user", "content": 1}]}, "message 0 is"),
        (GOOD | {"messages": [{"role": "user"}]}, "role and content were expected"),
    ],
)
def test_a_file_that_is_no_chat_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "chat.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    conversation = talked("a")
    before = repr(conversation)
    with pytest.raises(TranscriptError, match=message):
        understand(conversation, f"/load {path}", MODEL)
    assert repr(conversation) == before
