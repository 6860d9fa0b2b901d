"""Problems of our own in the formats of HumanEval, its infilling variant, and MBPP: small functions of known results.

What a function should return is computed here by another expression than the one in its solution.
"""

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Exercise:
    """A small function: its name, what it does, its body, and what it returns for some arguments."""

    name: str
    parameters: str
    purpose: str
    body: str
    expected: dict[str, str]

    @property
    def header(self) -> str:
        return f"def {self.name}({self.parameters}):\n"

    @property
    def mutated(self) -> str:
        """The body, with a result that is none of those expected."""
        assert self.body.count("return ") == 1
        return self.body.replace("return ", "return 'wrong', ")

    @property
    def tests(self) -> list[str]:
        return [f"assert {self.name}({arguments}) == {value}" for arguments, value in self.expected.items()]


def _exercise(
    name: str, parameters: str, purpose: str, body: str, right: Callable[..., Any], inputs: Iterable[tuple[Any, ...]]
) -> Exercise:
    expected = {", ".join(map(repr, given)): repr(right(*given)) for given in inputs}
    return Exercise(name, parameters, purpose, "".join(f"    {line}\n" for line in body.split("\n")), expected)


def exercises(count: int = 164) -> list[Exercise]:
    """So many, always the same."""
    made: list[Exercise] = []
    numbers, words = [([],), ([4, -1, 9, 9],), ([3, 12, 7, 0, 5, 8],)], [("",), ("banana",), ("Code and tea",)]
    for c in range(2, 60):
        letter = chr(ord("a") + c % 26)
        made += [
            _exercise(
                f"add_{c}", "x", f"Add {c} to x.", f"total = x + {c}\nreturn total", c.__add__, [(0,), (-7,), (41,)]
            ),
            _exercise(
                f"larger_than_{c}", "values", f"Keep the values that are larger than {c}.",
                f"kept = []\nfor value in values:\n    if value > {c}:\n        kept.append(value)\nreturn kept",
                lambda values, c=c: list(filter(c.__lt__, values)), numbers,
            ),
            _exercise(
                f"count_{letter}_{c}", "text", f"Count how often {letter!r} stands in text.",
                f"count = 0\nfor letter in text:\n    count += letter == {letter!r}\nreturn count",
                lambda text, letter=letter: text.count(letter), words,
            ),
            _exercise(
                f"every_{c}th", "values", f"Take every {c}th value, from the first one on.",
                f"return [value for index, value in enumerate(values) if index % {c} == 0]",
                lambda values, c=c: values[::c], numbers,
            ),
        ]  # fmt: skip
    assert len(made) >= count
    return made[:count]


def humaneval_record(exercise: Exercise, number: int) -> Json:
    arguments, value = list(exercise.expected.items())[1]
    docstring = f'"""{exercise.purpose}\n\n    >>> {exercise.name}({arguments})\n    {value}\n    """'
    checks = "".join(f"    assert candidate({given}) == {result}\n" for given, result in exercise.expected.items())
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f"{exercise.header}    {docstring}\n",
        "entry_point": exercise.name,
        "canonical_solution": exercise.body,
        "test": f"METADATA = {{}}\n\n\ndef check(candidate):\n{checks}",
    }


def humaneval(count: int = 164) -> list[Json]:
    return [humaneval_record(exercise, number) for number, exercise in enumerate(exercises(count))]


def infilling(count: int) -> list[Json]:
    """One line of each body is missing: the last one."""
    records = []
    for number, exercise in enumerate(exercises(count)):
        record = humaneval_record(exercise, number)
        lines = exercise.body.splitlines(keepends=True)
        records.append(
            record
            | {
                "task_id": f"SingleLineInfilling/HumanEval/{number}/L{len(lines) - 1}",
                "prompt": record["prompt"] + "".join(lines[:-1]),
                "canonical_solution": lines[-1],
                "suffix": "\n\n# The end.\n",
            }
        )
    return records


def mbpp(count: int) -> list[Json]:
    """Tasks 2, 3 and 4, and so many from 11 on, as in mbpp.jsonl."""
    ids = [2, 3, 4, *range(11, 11 + count)]
    return [
        {
            "text": f"Write a function: {exercise.purpose}",
            "code": f"{exercise.header}{exercise.body}".replace("\n", "\r\n"),
            "task_id": id,
            "test_setup_code": "",
            "test_list": exercise.tests,
            "challenge_test_list": [],
        }
        for id, exercise in zip(ids, exercises(len(ids)), strict=True)
    ]


def sanitized_mbpp(count: int) -> list[Json]:
    """The same, as in sanitized-mbpp.json."""
    return [
        {
            "source_file": "own",
            "task_id": record["task_id"],
            "prompt": record["text"],
            "code": record["code"],
            "test_imports": ["import math"],
            "test_list": [*record["test_list"], "assert math.pi > 3"],
        }
        for record in mbpp(count)
    ]


def write_lines(path: Path, records: Iterable[Json]) -> Path:
    """As JSON lines; compressed where the name says so."""
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
