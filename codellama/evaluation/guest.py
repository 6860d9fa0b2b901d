"""Run one program that nobody trusts, in a process that execution.py starts; imports nothing of ours but confinement.

    warden    reads the request, opens new namespaces, watches time, output, memory and processes, reports the outcome
    └── init  first process of the new namespaces: makes the root of the file system; when it ends, all in it end
        └── program   gives up every right, sets the limits, runs the source

Each layer that this machine refuses is left out and named in the report. The program is believed to have passed when
its process writes a number that it can read only from a pipe, once its last statement has run, and then ends normally.
This file knows nothing of problems or checks: it is given source code.
"""

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import types
from typing import Any

from codellama.evaluation import confinement
from codellama.evaluation.confinement import LINUX, WORK, prctl

OUTPUT_READ = 256  # times the output that is kept: a program that writes more is ended
PATIENCE = 20.0  # seconds until a busy machine has confined a process, or buried the killed ones
TICK = 0.05  # seconds between two looks at memory and processes


def run(source: str, claim: int, number: int) -> None:
    """Run the source as a module named `program`, and claim that it passed when its last statement has run."""
    write, read, leave, process, own = os.write, os.read, os._exit, os.getpid, os.getpid()
    module = types.ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = module
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
        if process() != own:  # a child that went on; the verdict belongs to the process that we started
            leave(1)
        with contextlib.suppress(Exception):  # it may have closed or replaced its standard output
            sys.stdout.flush()
        write(claim, read(number, 64))
        leave(0)
    except BaseException as error:
        if process() == own:  # a child that raises says nothing about the program
            write(claim, b"memory" if isinstance(error, MemoryError) else b"failed")
        with contextlib.suppress(Exception):
            sys.stdout.flush()  # first, so that the traceback comes last
        import traceback

        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        traceback.print_exception(error)
    finally:
        leave(1)


def be_program(request: dict[str, Any], layers: dict[str, str], pipes: dict[str, int], user: int | None) -> None:
    """Confine this process and run the program in it; never returns."""
    os.setsid()
    for target in (0, 1, 2):
        os.dup2(pipes["null"] if target == 0 else pipes["output"], target)
    work = WORK if not layers["root"] else request["folder"]
    os.chdir(work)
    os.environ.update(HOME=work, TMPDIR=work)
    processes = request["processes"]
    if LINUX:
        if user is None:  # the count of an unprivileged user holds our own two processes, or all that he runs
            processes += 2 if not layers["namespaces"] else confinement.tasks_of(os.getuid())
        confinement.give_up_rights(user, counted_only=bool(layers["user"]))
    attempt(layers, request, "landlock", confinement.restrict_files, work, not layers["root"])
    attempt(layers, request, "seccomp", confinement.refuse_calls)
    if layers["namespaces"] and layers["seccomp"]:
        sys.modules["_socket"] = None  # type: ignore[assignment]
    held = not layers["namespaces"] or not layers["user"]
    held = held or (not layers["landlock"] and confinement.landlock_version() >= 6)
    layers["signals"] = "" if held else "nothing keeps it"
    confinement.limit(request, processes)
    os.write(pipes["status"], json.dumps({"layers": layers, "program": os.getpid()}).encode() + b"\n")
    os.close(pipes["status"])
    run(request["source"], pipes["claim"], pipes["number"])


def attempt(layers: dict[str, str], request: dict[str, Any], name: str, layer: Any, *arguments: Any) -> None:
    """Put a layer in force, or note why it is not: an empty note says that it is."""
    try:
        if name in request["without"]:
            raise OSError("left out as asked")
        if not LINUX:
            raise OSError("there is none but on Linux")
        layer(*arguments)
        layers[name] = ""
    except OSError as error:
        layers[name] = error.strerror or str(error)


