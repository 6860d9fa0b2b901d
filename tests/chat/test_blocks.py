"""Where a growing Markdown text is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama.chat.blocks import Blocks

CODE = "```python\nx = 1\n\ny = 2\n```\n"


def cut(text: str, size: int = 1) -> list[str]:
    blocks = Blocks()
    finished = [block for at in range(0, len(text), size) for block in blocks.push(text[at : at + size])]
    return [*finished, blocks.rest]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("one\ntwo", ["one\ntwo"]),
        ("one\n\ntwo", ["one\n\n", "two"]),
        (f"see:\n{CODE}and", ["see:\n", CODE, "and"]),
        (f"see:\n\n{CODE}\nand", ["see:\n\n", CODE, "\nand"]),
        ("````\n```\n\n```\n````\nx", ["````\n```\n\n```\n````\n", "x"]),
        ("~~~\n```\n\n~~~\nx", ["~~~\n```\n\n~~~\n", "x"]),
        ("- item\n\n  more of it\n\n- another", ["- item\n\n  more of it\n\n", "- another"]),
        ("- item\n  ```\n  a\n\n  b\n  ```\n\nx", ["- item\n  ```\n  a\n\n  b\n  ```\n", "\nx"]),
        ("\n\none", ["\n\none"]),
        ("a\u2028\u2028b", ["a\u2028\u2028b"]),
        ("", [""]),
    ],
)
def test_blocks(text: str, blocks: list[str]) -> None:
    for size in (1, 2, 3, 100):
        assert cut(text, size) == blocks


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="a `~-\n1", max_size=60), st.integers(1, 60))
def test_nothing_is_lost_and_fences_stay_whole(text: str, size: int) -> None:
    assert "".join(cut(text, size)) == text
    assert cut(text, size) == cut(text, 1)
