"""What is asked of every help page, whoever prints it."""

import inspect
import re
from collections.abc import Callable
from typing import Any


def check_page(page: str, function: Callable[..., Any]) -> None:
    """Fail unless a help page of a function says what it is for, each flag with its default, and an example."""
    check_looks(page)
    summary = (function.__doc__ or "").partition("\n")[0]
    assert summary != ""
    assert page.startswith(summary)
    for name, parameter in inspect.signature(function).parameters.items():
        label = name.upper() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD else f"--{name}"
        found = re.findall(rf"^  {label}(?: [A-Z]+)?  +(\S.*(?:\n {{8,}}.*)*)", page, re.MULTILINE)
        assert len(found) == 1, label
        (text,) = (" ".join(entry.split()) for entry in found)
        assert len(text) > 10, label
        if parameter.default is False:
            assert text.endswith("(a switch; default: off)"), label
        elif parameter.default is True:
            assert text.endswith("(a switch; default: on)"), label
        elif parameter.default in (None, parameter.empty):
            assert "default" not in text, label
        else:
            assert text.endswith(f"(default: {parameter.default})"), label
    assert re.search(r"^Usage: \S+", page, re.MULTILINE)
    assert re.search(r"^  --help, -h +\S", page, re.MULTILINE)
    assert len(examples_of(page)) >= 2


def check_looks(page: str) -> None:
    """Fail unless a page is plain text of at most 100 columns without the words of python-fire."""
    assert max(map(len, page.splitlines())) <= 100
    assert page.replace("\n", "").isprintable()
    for word in ("GROUP", "FIRE_METADATA", "SYNOPSIS", "VALUE_", "Type:", "Default:", "None", "  \n"):
        assert word not in page, word


def examples_of(page: str) -> list[str]:
    """Take the example command lines out of a page."""
    (block,) = re.findall(r"^Examples:\n((?:  .*\n)+)", page, re.MULTILINE)
    return [line.strip() for line in block.splitlines()]