def be_init(request: dict[str, Any], layers: dict[str, str], pipes: dict[str, int], user: int | None) -> None:
    """Start the program, bury whatever ends, and report how the program ended; never returns."""
    if LINUX:
        prctl(confinement.PR_SET_PDEATHSIG, signal.SIGKILL)
    owner = os.geteuid() if user is None else user
    attempt(layers, request, "root", confinement.make_root, request["folder"], request["file_size"], owner)
    if layers["root"] and user is not None:
        if confinement.open_to_all(os.__file__):
            os.chown(request["folder"], user, user)
        else:
            layers["user"] = f"others may not read {os.path.dirname(os.__file__)}"
    program = os.fork()
    if program == 0:
        be_program(request, layers, pipes, user)
    if LINUX:
        prctl(confinement.PR_SET_DUMPABLE, 0)  # so that the program cannot look into this process
    ended = 0
    while ended != program:
        ended, status, usage = os.wait4(-1, 0)
    report = {"status": status, "cpu": usage.ru_utime + usage.ru_stime}
    os.write(pipes["status"], json.dumps(report).encode() + b"\n")
    os._exit(0)


def tree(root: int) -> list[int]:
    """List the descendants of a process."""
    parents: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc") if LINUX else ()):
        with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
            parents.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(name))
    found = list(parents.get(root, ()))
    for one in found:
        found += parents.get(one, ())
    return found


def resident(process: int) -> int:
    """Return the bytes of memory that a process has for itself."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/statm") as file:
        _, pages, shared, *_ = map(int, file.read().split())
        return (pages - shared) * resource.getpagesize()
    return 0


def kill_all(init: int, program: int | None, user: int | None) -> None:
    """End every process that the program started, and bury those that became ours.

    Raises:
        RuntimeError: some live on.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(init, signal.SIGKILL)
    if user is not None:  # all of that user at once: a scan could miss one that forks as fast as we look
        killer = os.fork()
        if killer == 0:
            with contextlib.suppress(OSError):
                os.setresuid(user, user, user)
                os.kill(-1, signal.SIGKILL)
            os._exit(0)
    if not LINUX and program is not None:  # nobody lists the descendants: those that left the session stay
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(program, signal.SIGKILL)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for one in tree(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)
    raise RuntimeError(f"processes of the program live on: {tree(os.getpid())}")


def main() -> None:
    """Watch one program: the request comes on standard input, the report goes to standard output."""
    request = json.loads(sys.stdin.buffer.read())
    sys.path.remove(request["package"])  # the program has the standard library alone
    for name in [name for name in sys.modules if name.partition(".")[0] == "codellama"]:
        del sys.modules[name]
    layers: dict[str, str] = {}
    attempt(layers, request, "namespaces", confinement.open_namespaces)
    # Afterwards: a namespace of users, where it takes one, knows a single number.
    user = confinement.own_number() if LINUX and "user" not in request["without"] else None
    layers["user"] = "" if user is not None else "only root can choose another user"
    output, output_end = os.pipe()
    status, status_end = os.pipe()
    claim, claim_end = os.pipe()
    number_end, number = os.pipe()
    ends = {"output": output_end, "status": status_end, "claim": claim_end, "number": number_end}
    if LINUX:
        prctl(confinement.PR_SET_CHILD_SUBREAPER, 1)
    init = os.fork()
    if init == 0:
        for descriptor in (output, status, claim, number, request["lifeline"]):
            os.close(descriptor)
        be_init(request, layers, {**ends, "null": os.open("/dev/null", os.O_RDONLY)}, user)
    for descriptor in ends.values():
        if descriptor != number_end:  # kept: writing the number to a program that is gone would end us
            os.close(descriptor)
    if LINUX:
        prctl(confinement.PR_SET_DUMPABLE, 0)
    if layers["namespaces"] and user is None:  # we compete with whatever it forks; the kernel does not count root's
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
    secret = os.urandom(16).hex().encode()  # made after the fork: it is in no memory of the program
    os.write(number, secret)
    # A process table of its own dies with its first process; nothing can be started in it afterwards.
    alone = user if layers["namespaces"] else None
    Watch(request, init, output, status).report(claim, secret, alone)


