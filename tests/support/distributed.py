"""Run a function on N processes with gloo, as torchrun would start them; the first failure is raised with its rank.

The processes come from a fork server that has imported torch once and run nothing, so a start costs milliseconds.
"""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "codellama.llama", "tests.support.tiny"])


class RankFailedError(AssertionError):
    """A rank raised, died or did not answer in time."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_ranks(
    size: int, function: Callable[..., Any], *args: Any, env: dict[str, str] | None = None
) -> list[tuple[Any, Connection]]:
    """Start one process per rank; each calls function(*args) under torchrun's environment variables."""
    port = str(free_port())
    ranks = []
    for rank in range(size):
        here, there = _CONTEXT.Pipe()
        settings = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **(env or {}),
        }  # fmt: skip
        process = _CONTEXT.Process(target=_call, args=(there, settings, function, args), daemon=True)
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
                kind, value = connection.recv()
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


def _call(
    connection: Connection, settings: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    os.environ.update(settings)
    torch.set_num_threads(1)
    try:
        result = ("returned", function(*args))
    except BaseException:
        result = ("failed", traceback.format_exc())
    connection.send(result)
    connection.close()
