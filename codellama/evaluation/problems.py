"""Problems: what a model is asked and how a program is made of its answer; and the files that they are read from.

It knows no benchmark: each is a file of its own beside this one, and a name in tasks.py.
"""

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from codellama.errors import EvaluationError, shown
from codellama.prompts import Dialog

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Problem:
    """One problem of a benchmark. Its program is head + completion + tail, and passes if it runs to its end.

    Attributes:
        task_id: as the file has it.
        prompt: the text to continue, or what stands before the gap.
        suffix: what stands after the gap; None where there is no gap.
        dialog: the same, asked of an Instruct model; empty where the benchmark has no such form.
        head: of the program, before the completion.
        tail: after it, with the tests.
    """

    task_id: str | int
    prompt: str
    suffix: str | None
    dialog: Dialog
    head: str
    tail: str

    def program(self, completion: str) -> str:
        """Make the program that decides whether a completion is right."""
        return f"{self.head}{completion}{self.tail}"


class Task(Protocol):
    """A benchmark; a module of this folder is one.

    Attributes:
        STOP: strings that end a completion and are not part of it.
    """

    STOP: tuple[str, ...]

    def read(self, path: Path) -> list[Problem]:
        """Read the problems that are to be solved, in the order of the file.

        Raises:
            EvaluationError: the file is not in this benchmark's format.
        """
        ...


class Record:
    """One problem as a file has it, and the place to name where something is wrong with it."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        """Take a parsed line."""
        self.values = values
        self.where = where

    def text(self, *names: str) -> str:
        """Take a string; of several names, the first that is there."""
        value: str = self._take(names, str, "a string")
        return value

    def texts(self, name: str) -> list[str]:
        """Take a list of strings."""
        value: list[str] = self._take((name,), list, "a list of strings")
        if not all(isinstance(item, str) for item in value):
            raise EvaluationError(f"{self.where}: {name} is {shown(value)}; a list of strings was expected")
        return value

    def integer(self, name: str) -> int:
        """Take an integer."""
        value: int = self._take((name,), int, "an integer")
        return value

    def has(self, name: str) -> bool:
        """Say whether there is a field."""
        return name in self.values

    def _take(self, names: tuple[str, ...], kind: type, expected: str) -> Any:
        name = next((name for name in names if name in self.values), None)
        if name is None:
            raise EvaluationError(
                f"{self.where}: there is no {' or '.join(names)}; the fields are {', '.join(self.values) or 'none'}"
            )
        value = self.values[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise EvaluationError(f"{self.where}: {name} is {shown(value)}; {expected} was expected")
        return value


def read_records(path: Path) -> list[Record]:
    """Read a file of problems: JSON objects, one a line or in one list, plain or compressed by gzip.

    What it is is told from its content.

    Raises:
        EvaluationError: it is none of these, or empty; naming the line.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if data.startswith(_GZIP) else data).decode()
    except (OSError, EOFError, zlib.error) as error:
        raise EvaluationError(f"{path} begins like a gzip file, but cannot be decompressed: {error}") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not text in UTF-8: {error}") from error
    records = [Record(values, f"{path}, {where}") for where, values in _objects(path, text)]
    if not records:
        raise EvaluationError(f"{path} holds no problem; one JSON object a line was expected")
    return records


def refuse_repeats(problems: list[Problem], path: Path) -> list[Problem]:
    """Return the problems, unless two have the same id."""
    (id, count), *_ = Counter(problem.task_id for problem in problems).most_common(1)
    if count > 1:
        raise EvaluationError(f"{path} has {shown(id)} {count} times; each task_id was expected once")
    return problems


def fingerprint(path: Path) -> str:
    """Hash a file, to know it again."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _objects(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if text.lstrip().startswith("["):
        for number, value in enumerate(_parse(path, text), start=1):
            yield _object(f"entry {number}", value, path)
    else:
        for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a string may hold U+2028
            if line.strip():
                yield _object(f"line {number}", _parse(f"{path}, line {number}", line), path)


def _parse(where: object, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where} is not JSON: {error}") from error


def _object(where: str, value: Any, path: Path) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise EvaluationError(f"{path}, {where} is {shown(value)}; a JSON object was expected")
    return where, value
