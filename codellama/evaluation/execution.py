"""A sandbox for programs that a model wrote: run one in a confined process, say whether it ran to its end.

    outcome = run_program(problem.prompt + completion + problem.test)
    outcome.passed, outcome.reason, outcome.output

What holds on Linux as root or where unprivileged user namespaces are allowed; `isolation()` says what is missing here:

* a process tree of its own that dies as a whole, with a network that has no devices and a file system that has Python's
  standard library to read and one folder in memory to write to; Landlock and a seccomp filter say the same once more;
* limits on wall time, processor time, memory, size of files, number of processes, and on the output that is kept;
* no rights, no environment, no standard input, no descriptor of ours, no site packages (numpy among them).

What it does not protect from:

* A hole in the kernel: the program makes system calls of the same kernel. Run what is hostile in a virtual machine.
* A program written against this very file. Source and check share one interpreter. The proof of a pass is a number that
  is read from a pipe once the last statement has run, so no exit status, handler or replaced builtin makes one; but who
  walks up the frames of the interpreter finds the descriptors. The same holds for answers that compare equal to
  everything: an `__eq__` is part of what the check asks.
* Heat and noise: a program may use its processor time, its memory and its processes until a limit ends it, and can
  measure time. Memory of the kernel (pipes, memfd) is bounded by descriptors and sizes alone.
* On macOS, and where a layer is missing, whatever that layer would have held.

Nothing here asks whether code may be run: the command does. Nothing here knows of problems, models or torch.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

Reason = Literal["passed", "failed", "exited", "timeout", "memory", "output", "processes", "killed"]
Layer = Literal["namespaces", "root", "landlock", "seccomp", "user"]

START = "import sys; sys.path.append(sys.argv[1]); from codellama.evaluation.guest import main; main()"
GRACE = 60.0  # seconds for all that is not the program: a busy machine may take long to start an interpreter
PACKAGE = str(Path(__file__).parents[2])

HOLDS: dict[Layer, tuple[str, str]] = {
    "namespaces": (
        "no network; a process table of its own",
        "processes are found by their parents (on macOS by their session) and ended one by one",
    ),
    "root": ("sees Python and one folder in memory alone", "sees the file system; many small files can fill the disk"),
    "landlock": ("reads Python alone, writes to its folder alone", "reads and writes whatever its user may"),
    "seccomp": ("the kernel refuses sockets and looks into other processes", "such calls are not refused"),
    "user": ("a user of its own", "runs as this user"),
}


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: its last statement ran, in the process that was started, and nothing was raised.
        reason: `passed`; `failed` (something was raised, SystemExit too); `exited` (it ended before its last
            statement); `timeout` (wall or processor time); `memory`; `output` (far more than is kept); `processes` (too
            many); `killed` (by a signal, such as that of a segmentation fault).
        output: standard output and standard error as they came, the first part; the traceback is at its end.
        seconds: wall time from the start of the confined process to the verdict.
    """

    passed: bool
    reason: Reason
    output: str
    seconds: float


@dataclass(frozen=True)
class Isolation:
    """What confines a program on this machine, and what does not."""

    in_force: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        """Say it in a line or two."""
        lines = [f"Sandbox: {'; '.join(self.in_force)}."] if self.in_force else ["Sandbox: limits alone."]
        return "\n".join([*lines, *(f"Sandbox, missing here: {what}." for what in self.missing)])


def run_program(
    source: str,
    *,
    timeout: float = 10.0,
    cpu_time: float | None = None,
    memory: int = 512 * 2**20,
    file_size: int = 16 * 2**20,
    processes: int = 32,
    output: int = 64 * 2**10,
    without: Collection[Layer] = (),
) -> Outcome:
    """Run Python source in a sandbox; may be called from several threads at once.

    The source runs as a module named `program`, so a block under `if __name__ == "__main__"` does not run. The hash of
    strings is the same in each run, so sets have the same order.

    Args:
        timeout: seconds of wall time.
        cpu_time: seconds of processor time of one process, rounded up to whole ones; None means as much as `timeout`.
        memory: bytes that one process may address, and that all together may hold.
        file_size: bytes of one file, and of all together where the program has a root of its own.
        processes: processes and threads at a time.
        output: bytes of output that are kept; what comes after them is read and forgotten, until it is 256 times that.
        without: layers to leave out, to find out what the others hold.

    Raises:
        ValueError: a limit is not positive, or a layer is unknown.
        RuntimeError: the sandbox itself failed.
    """
    return _run(source, timeout, cpu_time, memory, file_size, processes, output, without)[0]


