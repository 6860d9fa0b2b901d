"""Commands: functions that are run from a command line, with their help and their exit status.

The help is made of what a function says of itself: its signature, and `Args` and `Examples` of its docstring. This
module knows nothing of what a function does, and loads nothing for it: what needs torch imports it when it runs.
"""

import inspect
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codellama.errors import CodeLlamaError
from codellama.flags import VALUES, Explanation, Flag, UsageError, flags_of, guess, parse

WIDTH = 80  # columns of a help page
_GLUE = "\N{NO-BREAK SPACE}"  # where a line must not be wrapped
_HELP = ("--help", "-h")
_HELP_ROW = ("--help, -h", "print this text")
_SECTION = re.compile(r"^([A-Z]\w+):\n((?:(?:    .*)?\n)+)", re.MULTILINE)  # a heading and its indented lines
_ENTRY = re.compile(r"^(\w+)(?: \((.+?)\))?: (.*(?:\n    .*)*)", re.MULTILINE)  # name (VALUE): what it does


@dataclass(frozen=True)
class Command:
    """A function, as the command line sees it.

    Attributes:
        name: all that is typed before the flags.
        call: the function.
        purpose: paragraphs of its docstring; the first one is a line.
        flags: its parameters, by name.
        examples: command lines from its docstring.
    """

    name: str
    call: Callable[..., Any]
    purpose: list[str]
    flags: dict[str, Flag]
    examples: list[str]

    def help(self) -> str:
        """Write the help page."""
        words = [flag for flag in self.flags.values() if flag.is_word]
        flags = [flag for flag in self.flags.values() if not flag.is_word]
        places = [flag.label if flag.is_required else f"[{flag.label}]" for flag in words]
        return _page(
            *self.purpose,
            " ".join(["Usage:", self.name, *places, "[flags]"]),
            _table("Words:", [_row(flag) for flag in words]),
            _table("Flags:", [*map(_row, flags), _HELP_ROW]),
            _listing("Examples:", self.examples),
        )


def commands_of(functions: Mapping[str, Callable[..., Any]], program: str) -> dict[str, Command]:
    """Describe the commands of a program.

    Args:
        functions: by the name of the command. The first one that explains a flag explains it for all that do not.
        program: the name of the whole; a function without a name is the whole.
    """
    commands = {}
    shared: dict[str, Explanation] = {}
    for name, function in functions.items():
        docstring = (inspect.getdoc(function) or "") + "\n"
        sections = {heading: textwrap.dedent(body) for heading, body in _SECTION.findall(docstring)}
        entries = _ENTRY.findall(sections.get("Args", ""))
        own = {entry: Explanation(value, " ".join(text.split()).rstrip(".")) for entry, value, text in entries}
        shared = {**own, **shared}
        commands[name] = Command(
            f"{program} {name}".strip(),
            function,
            _SECTION.split(docstring, maxsplit=1)[0].strip().split("\n\n"),
            flags_of(function, {**shared, **own}),
            sections.get("Examples", "").split("\n"),
        )
    return commands


def run_command(
    functions: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    program: str,
    *,
    about: str = "",
    version: str = "",
    words: Sequence[str] | None = None,
) -> None:
    """Be a program: understand the whole command line, then call the function that it names.

    Help goes to standard output. A command line that cannot be understood ends the process with status 2 before the
    function is called; an error of ours, or a wrong value or file, with status 1; Ctrl-C with 130. Each of the first
    two is a line or two on standard error. Log messages from INFO on go there, too.

    Args:
        functions: one function, or several by name, of which the first word of the command line chooses one. The
            parameters are the flags; see `flags_of`. The docstring gives the help: its text, `Args`, where
            `name (VALUE): text` says what stands for the value, and `Examples`.
        program: its name, as it is typed.
        about: what a program with several functions is for, in one line.
        version: what --version prints.
        words: the command line; None is the one that the process was started with.

    Raises:
        SystemExit: the status is not 0.
    """
    words = list(sys.argv[1:] if words is None else words)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # the ranks of a host have one command line: one of them speaks
    asker = program
    try:
        if isinstance(functions, Mapping):
            commands = commands_of(functions, program)
            if words[:1] == ["help"]:
                words = [*words[1:], "--help"]
            if not words or words[0] in _HELP:
                return _print(_overview(commands, program, about), is_first)
            if words[0] == "--version":
                return _print(f"{program} {version}\n", is_first)
            command = _choose(commands, words.pop(0), program)
        else:
            command = commands_of({"": functions}, program)[""]
        asker = command.name
        if not set(_HELP).isdisjoint(words[: words.index("--")] if "--" in words else words):
            return _print(command.help(), is_first)
        arguments = parse(command.flags, words, command.name)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        command.call(**arguments)
        sys.stdout.flush()  # while a closed pipe can still be noticed here
    except UsageError as error:
        if is_first:
            print(f"{error}\nSee {asker} --help.", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
    except (CodeLlamaError, OSError, TypeError, ValueError) as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _choose(commands: Mapping[str, Command], word: str, program: str) -> Command:
    if word in commands:
        return commands[word]
    meant = guess(word, [*commands, "--version", "--help"])
    hint = f"did you mean {meant}?" if meant else f"the commands are {', '.join(commands)}"
    raise UsageError(f"{word} is no command of {program}; {hint}")


def _overview(commands: Mapping[str, Command], program: str, about: str) -> str:
    """Write the help page that lists the commands."""
    return _page(
        about,
        f"Usage: {program} COMMAND [flags]",
        _table("Commands:", [(name, command.purpose[0].rstrip(".")) for name, command in commands.items()]),
        _table("Flags:", [("--version", "print the version"), _HELP_ROW]),
        _listing("Examples:", [command.examples[0] for command in commands.values()]),
        f"{program} COMMAND --help explains a command and its flags.",
    )


def _row(flag: Flag) -> tuple[str, str]:
    """Name a flag and its value on the left, and explain it on the right."""
    value = "" if flag.is_word else flag.explanation.value or VALUES[flag.kind]
    if flag.kind is bool:
        default = f" (a switch; default:{_GLUE}{'on' if flag.default else 'off'})"
    else:
        default = "" if flag.default is None or flag.is_required else f" (default:{_GLUE}{flag.default})"
    return f"{flag.label} {value}".strip(), flag.explanation.text + default


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Write two columns, the right one wrapped; nothing where there are no rows."""
    column = max((len(left) for left, _ in rows), default=0) + 4
    lines = [
        textwrap.fill(
            right, WIDTH, initial_indent=f"  {left}".ljust(column), subsequent_indent=" " * column,
            break_on_hyphens=False,
        )
        for left, right in rows
    ]  # fmt: skip
    return "\n".join([title, *lines]).replace(_GLUE, " ") if rows else ""


def _listing(title: str, lines: Sequence[str]) -> str:
    """Write lines as they are; nothing where there are none."""
    return "\n".join([title, *(f"  {line}" for line in lines if line)]) if any(lines) else ""


def _page(*parts: str) -> str:
    """Join the parts that are not empty; those of one paragraph are wrapped."""
    wrapped = [part if "\n  " in part else textwrap.fill(part, WIDTH) for part in parts if part]
    return "\n\n".join(wrapped) + "\n"


def _print(text: str, is_first: bool) -> None:
    if is_first:
        print(text, end="", flush=True)
