"""Flags: the parameters of a function as words of a command line.

Names, kinds and defaults come from the signature; explanations are handed in. It knows nothing of help pages, of exit
statuses, or of what the function does.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, get_args

from fire.parser import DefaultParseValue

VALUES = {str: "TEXT", int: "N", float: "NUMBER", bool: ""}
"""The kinds of parameters there are, and what stands for a value in the help. A bool is a switch."""
_EXPECTED = {int: "an integer", float: "a number", bool: "True or False"}
_FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)  # -1, - and "-- a comment" are none


class UsageError(Exception):
    """A command line that a command cannot understand."""


@dataclass(frozen=True)
class Explanation:
    """What a docstring says of a parameter: in one word what its value is, and what it does."""

    value: str
    text: str


@dataclass(frozen=True)
class Flag:
    """A parameter.

    Attributes:
        name: as in Python; in a command line a dash may stand for an underscore.
        kind: one of VALUES.
        default: `inspect.Parameter.empty` where the flag must be given.
        takes_none: None may be given.
        is_word: it may be given by its place, without its name.
        explanation: for the help.
    """

    name: str
    kind: type
    default: object
    takes_none: bool
    is_word: bool
    explanation: Explanation

    @property
    def is_required(self) -> bool:
        """True where the function has no default."""
        return self.default is inspect.Parameter.empty

    @property
    def label(self) -> str:
        """What the help and the messages call it: FILE for a word, --name for a flag."""
        return self.name.upper() if self.is_word else f"--{self.name}"

    def convert(self, text: str, written: str) -> object:
        """Turn a word into a value. Text stays as it is, also where it looks like a number.

        Args:
            text: the word.
            written: the flag as it was written, for the message.

        Raises:
            UsageError: it is of another kind.
        """
        if self.kind is str:
            return text
        try:
            value = DefaultParseValue(text)
        except TypeError:  # a list as the key of a dict
            value = text
        kinds = (int, float) if self.kind is float else (self.kind,)
        if type(value) in kinds or (self.takes_none and value is None):
            return value
        none = " or None" if self.takes_none else ""
        raise UsageError(f"{written} is {text!r}; {_EXPECTED[self.kind]}{none} was expected")


def flags_of(function: Callable[..., Any], explanations: Mapping[str, Explanation]) -> dict[str, Flag]:
    """Describe the parameters of a function, in their order.

    Args:
        function: each parameter is a str, int, float or bool, or one of these and None. Those before the `*` may be
            given by their place.
        explanations: by name; every parameter needs one.
    """
    flags = {}
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = parameter.annotation
        kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
        kind = next(kind for kind in kinds if kind is not NoneType)
        assert {*kinds} - {NoneType} == {kind} & VALUES.keys(), (
            f"{name} of {function.__name__} is {annotation}, which no flag can be"
        )
        assert name in explanations, f"the docstring of {function.__name__} does not explain {name}"
        is_word = parameter.kind is not parameter.KEYWORD_ONLY
        flags[name] = Flag(name, kind, parameter.default, NoneType in kinds, is_word, explanations[name])
    return flags


def parse(flags: Mapping[str, Flag], words: Sequence[str], command: str) -> dict[str, object]:
    """Turn a command line into keyword arguments.

    Args:
        flags: of the command, by name.
        words: what follows the name of the command. `--name value` and `--name=value` are the same; a switch is
            `--name`, `--no-name` or `--name=False`; after `--` nothing is a flag.
        command: its name, for the messages.

    Raises:
        UsageError: a flag that there is not, that lacks its value, that has one of another kind, or that is given
            twice; a word too many; a required flag or word too few.
    """
    given: dict[str, object] = {}
    left = list(words)
    switch = None  # the word before, where it was one
    while left:
        word = left.pop(0)
        if word == "--":
            for text in left:
                _take_word(flags, text, given, command)
            break
        if not _FLAG.fullmatch(word) and not word.startswith("--"):
            if switch is not None and word.lower() in ("true", "false"):
                raise UsageError(f"{switch} is a switch, which takes no value: write {switch}={word.capitalize()}")
            _take_word(flags, word, given, command)
            switch = None
            continue
        written, has_value, text = word.partition("=")
        flag, is_on = _find(flags, written, command)
        if flag.name in given:
            raise UsageError(f"{flag.label} is given twice")
        switch = written if flag.kind is bool and not has_value else None
        if not is_on and has_value:
            raise UsageError(f"{written} is a switch, which takes no value: leave out {has_value}{text}")
        if switch is not None:
            given[flag.name] = is_on
        else:
            text = text if has_value else _next_value(written, flag, left)
            given[flag.name] = flag.convert(text, written)
    for flag in flags.values():
        if flag.is_required and flag.name not in given:
            raise UsageError(f"{command} needs {flag.label}: {flag.explanation.text}")
    return given


def guess(word: str, known: Iterable[str]) -> str | None:
    """Say which of the known words was probably meant."""
    known = list(known)
    near = difflib.get_close_matches(word.lower(), known, n=1) or [name for name in known if name.startswith(word)]
    return near[0] if near and word else None


def _find(flags: Mapping[str, Flag], written: str, command: str) -> tuple[Flag, bool]:
    """Find the flag that is meant, and whether it is switched on."""
    name = written.lstrip("-").replace("-", "_")
    switches = {f"no_{flag.name}": flag for flag in flags.values() if flag.kind is bool}
    if written.startswith("--") and name in flags:
        return flags[name], True
    if written.startswith("--") and name in switches:
        return switches[name], False
    meant = guess(name, [*flags, *switches])
    hint = f"; did you mean --{meant.replace('no_', 'no-', 1) if meant in switches else meant}?" if meant else ""
    raise UsageError(f"{written} is no flag of {command}{hint}")


def _next_value(written: str, flag: Flag, left: list[str]) -> str:
    if not left:
        raise UsageError(f"{written} needs a value: {flag.explanation.text}")
    if _FLAG.fullmatch(left[0]):
        raise UsageError(f"{written} needs a value, but {left[0]} follows; if that is the value: {written}={left[0]}")
    return left.pop(0)


def _take_word(flags: Mapping[str, Flag], word: str, given: dict[str, object], command: str) -> None:
    """Give a word to the first parameter that takes one and has none."""
    places = [flag for flag in flags.values() if flag.is_word]
    for flag in places:
        if flag.name not in given:
            given[flag.name] = flag.convert(word, flag.label)
            return
    taken = f"no word after {' '.join(flag.label for flag in places)}" if places else "flags only"
    raise UsageError(f"{word!r} is a word too many; {command} takes {taken}")
