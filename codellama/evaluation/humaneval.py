"""HumanEval: write the body of a function that has a signature and a docstring; zero examples.

Source of format, program and stop strings: arXiv 2107.03374, section 3.2, and the data set's own repository.
"""

from pathlib import Path

from codellama.errors import EvaluationError
from codellama.evaluation.problems import Problem, Record, read_records, refuse_repeats

STOP: tuple[str, ...] = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_QUESTION = (
    "You are an expert Python programmer, and here is your task: complete this function.\n\n{prompt}\n"
    "Your code should start with a [PYTHON] tag and end with a [/PYTHON] tag."
)
"""Of our own, after the question that the paper asks about MBPP; it does not print the one for HumanEval."""


def read(path: Path) -> list[Problem]:
    """Read HumanEval.jsonl, or anything in its format."""
    return refuse_repeats([_problem(record) for record in read_records(path)], path)


def _problem(record: Record) -> Problem:
    if record.has("suffix"):
        raise EvaluationError(f"{record.where}: there is a suffix, so this is a file for humaneval-infilling")
    prompt = record.text("prompt")
    return Problem(
        task_id=record.text("task_id"),
        prompt=prompt,
        suffix=None,
        dialog=[{"role": "user", "content": _QUESTION.format(prompt=prompt)}],
        head=prompt,
        tail=test_of(record),
    )


def test_of(record: Record) -> str:
    """Write the end of a program: the tests, and the call that runs them on the function."""
    record.text("canonical_solution")  # not used; a file without it is another one
    return f"\n{record.text('test')}\ncheck({record.text('entry_point')})\n"