def isolation(without: Collection[Layer] = ()) -> Isolation:
    """Find out what confines a program here, by running an empty one."""
    outcome, layers = _run("", 10.0, None, 512 * 2**20, 2**20, 32, 1024, without)
    if not outcome.passed:
        raise RuntimeError(f"the sandbox cannot run an empty program: {outcome.reason}. {outcome.output}")
    in_force = [HOLDS[name][0] for name in HOLDS if not layers[name]]
    missing = [f"{HOLDS[name][1]} (no {name}: {layers[name]})" for name in HOLDS if layers[name]]
    if layers["namespaces"] and layers["seccomp"]:
        missing.append("the network is out of reach for Python's socket module alone")
    if layers["signals"]:
        missing.append("a program may end other processes of this user, this one among them")
    return Isolation(tuple(in_force), tuple(missing))


def _run(
    source: str,
    timeout: float,
    cpu_time: float | None,
    memory: int,
    file_size: int,
    processes: int,
    output: int,
    without: Collection[Layer],
) -> tuple[Outcome, dict[str, str]]:
    """Start the warden, hand it the request, read its report."""
    cpu_time = timeout if cpu_time is None else cpu_time
    limits = {"timeout": timeout, "cpu_time": cpu_time, "memory": memory, "file_size": file_size}
    limits |= {"processes": processes, "output": output}
    for name, value in limits.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be positive")
    if unknown := set(without) - HOLDS.keys():
        raise ValueError(f"unknown layers: {', '.join(sorted(unknown))}; there are {', '.join(HOLDS)}")
    folder = tempfile.mkdtemp(prefix="codellama-program-")
    lifeline, ours = os.pipe()  # ends when this process does, however it does
    try:
        request = {"source": source, "folder": folder, "lifeline": lifeline, "package": PACKAGE}
        request |= {"without": sorted(without), **limits}
        return _converse(json.dumps(request).encode(), lifeline, folder, timeout)
    finally:
        os.close(lifeline)
        os.close(ours)
        remove(folder)


def _converse(request: bytes, lifeline: int, folder: str, timeout: float) -> tuple[Outcome, dict[str, str]]:
    """Exchange request and report with a new warden."""
    assert sys.executable, "an interpreter that does not know where it is cannot start another"
    # No -I: it would ignore PYTHONHASHSEED. The environment holds what stands here alone.
    command = [sys.executable, "-S", "-s", "-P", "-B", "-X", "utf8", "-c", START, PACKAGE]
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        cwd="/",
        env=environment,
        pass_fds=(lifeline,),
        start_new_session=True,
    ) as warden:
        try:
            answer, errors = warden.communicate(request, timeout + GRACE)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(warden.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"the sandbox did not end {GRACE:.0f} s after its time") from error
            raise
    if warden.returncode == -signal.SIGKILL and not answer:  # where nothing keeps the program from ending its warden
        with contextlib.suppress(ProcessLookupError):
            os.killpg(warden.pid, signal.SIGKILL)
        return Outcome(False, "killed", "", 0.0), {}
    if warden.returncode != 0:
        raise RuntimeError(f"the sandbox ended with status {warden.returncode}: {errors.decode(errors='replace')}")
    report: dict[str, Any] = json.loads(answer)
    reason = cast(Reason, report["reason"])
    return Outcome(reason == "passed", reason, report["output"], report["seconds"]), report["layers"] or {}


def remove(folder: str) -> None:
    """Remove a folder with all that is in it, however deep and whatever its modes say; nothing may use it any more.

    `shutil.rmtree` gives up at folders without permissions and at a thousand levels. This one holds one folder open.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    here = os.open(folder, flags)
    left = [_remove_files(here)]  # for each level on the way down, the folders that are still in it
    while left[-1] or len(left) > 1:
        if left[-1]:
            os.chmod(left[-1][-1], 0o700, dir_fd=here)
            there = os.open(left[-1][-1], flags, dir_fd=here)
            left.append(_remove_files(there))
        else:
            there = os.open("..", flags, dir_fd=here)
            left.pop()
            os.rmdir(left[-1].pop(), dir_fd=there)
        os.close(here)
        here = there
    os.close(here)
    os.rmdir(folder)


def _remove_files(folder: int) -> list[str]:
    """Remove what is no folder from an open folder; return the names of the folders."""
    folders = []
    with os.scandir(folder) as entries:
        inside = list(entries)
    for one in inside:
        if one.is_dir(follow_symlinks=False):
            folders.append(one.name)
        else:
            os.unlink(one.name, dir_fd=folder)
    return folders
