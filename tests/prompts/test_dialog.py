"""Which dialogs are accepted, and that each refusal names the message."""

import re
from typing import Any

import pytest

from codellama.errors import PromptError
from codellama.prompts import TAGS, check_dialog


def say(*roles: str) -> list[Any]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": f"words {index}"} for index, role in enumerate(roles)]


@pytest.mark.parametrize("roles", ["u", "su", "uau", "suau", "uauauau", "suauauau"])
def test_accepted(roles: str) -> None:
    check_dialog(say(*roles))
    check_dialog(tuple(say(*roles)))


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("a", "message 0 is from 'assistant'; 'user' was expected"),
        ("uu", "message 1 is from 'user'; 'assistant' was expected"),
        ("us", "message 1 is from 'system'; 'assistant' was expected"),
        ("sa", "message 1 is from 'assistant'; 'user' was expected"),
        ("ss", "message 1 is from 'system'; 'user' was expected"),
        ("ssu", "message 1 is from 'system'; 'user' was expected"),
        ("suu", "message 2 is from 'user'; 'assistant' was expected"),
        ("uas", "message 2 is from 'system'; 'user' was expected"),
        ("uaa", "message 2 is from 'assistant'; 'user' was expected"),
        ("suaa", "message 3 is from 'assistant'; 'user' was expected"),
        ("ua", "message 1, the last one, is from 'assistant'; it must be from 'user'"),
        ("sua", "message 2, the last one, is from 'assistant'; it must be from 'user'"),
        ("s", "the dialog has a system message alone; a user message must follow it"),
        ("", "the dialog is empty; it needs at least one user message"),
    ],
)
def test_roles_out_of_order(roles: str, message: str) -> None:
    with pytest.raises(PromptError, match=re.escape(message)):
        check_dialog(say(*roles))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("hello", "is 'hello'; a dict with role and content was expected"),
        (None, "is None; a dict with role and content was expected"),
        (("user", "x"), "is ('user', 'x'); a dict with role and content was expected"),
        ({}, "is {}; a dict with role and content was expected"),
        ({"role": "user"}, "is {'role': 'user'}; a dict with role and content was expected"),
        ({"content": "x"}, "is {'content': 'x'}; a dict with role and content was expected"),
        ({"role": "user", "content": "x", "name": "Al", "id": 3}, "has unknown keys: id, name"),
        ({"role": "tool", "content": "x"}, "has role 'tool'; system, user or assistant was expected"),
        ({"role": "User", "content": "x"}, "has role 'User'; system, user or assistant was expected"),
        ({"role": None, "content": "x"}, "has role None; system, user or assistant was expected"),
        ({"role": ["user"], "content": "x"}, "has role ['user']; system, user or assistant was expected"),
        ({"role": "user", "content": None}, "has a content of type NoneType; a string was expected"),
        ({"role": "user", "content": ["x"]}, "has a content of type list; a string was expected"),
        ({"role": "user", "content": b"x"}, "has a content of type bytes; a string was expected"),
        (
            {"role": "user", "content": "x", "destination": None},
            "has a destination of type NoneType; a string was expected",
        ),
    ],
)
@pytest.mark.parametrize("index", [0, 2, 4])
def test_bad_messages(bad: object, message: str, index: int) -> None:
    dialog = say("u", "a", "u", "a", "u")
    dialog[index] = bad
    with pytest.raises(PromptError, match=f"^message {index} " + re.escape(message)):
        check_dialog(dialog)


@pytest.mark.parametrize(
    ("dialog", "found"), [("hello", "str"), (None, "NoneType"), ({"role": "user", "content": "x"}, "dict"), (7, "int")]
)
def test_a_dialog_is_a_list(dialog: Any, found: str) -> None:
    with pytest.raises(PromptError, match=f"a dialog is a list of messages; found {found}"):
        check_dialog(dialog)


def test_the_tags() -> None:
    assert set(TAGS) == {"[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>"}


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>"])
@pytest.mark.parametrize(("index", "role"), [(0, "system"), (1, "user"), (2, "assistant"), (3, "user")])
@pytest.mark.parametrize("key", ["content", "destination"])
def test_tags_are_refused_unless_allowed(tag: str, index: int, role: str, key: str) -> None:
    dialog = say("s", "u", "a", "u")
    dialog[index][key] = f"before{tag}after"
    with pytest.raises(PromptError, match=re.escape(f"message {index} ({role}) contains {tag}, ")):
        check_dialog(dialog)
    check_dialog(dialog, allow_tags=True)


@pytest.mark.parametrize("text", ["[inst]", "[ INST]", "<SYS>", "< step>", "INST", "[INST", "<PRE>", "</s>", ""])
def test_other_text_is_no_tag(text: str) -> None:
    check_dialog([{"role": "user", "content": text}])


def test_allowed_tags_do_not_allow_anything_else() -> None:
    with pytest.raises(PromptError, match="message 1 is from 'user'"):
        check_dialog(say("u", "u"), allow_tags=True)
