"""MBPP: write a function that a sentence describes and three tests show; three solved examples come first.

Source of format, prompt and split: arXiv 2108.07732, and the data set's own repository; of the question to Instruct
models: arXiv 2308.12950, appendix.
"""

from pathlib import Path

from codellama.errors import EvaluationError
from codellama.evaluation.problems import Problem, Record, read_records, refuse_repeats
from codellama.prompts import Message

STOP: tuple[str, ...] = ("[DONE]",)
EXAMPLES = (2, 3, 4)
"""The problems that are shown with their solutions."""
FIRST, LAST = 11, 510
"""The problems that are to be solved: the test split. Those before it are for prompts, those after it for training."""
_TASK = "You are an expert Python programmer, and here is your task: {text}"
_SHOT = _TASK + " Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
_QUESTION = (
    _TASK + "\nYour code should pass these tests:\n\n{tests}\n"
    "Your code should start with a [PYTHON] tag and end with a [/PYTHON] tag."
)


def read(path: Path) -> list[Problem]:
    """Read mbpp.jsonl, sanitized-mbpp.json, or anything in their formats."""
    records = read_records(path)
    by_id = {record.integer("task_id"): record for record in records}
    missing = [str(id) for id in EXAMPLES if id not in by_id]
    if missing:
        raise EvaluationError(
            f"{path} lacks task {', '.join(missing)}; the examples of the prompt are tasks 2, 3 and 4"
        )
    examples = [by_id[id] for id in EXAMPLES]
    problems = [_problem(record, examples) for record in records if FIRST <= record.integer("task_id") <= LAST]
    if not problems:
        raise EvaluationError(f"{path} holds no task from {FIRST} to {LAST}, which are the ones to be solved")
    return refuse_repeats(problems, path)


def _problem(record: Record, examples: list[Record]) -> Problem:
    shots = "".join(f"{_ask(_SHOT, example)}{_code(example)}\n[DONE]\n" for example in examples)
    turns: list[Message] = []
    for example in examples:
        turns.append({"role": "user", "content": _ask(_QUESTION, example)})
        turns.append({"role": "assistant", "content": f"[PYTHON]\n{_code(example)}\n[/PYTHON]"})
    return Problem(
        task_id=record.integer("task_id"),
        prompt=shots + _ask(_SHOT, record),
        suffix=None,
        dialog=[*turns, {"role": "user", "content": _ask(_QUESTION, record)}],
        head="",
        tail="\n" + "\n".join([*_setup(record), *_tests(record)]) + "\n",
    )


def _ask(form: str, record: Record) -> str:
    return form.format(text=_plain(record.text("text", "prompt")).strip(), tests="\n".join(_tests(record)))


def _code(record: Record) -> str:
    return _plain(record.text("code")).strip("\n")


def _tests(record: Record) -> list[str]:
    return [_plain(test) for test in record.texts("test_list")]


def _setup(record: Record) -> list[str]:
    """Take what the tests need, which may use what the solution defines."""
    if record.has("test_imports"):
        return record.texts("test_imports")
    return [_plain(record.text("test_setup_code"))]


def _plain(text: str) -> str:
    """Take line ends as they are elsewhere; the file has some of another system."""
    return text.replace("\r\n", "\n")
