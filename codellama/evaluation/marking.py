"""Marking: programs run in sandboxes, several at once, while the model goes on to generate.

It knows nothing of models, nor of how a program is kept from doing harm: that is execution.py's.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from codellama.evaluation.journal import Journal
from codellama.evaluation.problems import Problem


class Outcome(Protocol):
    """How a program ended."""

    @property
    def passed(self) -> bool:
        """True if it ran to its end."""
        ...

    @property
    def reason(self) -> str:
        """In one word, what became of it."""
        ...


Execute = Callable[[str], Outcome]
"""Runs a program where it can do no harm."""


class Marker:
    """Runs the programs of samples in threads that wait for sandboxes, and writes each result down as it comes."""

    def __init__(
        self, execute: Execute, journal: Journal, n_workers: int, on_result: Callable[[dict[str, Any]], None]
    ) -> None:
        """Start; on_result is called in a thread, for one result at a time."""
        self._execute = execute
        self._journal = journal
        self._on_result = on_result
        self._lock = threading.Lock()
        self._running: list[Future[None]] = []
        self._failures: list[Exception] = []
        self._threads = ThreadPoolExecutor(n_workers, thread_name_prefix="sandbox")

    def submit(self, problem: Problem, index: int, completion: str) -> None:
        """Run a sample's program when there is a thread for it. Raises what an earlier one raised."""
        if self._failures:
            raise self._failures[0]
        self._running.append(self._threads.submit(self._mark, problem, index, completion))

    def finish(self) -> None:
        """Wait until all programs have run."""
        for future in self._running:
            future.result()

    def close(self) -> None:
        """Run no more programs; wait for those that run."""
        self._threads.shutdown(cancel_futures=True)

    def _mark(self, problem: Problem, index: int, completion: str) -> None:
        try:
            self._keep(problem, index, self._execute(problem.program(completion)))
        except Exception as error:  # so that the run hears of it before its end
            self._failures.append(error)
            raise

    def _keep(self, problem: Problem, index: int, outcome: Outcome) -> None:
        result = {
            "task_id": problem.task_id, "index": index, "passed": outcome.passed, "reason": outcome.reason,
        }  # fmt: skip
        with self._lock:
            self._journal.append([result])
            self._on_result(result)
