"""HumanEval infilling: write what is missing in the middle of a function: a line, several, or a random span.

Source of the format: arXiv 2207.14255, and the data set's own repository. Code Llama's two orders, prefix-suffix-middle
and suffix-prefix-middle, are the generator's: arXiv 2308.12950, section 2.3.
"""

from pathlib import Path

from codellama.evaluation.humaneval import test_of
from codellama.evaluation.problems import Problem, Record, read_records, refuse_repeats

STOP: tuple[str, ...] = ()
"""The model ends the middle by itself, with EOT."""


def read(path: Path) -> list[Problem]:
    """Read HumanEval-SingleLineInfilling.jsonl, its siblings, or anything in their format."""
    return refuse_repeats([_problem(record) for record in read_records(path)], path)


def _problem(record: Record) -> Problem:
    prompt, suffix = record.text("prompt"), record.text("suffix")
    return Problem(
        task_id=record.text("task_id"), prompt=prompt, suffix=suffix, dialog=(), head=prompt,
        tail=suffix + test_of(record),
    )  # fmt: skip
