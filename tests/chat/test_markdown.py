"""What a page renders, whole and at each moment of its growth."""

import re

import pytest

from codellama.chat.markdown import to_markdown

ANSWER = """Cost: $5 and $6, `x = "$a"`:

```python
price = "$5"  # :red[no]
link = "![a](b)"
```
1. Look:
   ~~~
   ```
   ~~~
``a`b`` :material/home: ![x](http://else/where.png) done."""


def test_code_stays_and_the_rest_is_literal() -> None:
    whole = to_markdown(ANSWER)
    assert 'price = "$5"  # :red[no]\nlink = "![a](b)"' in whole
    assert r'Cost: \$5 and \$6, `x = "$a"`:' in whole
    assert whole.endswith(r"``a`b`` \:material/home: !\[x](http://else/where.png) done.")


@pytest.mark.parametrize(
    "before",
    [
        r"\`",  # no code begins there
        "a line\n    ```\n",  # too far to the right for a fence
        "```\n    ```\n```\n",  # the second one closes nothing
        "* one\n\n  ```\n  code\n",  # the list ends, and its code with it
        "| a | b |\n|---|---|\n| `x | ",  # a cell ends in the middle of code
    ],
)
def test_no_image_is_taken_for_code(before: str) -> None:
    for growing in (False, True):
        shown = to_markdown(f"{before}![x](http://else/where.png) `", growing=growing)
        assert "![" not in shown
        assert r"!\[x](http://else/where.png)" in shown


@pytest.mark.parametrize(
    "text", ["a: b", "http://host:80/x", "f(x): int", r"\$5", "12:30", "한글: 예", "| a | b |\n|:-|:-:|"]
)
def test_what_needs_no_change(text: str) -> None:
    assert to_markdown(text) == text


@pytest.mark.parametrize(
    ("grown", "shown"),
    [
        ("Here:\n", "Here:\n"),
        ("Here:\n`", "Here:"),
        ("Here:\n```", "Here:"),
        ("Here:\n```py", "Here:"),  # its language may be longer
        ("Here:\n```py\n", "Here:\n```py\n"),
        ("Here:\n```py\nx = 1\n``", "Here:\n```py\nx = 1"),
        ("Here:\n```py\nx = 1\n```", "Here:\n```py\nx = 1\n```"),
        ("Use `pri", "Use `pri`"),
        ("Use `", "Use "),
        ("Use `print`", "Use `print`"),
    ],
)
def test_half_finished(grown: str, shown: str) -> None:
    assert to_markdown(grown, growing=True) == shown


def test_growth_never_shows_a_fence_as_text() -> None:
    """At no moment is a line of one or two backticks shown, or a fence without the end of its line opened."""
    for end in range(len(ANSWER) + 1):
        shown = to_markdown(ANSWER[:end], growing=True)
        *_, last = shown.split("\n")
        assert not re.fullmatch(r"\s*(`{1,2}|~{1,2}|(`{3,}|~{3,})\w+)", last)
    assert to_markdown(ANSWER, growing=True) == to_markdown(ANSWER)
