"""Flags: from words to keyword arguments, and what is said of words that cannot be understood."""

import inspect
from typing import Any

import pytest

from codellama.flags import Explanation, UsageError, flags_of, guess, parse


def command(
    source: str,
    target: str | None = None,
    *,
    prompt: str | None = None,
    temperature: float = 0.5,
    max_gen_len: int | None = 7,
    rows: int = 3,
    suffix_first: bool = False,
    loud: bool = True,
) -> None:
    """Do nothing."""


EXPLANATIONS = {name: Explanation("", f"what {name} is") for name in inspect.signature(command).parameters}


def understand(*words: str) -> dict[str, Any]:
    return parse(flags_of(command, EXPLANATIONS), words, "prog do")


def message(*words: str) -> str:
    with pytest.raises(UsageError) as caught:
        understand(*words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], {"source": "a"}),
        (["a", "b"], {"source": "a", "target": "b"}),
        (["-"], {"source": "-"}),
        (["--target", "b", "a"], {"source": "a", "target": "b"}),
        (["--source=a", "b"], {"source": "a", "target": "b"}),
        (["a", "--prompt", "[1, 2]"], {"source": "a", "prompt": "[1, 2]"}),
        (["a", "--prompt", "123"], {"source": "a", "prompt": "123"}),
        (["a", "--prompt", "None"], {"source": "a", "prompt": "None"}),
        (["a", "--prompt", "-"], {"source": "a", "prompt": "-"}),
        (["a", "--prompt", "-- a comment"], {"source": "a", "prompt": "-- a comment"}),
        (["a", "--prompt=--rows"], {"source": "a", "prompt": "--rows"}),
        (["a", "--prompt=x = 1\ny = 2"], {"source": "a", "prompt": "x = 1\ny = 2"}),
        (["a", "--prompt="], {"source": "a", "prompt": ""}),
        (["a", "--temperature", "-1"], {"source": "a", "temperature": -1}),
        (["a", "--temperature=-.5"], {"source": "a", "temperature": -0.5}),
        (["a", "--temperature", "1e-3"], {"source": "a", "temperature": 0.001}),
        (["a", "--max-gen-len", "9"], {"source": "a", "max_gen_len": 9}),
        (["a", "--max_gen_len", "None"], {"source": "a", "max_gen_len": None}),
        (["--suffix_first", "a"], {"source": "a", "suffix_first": True}),
        (["a", "--no-suffix_first"], {"source": "a", "suffix_first": False}),
        (["a", "--no_suffix-first"], {"source": "a", "suffix_first": False}),
        (["a", "--suffix_first=False"], {"source": "a", "suffix_first": False}),
        (["a", "--suffix-first=True"], {"source": "a", "suffix_first": True}),
        (["a", "--no-loud"], {"source": "a", "loud": False}),
        (["--rows", "2", "--", "--rows", "--"], {"source": "--rows", "target": "--", "rows": 2}),
    ],
)
def test_words_become_arguments(words: list[str], expected: dict[str, object]) -> None:
    given = understand(*words)
    assert given == expected
    assert {name: type(value) for name, value in given.items()} == {
        name: type(value) for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "--tempratur", "1"], "--tempratur is no flag of prog do; did you mean --temperature?"),
        (["a", "--Max-Gen-Length=1"], "--Max-Gen-Length is no flag of prog do; did you mean --max_gen_len?"),
        (["a", "--temp", "1"], "--temp is no flag of prog do; did you mean --temperature?"),
        (["a", "--nosuffix_first"], "--nosuffix_first is no flag of prog do; did you mean --no-suffix_first?"),
        (["a", "-prompt", "x"], "-prompt is no flag of prog do; did you mean --prompt?"),
        (["a", "--xyz"], "--xyz is no flag of prog do"),
        (["a", "--no-rows"], "--no-rows is no flag of prog do; did you mean --rows?"),
        (["a", "--=1"], "-- is no flag of prog do"),
        (["a", "--rows"], "--rows needs a value: what rows is"),
        (
            ["a", "--prompt", "--rows", "2"],
            "--prompt needs a value, but --rows follows; if that is the value: --prompt=--rows",
        ),
        (["a", "--rows", "abc"], "--rows is 'abc'; an integer was expected"),
        (["a", "--rows", "1.5"], "--rows is '1.5'; an integer was expected"),
        (["a", "--rows", "True"], "--rows is 'True'; an integer was expected"),
        (["a", "--rows", "None"], "--rows is 'None'; an integer was expected"),
        (["a", "--rows="], "--rows is ''; an integer was expected"),
        (["a", "--max-gen-len", "[1]"], "--max-gen-len is '[1]'; an integer or None was expected"),
        (["a", "--rows", "{[1]: 2}"], "--rows is '{[1]: 2}'; an integer was expected"),
        (["a", "--temperature", "warm"], "--temperature is 'warm'; a number was expected"),
        (["a", "--suffix_first=maybe"], "--suffix_first is 'maybe'; True or False was expected"),
        (
            ["a", "--suffix_first", "false"],
            "--suffix_first is a switch, which takes no value: write --suffix_first=False",
        ),
        (["a", "--no-loud=True"], "--no-loud is a switch, which takes no value: leave out =True"),
        (["a", "--rows", "1", "--rows", "1"], "--rows is given twice"),
        (["a", "--loud", "--no-loud"], "--loud is given twice"),
        (["a", "--source", "b"], "SOURCE is given twice"),
        (["a", "b", "c"], "'c' is a word too many; prog do takes no word after SOURCE TARGET"),
        ([], "prog do needs SOURCE: what source is"),
    ],
)
def test_what_cannot_be_understood_is_said(words: list[str], expected: str) -> None:
    assert message(*words) == expected


def test_a_command_without_words_says_so() -> None:
    def flags_only(*, rows: int = 1) -> None: ...

    with pytest.raises(UsageError, match=r"^'x' is a word too many; prog takes flags only$"):
        parse(flags_of(flags_only, {"rows": Explanation("", "")}), ["x"], "prog")


def test_a_parameter_that_no_flag_can_be_is_our_mistake() -> None:
    def listing(*, rows: list[int]) -> None: ...

    with pytest.raises(AssertionError, match=r"rows of listing is list\[int\], which no flag can be"):
        flags_of(listing, {"rows": Explanation("", "")})


def test_a_parameter_without_explanation_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="the docstring of command does not explain rows"):
        flags_of(command, {name: text for name, text in EXPLANATIONS.items() if name != "rows"})


@pytest.mark.parametrize(
    ("word", "meant"), [("complet", "complete"), ("com", "complete"), ("CHAT", "chat"), ("", None), ("dance", None)]
)
def test_guess(word: str, meant: str | None) -> None:
    assert guess(word, ["complete", "chat"]) == meant
