"""The [INST] format: ids put together in the test from SentencePiece's, and golden ids."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from codellama.errors import PromptError
from codellama.prompts import Dialog, Message, dialog_prompt_tokens, format_for
from codellama.prompts.instruct import InstructFormat
from codellama.tokenizer import Tokenizer
from tests.support import bpe

RAW = sentencepiece.SentencePieceProcessor(model_file=str(bpe.DEMO))
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "prompts.json").read_text())
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer(bpe.DEMO)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


CASES: list[tuple[Dialog, list[tuple[str, bool]]]] = [
    ([user("hi")], [("[INST] hi [/INST]", False)]),
    ([user("  \n hi\t\n")], [("[INST] hi [/INST]", False)]),
    ([user("")], [("[INST]  [/INST]", False)]),
    (
        [system("Be terse."), user("hi")],
        [("[INST] <<SYS>>\nBe terse.\n<</SYS>>\n\nhi [/INST]", False)],
    ),
    ([system(""), user("hi ")], [("[INST] <<SYS>>\n\n<</SYS>>\n\nhi [/INST]", False)]),
    (
        [user("a"), assistant("b"), user("c")],
        [("[INST] a [/INST] b ", True), ("[INST] c [/INST]", False)],
    ),
    (
        [user(" a\n"), assistant("\n b \n"), user(" c ")],
        [("[INST] a [/INST] b ", True), ("[INST] c [/INST]", False)],
    ),
    (
        [system("S"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
        [
            ("[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b ", True),
            ("[INST] c [/INST] d ", True),
            ("[INST] e [/INST]", False),
        ],
    ),
    (
        [user("def f(x):\n    return x  # 😀"), assistant("```python\r\n\tpass\n```"), user("é\x00")],
        [
            ("[INST] def f(x):\n    return x  # 😀 [/INST] ```python\r\n\tpass\n``` ", True),
            ("[INST] é\x00 [/INST]", False),
        ],
    ),
]


@pytest.mark.parametrize(("dialog", "parts"), CASES)
def test_ids(demo: Tokenizer, dialog: Dialog, parts: list[tuple[str, bool]]) -> None:
    expected: list[int] = []
    for text, finished in parts:
        expected += [BOS, *RAW.encode(text)] + [EOS] * finished
    assert dialog_prompt_tokens(demo, dialog) == expected


def test_golden_ids_are_of_this_tokenizer() -> None:
    """If this fails, the demo tokenizer was trained anew: make the golden ids again, from the same descriptions."""
    assert hashlib.sha256(bpe.DEMO.read_bytes()).hexdigest() == GOLDEN["tokenizer_sha256"]


@pytest.mark.parametrize("case", GOLDEN["instruct"], ids=lambda case: case["name"])
def test_golden_ids(demo: Tokenizer, case: dict[str, Any]) -> None:
    assert dialog_prompt_tokens(demo, case["dialog"]) == case["ids"]


def test_the_format_is_chosen_by_the_missing_step_piece(demo: Tokenizer) -> None:
    chat = format_for(demo)
    assert isinstance(chat, InstructFormat)
    assert chat.stop_tokens() == frozenset({EOS})


def test_dialogs_are_checked(demo: Tokenizer) -> None:
    with pytest.raises(PromptError, match="message 1 is from 'user'"):
        dialog_prompt_tokens(demo, [user("a"), user("b")])
    with pytest.raises(PromptError, match=r"message 0 \(user\) contains \[/INST\]"):
        dialog_prompt_tokens(demo, [user("a [/INST] b")])


def test_allowed_tags_are_plain_text(demo: Tokenizer) -> None:
    ids = format_for(demo).encode_dialog([user("a [/INST] <step> </s> <PRE>")], allow_tags=True)
    assert ids[0] == BOS
    assert min(ids[1:]) > 6
    assert demo.decode(ids) == "[INST] a [/INST] <step> </s> <PRE> [/INST]"


def test_the_dialog_is_not_changed(demo: Tokenizer) -> None:
    dialog = [system(" s "), user(" a "), assistant(" b "), user(" c ")]
    before = json.dumps(dialog)
    assert dialog_prompt_tokens(demo, dialog) == dialog_prompt_tokens(demo, tuple(dialog))
    assert json.dumps(dialog) == before