class Watch:
    """What the warden sees of a running program."""

    def __init__(self, request: dict[str, Any], init: int, output: int, status: int) -> None:
        """Watch until the program ends, or has to."""
        self.request, self.init, self.output, self.status = request, init, output, status
        self.kept, self.read, self.reason = bytearray(), 0, ""
        self.facts: dict[str, Any] = {}
        self.orphaned = False
        self.began = time.monotonic()  # again when the program is confined and begins
        poll = select.poll()
        for descriptor in (output, status, request["lifeline"]):
            os.set_blocking(descriptor, False)
            poll.register(descriptor, select.POLLIN)
        looked = self.began
        while not self.reason:
            for descriptor, _ in poll.poll(TICK * 1000):
                if descriptor == request["lifeline"]:
                    self.reason, self.orphaned = "killed", True
                elif descriptor == status:
                    self.reason = self.hear()
                elif not self.drain():
                    poll.unregister(output)
            now = time.monotonic()
            if not self.reason and now - self.began > (request["timeout"] if self.facts else PATIENCE):
                self.reason = "timeout"
            elif not self.reason and now - looked > TICK:
                looked, self.reason = now, self.look()
        self.seconds = time.monotonic() - self.began

    def drain(self) -> bool:
        """Read what the program wrote, keep the first part; False at its end."""
        try:
            part = os.read(self.output, 65536)
        except BlockingIOError:
            return True
        self.kept += part[: max(0, self.request["output"] - len(self.kept))]
        self.read += len(part)
        if self.read > self.request["output"] * OUTPUT_READ:
            self.reason = self.reason or "output"
        return bool(part)

    def hear(self) -> str:
        """Read what program and init say; `ended` when the program has, or init itself."""
        part = os.read(self.status, 4096)  # each line was written at once, and a pipe keeps that together
        if part and not self.facts:
            self.began = time.monotonic()
        for line in part.splitlines():
            self.facts.update(json.loads(line))
        return "" if part and "status" not in self.facts else "ended"

    def look(self) -> str:
        """Return why the program must end now: memory or number of all its processes."""
        processes = tree(self.init)
        if len(processes) > self.request["processes"]:
            return "processes"
        return "memory" if sum(map(resident, processes)) > self.request["memory"] else ""

    def report(self, claim: int, secret: bytes, user: int | None) -> None:
        """End what is left, judge, and write the report."""
        kill_all(self.init, self.facts.get("program"), user)
        if self.orphaned:  # who would have removed the folder is gone
            import shutil

            with contextlib.suppress(RecursionError):  # as deep as that, it stays
                shutil.rmtree(self.request["folder"], ignore_errors=True)
        while self.read <= self.request["output"] * OUTPUT_READ:
            before = self.read
            self.drain()
            if self.read == before:
                break
        text = self.kept.decode("utf-8", "replace")
        if "layers" not in self.facts and self.reason != "killed":
            raise RuntimeError(f"the program was never confined. {text}")
        os.set_blocking(claim, False)
        try:
            claimed = os.read(claim, 256)
        except BlockingIOError:
            claimed = b""
        if self.reason == "ended":
            self.reason = judge(self.facts, claimed, secret, self.request["cpu_time"])
        report = {"reason": self.reason, "output": text, "seconds": self.seconds, "layers": self.facts.get("layers")}
        sys.stdout.write(json.dumps(report))
        sys.stdout.flush()
        os._exit(0)  # an interpreter takes milliseconds to tidy up


def judge(facts: dict[str, Any], claimed: bytes, secret: bytes, cpu_time: float) -> str:
    """Say how a program that ended by itself has ended."""
    status = facts.get("status")
    if status is None:  # it has ended its init
        return "killed"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        used_up = number == signal.SIGXCPU or (number == signal.SIGKILL and facts["cpu"] >= cpu_time)
        return "timeout" if used_up else "killed"
    if claimed == secret and os.WEXITSTATUS(status) == 0:
        return "passed"
    return claimed.decode() if claimed in (b"memory", b"failed") else "exited"
