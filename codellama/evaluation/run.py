"""A run: what is missing of the samples is generated, written down and marked, until there is a score.

It knows nothing of a benchmark's prompts, of sampling, or of sandboxes.
"""

import json
import os
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from codellama.errors import EvaluationError
from codellama.evaluation.answers import Answer, Slot, ask, check, form_of
from codellama.evaluation.journal import Journal, agree_on_parameters
from codellama.evaluation.marking import Execute, Marker
from codellama.evaluation.problems import fingerprint
from codellama.evaluation.settings import Settings
from codellama.evaluation.summary import Summary, summarize
from codellama.evaluation.tasks import TASKS

if TYPE_CHECKING:
    from codellama.llama import Llama

_TURNS = 8
"""Samples of one call, for each row of the cache: more keep the rows busier, fewer lose less when a run is killed."""


class Evaluation:
    """One run as world rank 0 holds it: problems, samples, results. A later one of the same folder goes on from it.

    Attributes:
        problems: that are to be solved.
        form: how they are asked.
        todo: samples that are not there yet.
    """

    def __init__(self, settings: Settings, execute: Execute | None, progress: bool = False) -> None:
        """Read the problems and what an earlier run left; start to mark what it did not.

        Args:
            settings: what to run.
            execute: None generates without running anything.
            progress: show a bar on stderr.

        Raises:
            EvaluationError: the problems cannot be read, or the folder is another run's.
            OSError: a file cannot be read or written.
        """
        self.settings = settings
        self.problems = TASKS[settings.task].read(settings.data)[: settings.limit]
        self.form = form_of(self.problems, settings)
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            folder, required = settings.output_dir, {"completion": str, "finish_reason": str}
            self._samples = stack.enter_context(Journal(folder / "samples.jsonl", required))
            self._results = stack.enter_context(Journal(folder / "results.jsonl", {"passed": bool, "reason": str}))
            agree_on_parameters(
                folder / "parameters.json", settings.parameters(fingerprint(settings.data)),
                has_samples=bool(self._samples.entries), has_results=bool(self._results.entries),
            )  # fmt: skip
            if not self._results.entries.keys() <= self._samples.entries.keys():
                raise EvaluationError(
                    f"{folder / 'results.jsonl'} has results of samples that {folder / 'samples.jsonl'} lacks: remove "
                    f"it, and the programs are run again"
                )
            slots: list[Slot] = [(problem, index) for problem in self.problems for index in range(settings.n)]
            there = {(problem.task_id, index) for problem, index in slots} & self._samples.entries.keys()
            self.todo = [slot for slot in slots if (slot[0].task_id, slot[1]) not in there]
            marked = there & self._results.entries.keys()
            self._passed = sum(self._results.entries[key]["passed"] for key in marked)
            self._marked = len(marked)
            done = len(there if execute is None else marked)
            bar = tqdm(total=len(slots), initial=done, unit="sample", disable=not progress, dynamic_ncols=True)
            self._bar = stack.enter_context(bar)
            self._marker = None
            if execute is not None:
                self._marker = Marker(execute, self._results, settings.n_workers, self._count)
                stack.callback(self._marker.close)
                for problem, index in slots:
                    if (key := (problem.task_id, index)) in there - marked:
                        self._marker.submit(problem, index, self._samples.entries[key]["completion"])
            self._open = stack.pop_all()

    def add(self, slots: list[Slot], answers: list[Answer]) -> None:
        """Write samples down, and have them marked."""
        pairs = [(*slot, answer) for slot, answer in zip(slots, answers, strict=True)]
        self._samples.append(
            {"task_id": problem.task_id, "index": index, **vars(answer)} for problem, index, answer in pairs
        )
        for problem, index, answer in pairs:
            if self._marker is None:
                self._bar.update()
            else:
                self._marker.submit(problem, index, answer.completion)

    def finish(self) -> Summary:
        """Wait for the last result, and sum up; summary.json holds the same."""
        if self._marker is not None:
            self._marker.finish()
        ids = [problem.task_id for problem in self.problems]
        summary = summarize(self.settings, ids, self._samples.entries, self._results.entries)
        (self.settings.output_dir / "summary.json").write_text(json.dumps(summary.describe(), indent=2) + "\n")
        return summary

    def __enter__(self) -> "Evaluation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def _count(self, result: dict[str, Any]) -> None:
        self._marked += 1
        self._passed += result["passed"]
        self._bar.set_postfix_str(f"passed {self._passed / self._marked:.1%}", refresh=False)
        self._bar.update()


def run(settings: Settings, execute: Execute | None, progress: bool = False) -> Summary | None:
    """Evaluate a model, on one process or on as many as torchrun started; the other ranks return None.

    Files are read and written by world rank 0. Without a missing sample no model is loaded, on one process.

    Args:
        settings: what to run.
        execute: runs the programs; None leaves them alone.
        progress: show a bar on world rank 0's stderr.

    Raises:
        EvaluationError: the problems cannot be read, or the folder is another run's.
        CodeLlamaError: whatever `Llama.build` and its calls raise.
    """
    if os.environ.get("RANK", "0") != "0":
        generate(_build(settings), settings, None)
        return None
    with Evaluation(settings, execute, progress) as evaluation:
        if evaluation.todo or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            generate(_build(settings), settings, evaluation)
        return evaluation.finish()


def generate(llama: "Llama", settings: Settings, evaluation: Evaluation | None) -> None:
    """Generate what an evaluation misses; every rank makes this call, world rank 0 with the evaluation.

    Samples are generated in calls of a few for each row, and written down before the next call.
    """
    assert (evaluation is not None) == (llama.parallel.world_rank == 0), "world rank 0 alone holds the evaluation"
    size = _TURNS * settings.max_batch_size * llama.parallel.n_replicas
    todo = [] if evaluation is None else evaluation.todo
    calls = [todo[at : at + size] for at in range(0, len(todo), size)]

    def begin() -> tuple[Any, int]:
        assert evaluation is not None, "only world rank 0 makes what is shared"
        check(llama, list({problem.task_id: problem for problem, _ in todo}.values()), evaluation.form, settings)
        return evaluation.form, len(calls)

    form, n_calls = llama.parallel.share(begin)
    for number in range(n_calls):
        slots = calls[number] if evaluation is not None else []
        answers = ask(llama, slots, form, TASKS[settings.task].STOP, settings)
        if evaluation is not None:
            evaluation.add(slots, answers)


def _build(settings: Settings) -> "Llama":
    from codellama.llama import Llama  # late: a wrong flag or file needs no torch

    return Llama.build(
        settings.ckpt_dir,
        settings.tokenizer_path,
        settings.max_seq_len,
        settings.max_batch_size,
        settings.model_parallel_size,
        device=settings.device,
        dtype=settings.dtype,
        checkpoint_format=settings.checkpoint_format,
    )
