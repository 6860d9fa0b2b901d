"""Run a function on N processes with gloo, as torchrun would start them; the first failure is raised with its rank.

The processes come from a fork server that has imported torch once and run nothing, so a start costs milliseconds.
`run_scripts` starts fresh interpreters instead, for what happens when one of them ends.
"""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "codellama.llama", "tests.support.tiny", "pytest"])


class RankFailedError(AssertionError):
    """A rank raised, died or did not answer in time."""


@dataclass(frozen=True)
class End:
    """How a process ended: when, its exit code, what it returned or raised, and what it wrote to stderr."""

    time: float
    code: int
    answer: Any
    stderr: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def rank_env(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets on one node."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def start_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    env: dict[str, str] | None = None,
    stderr: Path | None = None,
) -> list[tuple[Any, Connection]]:
    """Start one process per rank; each calls function(*args) under torchrun's environment variables."""
    port = free_port()
    ranks = []
    for rank in range(size):
        here, there = _CONTEXT.Pipe()
        settings = {**rank_env(rank, size, port), **(env or {})}
        log = stderr / f"rank{rank}.txt" if stderr else None
        process = _CONTEXT.Process(target=_call, args=(there, settings, log, function, args), daemon=True)
        process.start()
        there.close()
        ranks.append((process, here))
    return ranks


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, timeout: float = 120, env: dict[str, str] | None = None
) -> list[Any]:
    """Call function(*args) on every rank and return the results in the order of ranks.

    Raises:
        RankFailedError: with the rank and its traceback.
    """
    ranks = start_ranks(size, function, *args, env=env)
    deadline = time.monotonic() + timeout
    results: list[Any] = []
    failures: list[str] = []
    try:
        for rank, (process, connection) in enumerate(ranks):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                failures.append(f"rank {rank} did not answer within {timeout} s")
                break
            try:
                kind, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                process.join(5)
                failures.append(f"rank {rank} died with exit code {process.exitcode}")
                continue
            if kind == "failed":
                failures.append(f"rank {rank}:\n{value}")
            else:
                results.append(value)
    finally:
        for process, _ in ranks:
            process.join(0.1 if failures else 10)
            if process.is_alive():
                process.kill()
                process.join()
    if failures:
        raise RankFailedError("\n".join(failures))
    return results


def end_ranks(ranks: Sequence[tuple[Any, Connection]], stderr: Path, timeout: float) -> list[End]:
    """Wait until all processes have ended, each in its own way.

    Raises:
        RankFailedError: naming the ranks that still run after the timeout.
    """
    deadline = time.monotonic() + timeout
    times: dict[int, float] = {}
    while len(times) < len(ranks) and time.monotonic() < deadline:
        for rank, (process, _) in enumerate(ranks):
            if rank not in times and not process.is_alive():
                times[rank] = time.monotonic()
        time.sleep(0.02)
    left = [rank for rank in range(len(ranks)) if rank not in times]
    for rank in left:
        ranks[rank][0].kill()
        ranks[rank][0].join()
    if left:
        raise RankFailedError(f"ranks {left} still ran after {timeout} s")
    ends = []
    for rank, (process, connection) in enumerate(ranks):
        try:
            answer = pickle.loads(connection.recv_bytes())[1]
        except EOFError:
            answer = None
        ends.append(End(times[rank], process.exitcode, answer, (stderr / f"rank{rank}.txt").read_text()))
    return ends


def run_scripts(commands: Sequence[tuple[Sequence[str], dict[str, str]]], timeout: float = 120) -> list[End]:
    """Run `python ARGUMENTS` with these additional environment variables, all at once, until all have ended."""
    base = {key: value for key, value in os.environ.items() if key not in rank_env(0, 1, 0)}
    base |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, *arguments], env=base | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for arguments, env in commands
    ]
    try:
        ends = {}
        deadline = time.monotonic() + timeout
        while len(ends) < len(started) and time.monotonic() < deadline:
            for index, process in enumerate(started):
                if index not in ends and process.poll() is not None:
                    ends[index] = time.monotonic()
            time.sleep(0.02)
        assert len(ends) == len(started), f"{commands} still ran after {timeout} s"
        written = [process.communicate() for process in started]
        codes = [process.returncode for process in started]
        return [End(ends[i], codes[i], *written[i]) for i in range(len(started))]
    finally:
        for process in started:
            process.kill()


def _call(
    connection: Connection,
    settings: dict[str, str],
    stderr: Path | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch

    if stderr is not None:
        with stderr.open("w") as file:
            os.dup2(file.fileno(), 2)
    os.environ.update(settings)
    torch.set_num_threads(1)
    try:
        result = ("returned", function(*args))
    except BaseException:
        result = ("failed", traceback.format_exc())
    connection.send_bytes(pickle.dumps(result))  # not send(): torch would share tensors by file descriptors
    connection.close()
