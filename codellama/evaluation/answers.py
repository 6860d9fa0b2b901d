"""Answers: a model is asked for samples, through the generator's public methods, and code is taken from what it says.

It knows nothing of what becomes of a sample.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from codellama.config import SamplingParams
from codellama.errors import EvaluationError
from codellama.evaluation.problems import Problem
from codellama.evaluation.settings import Settings, sample_seed

if TYPE_CHECKING:
    from codellama.llama import Llama
    from codellama.results import SamplingOptions

Form = Literal["text", "gap", "chat"]
Slot = tuple[Problem, int]
"""A sample that is to be generated: its problem, and its number among that problem's samples."""

_TAGGED = re.compile(r"\[PYTHON\][ \t]*\n?(.*?)(?:\[/PYTHON\]|\Z)", re.DOTALL)
_FENCED = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """A completion, and why it ended: "length" is a completion that was cut off."""

    completion: str
    finish_reason: str


def form_of(problems: Sequence[Problem], settings: Settings) -> Form:
    """Say how the problems are asked.

    Raises:
        EvaluationError: they cannot be asked as the settings want it.
    """
    has_gaps = problems[0].suffix is not None
    if settings.chat and not all(problem.dialog for problem in problems):
        raise EvaluationError(f"{settings.task} cannot be asked in a chat: leave --chat out")
    if settings.suffix_first and not has_gaps:
        raise EvaluationError(f"{settings.task} has no gaps to fill: leave --suffix_first out")
    return "chat" if settings.chat else "gap" if has_gaps else "text"


def check(llama: "Llama", problems: Sequence[Problem], form: Form, settings: Settings) -> None:
    """Refuse, before the first sample, what the generator would refuse in the middle of the run.

    Raises:
        PromptError: a prompt cannot be expressed, or is too long; naming its problem.
    """
    params = SamplingParams(max_gen_len=settings.max_gen_len)
    for problem in problems:
        where = f"the prompt of {problem.task_id}"
        if form == "chat":
            llama.prompts.chat(problem.dialog, params, where=where)
        elif form == "gap":
            llama.prompts.gap(problem.prompt, problem.suffix or "", params, settings.suffix_first, where)
        else:
            llama.prompts.text(problem.prompt, params, where)


def ask(llama: "Llama", slots: Sequence[Slot], form: Form, stop: tuple[str, ...], settings: Settings) -> list[Answer]:
    """Generate samples; a call of all ranks, of which world rank 0's slots count.

    Each sample depends on its problem, its number and the settings' seed alone.
    """
    options: SamplingOptions = {
        "seed": [sample_seed(settings.seed, problem.task_id, index) for problem, index in slots]
    }
    sampling = (settings.temperature, settings.top_p, settings.max_gen_len)
    if form == "chat":
        chats = llama.chat_completion([problem.dialog for problem, _ in slots], *sampling, **options)
        return [Answer("\n" + code_in(chat["generation"]["content"]), chat["finish_reason"]) for chat in chats]
    prompts = [problem.prompt for problem, _ in slots]
    options["stop"] = stop
    if form == "gap":
        suffixes = [problem.suffix or "" for problem, _ in slots]
        gaps = llama.text_infilling(prompts, suffixes, *sampling, suffix_first=settings.suffix_first, **options)
        return [Answer(gap["generation"], gap["finish_reason"]) for gap in gaps]
    texts = llama.text_completion(prompts, *sampling, **options)
    return [Answer(text["generation"], text["finish_reason"]) for text in texts]


def code_in(answer: str) -> str:
    """Take the code from an answer: between the tags that were asked for, else a fenced block, else all of it."""
    found = _TAGGED.search(answer) or _FENCED.search(answer)
    code = found[1] if found is not None else answer
    inner = _FENCED.search(code)
    return inner[1] if inner is not None else code
