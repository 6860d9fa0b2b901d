"""Programs that try to get out, to stay alive, to take all, or to be called right; and right ones, which are."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from codellama.evaluation import execution
from codellama.evaluation.confinement import open_to_all
from codellama.evaluation.execution import PACKAGE, Layer, Reason, isolation, remove, run_program

LINUX = sys.platform == "linux"
ALL: tuple[Layer, ...] = ("namespaces", "root", "landlock", "seccomp", "user")
BARE_CONTAINER: tuple[Layer, ...] = ("namespaces", "root")  # what Docker leaves to root without further rights
SLEEPER = f"86400.{os.getpid()}"  # seconds that only our own programs sleep

pytestmark = pytest.mark.skipif(not LINUX, reason="namespaces, Landlock and seccomp are Linux's")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sandbox makes its folders; nothing may be left there."""
    path = tmp_path / "sandboxes"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def ancestors(pid: int) -> Iterator[int]:
    """A process and those above it, as far as they can be followed."""
    while pid > 0:
        yield pid
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        pid = int(status.partition("\nPPid:")[2].split()[0])


def survivors() -> list[str]:
    """Command lines of what our programs left running; those of tests that run beside these are not ours."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        ours = "codellama.evaluation.guest" in line and PACKAGE in line
        above = set(ancestors(int(place.name))) if ours or SLEEPER in line else set()
        if above and (os.getpid() in above or os.getppid() not in above):  # or an orphan, whoever made it
            found.append(line)
    return found


@dataclass(frozen=True)
class Adversary:
    name: str
    source: str
    reasons: tuple[Reason, ...]
    limits: dict[str, float] = field(default_factory=dict)
    in_output: str = ""


QUICK = {"timeout": 0.7}
DEAF = """import signal
for one in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(one, signal.SIG_IGN)
while True: pass"""
# The second half of each source would pass, had the first not been stopped.
ADVERSARIES = [
    Adversary(
        "fork bomb", "import os\nwhile True:\n try: os.fork()\n except OSError: pass", ("timeout", "processes"), QUICK
    ),
    Adversary(
        "forks that sleep",
        "import os, time\nfor _ in range(200):\n if not os.fork(): time.sleep(99)\ntime.sleep(2)",
        ("failed", "processes"),
    ),
    Adversary("memory", "x = bytearray(2**40)", ("memory",)),
    Adversary("memory bit by bit", "x = []\nwhile True: x.append(bytearray(2**20))", ("memory",), {"memory": 2**27}),
    Adversary(
        "memory of all together",
        "import os, time\nfor _ in range(4): os.fork()\nx = b'x' * 50_000_000\ntime.sleep(9)",
        ("memory",),
        {"memory": 2**27, "timeout": 8},
    ),
    Adversary("endless loop", "while True: pass", ("timeout",), QUICK),
    Adversary("processor time", "while True: pass", ("timeout",), {"cpu_time": 1, "timeout": 20}),
    Adversary("endless sleep", "import time\ntime.sleep(1e6)", ("timeout",), QUICK),
    Adversary(
        "deaf to signals",
        DEAF,
        ("timeout",),
        {"cpu_time": 1, "timeout": 20},
    ),
    Adversary("stopped by itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", ("timeout",), QUICK),
    Adversary("endless output", "while True: print('x' * 99)", ("output",), {"output": 1000, "timeout": 9}),
    Adversary(
        "output without a line's end", "import os\nwhile True: os.write(2, b'x' * 65536)", ("output",), {"timeout": 9}
    ),
    Adversary("ends with status 0", "import os\nos._exit(0)", ("exited",)),
    Adversary("exits", "import sys\nsys.exit(0)", ("failed",), in_output="SystemExit"),
    Adversary("exits at exit", "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError", ("failed",)),
    Adversary(
        "exits in a thread",
        "import os, threading, time\nthreading.Timer(0.05, os._exit, [0]).start()\ntime.sleep(5)",
        ("exited",),
    ),
    Adversary("kills itself", "import os\nos.kill(os.getpid(), 9)", ("killed",)),
    Adversary("a child passes for it", "import os\nif os.fork(): os.wait(); os._exit(0)", ("exited",)),
    Adversary("other program", "import os\nos.execv('/bin/true', ['true'])", ("exited",)),
    Adversary(
        "overrides what a check needs",
        "import builtins, sys, os\nbuiltins.AssertionError = builtins.exec = builtins.compile = print\n"
        "sys.excepthook = sys.unraisablehook = lambda *a: None\nos._exit = os.write = lambda *a: None\n"
        "sys.modules['traceback'] = None\nassert 1 == 2",
        ("failed",),
    ),
    Adversary("an error that hides", "class E(BaseException):\n __str__ = __repr__ = None\nraise E", ("failed",)),
    Adversary("a wrong answer", "def f(x): return x\nassert f(1) == 2", ("failed",), in_output="line 2"),
    Adversary("no Python", "def f(:", ("failed",), in_output="SyntaxError"),
    Adversary("a null byte", "x = 1\0", ("failed",)),
    Adversary("half a character", "x = '\ud800'", ("failed",)),
    Adversary("nests too deep", "x = " + "(" * 5000 + ")" * 5000, ("failed", "killed", "memory")),
    Adversary("huge file", "open('x', 'wb').write(bytes(2**25))", ("failed",), in_output="OSError"),
    Adversary("recursion", "def f(): f()\nf()", ("failed",), in_output="RecursionError"),
    Adversary(
        "stack overflow",
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n def __getattr__(s, n): return getattr(s, n + 'a')\nA().a",
        ("killed", "memory", "failed"),
    ),
    Adversary("segmentation fault", "import ctypes\nctypes.string_at(1)", ("killed",)),
    Adversary("standard input", "input()", ("failed",), in_output="EOFError"),
    Adversary(
        "raises its limits",
        "import resource as r\nfor k in (r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_CPU): r.setrlimit(k, (2**40, 2**40))",
        ("failed",),
    ),
    Adversary("closes the pipes", "import os\nos.closerange(0, 1000)", ("exited",)),
    Adversary("becomes root", "import os\nos.setuid(0)\nopen('/file-of-root', 'w')", ("failed",)),
    Adversary("kills all", "import os, time\nos.kill(-1, 9)\ntime.sleep(99)", ("timeout", "killed", "failed"), QUICK),
    Adversary("kills its group", "import os\nos.killpg(0, 9)", ("killed",)),
    Adversary(
        "kills its parent", "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(99)", ("timeout", "failed"), QUICK
    ),
    Adversary(
        "a daemon",
        "import os, time\nif not os.fork():\n os.setsid()\n if not os.fork():\n"
        f"  os.execv('/bin/sleep', ['sleep', '{SLEEPER}'])\n os._exit(0)\ntime.sleep(0.2)\nraise ValueError",
        ("failed",),
    ),
    Adversary(
        "a daemon that holds the output",
        "import os, time\nif not os.fork():\n os.setsid()\n time.sleep(99)\nassert False",
        ("failed",),
    ),
    Adversary("looks into its parent", "open(f'/proc/{__import__(\"os\").getppid()}/mem', 'rb').read(1)", ("failed",)),
    Adversary("our process number", "import os\nopen('/proc/1/environ', 'rb').read()", ("failed",)),
]


def judge(adversary: Adversary, folder: Path, without: tuple[Layer, ...]) -> None:
    if adversary.name.startswith("kills") and "may end other processes" in str(isolation(without)):
        pytest.skip("needs namespaces, root, or Landlock of Linux 6.12: it would end the test run")
    began = time.monotonic()
    outcome = run_program(adversary.source, without=without, **adversary.limits)  # type: ignore[arg-type]
    assert outcome.reason in adversary.reasons, outcome
    assert not outcome.passed
    assert adversary.in_output in outcome.output
    assert len(outcome.output) <= adversary.limits.get("output", 65536)
    assert time.monotonic() - began < adversary.limits.get("timeout", 10) + 20
    assert survivors() == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda one: one.name)
def test_contained(adversary: Adversary, folder: Path) -> None:
    judge(adversary, folder, ())


# What depends on processes, once more where they have no table of their own: by a user's number, and by parents alone.
@pytest.mark.parametrize("without", [BARE_CONTAINER, (*BARE_CONTAINER, "user")], ids=["user", "parents"])
@pytest.mark.parametrize("name", ["fork bomb", "a daemon", "kills all", "kills its parent", "raises its limits"])
def test_contained_without_namespaces(name: str, without: tuple[Layer, ...], folder: Path) -> None:
    if os.geteuid() != 0 and "user" not in without:
        pytest.skip("needs root: only root can choose another user")
    if os.geteuid() == 0 and "user" in without and name == "fork bomb":
        name = "forks that sleep"  # root's bomb, which no kernel counts, is contained in seconds at a load of hundreds
    judge(next(one for one in ADVERSARIES if one.name == name), folder, without)


def needs(layer: Layer, without: tuple[Layer, ...] = ()) -> None:
    """Skip where this machine has no such layer."""
    missing = [line for line in isolation(without).missing if f"no {layer}:" in line]
    if missing:
        pytest.skip(missing[0])


# Each layer by itself must hold what it says.
FILES = [("root", ("landlock", "user")), ("landlock", ("namespaces", "root", "user"))]


@pytest.mark.parametrize(("layer", "without"), FILES, ids=["root", "landlock"])
def test_files_outside_are_out_of_reach(layer: Layer, without: tuple[Layer, ...], tmp_path: Path) -> None:
    needs(layer, without)
    secret, victim = tmp_path / "secret", tmp_path / "victim"
    secret.write_text("the secret")
    victim.write_text("before")
    victim.chmod(0o666)
    for attempt in (
        f"print(open({str(secret)!r}).read())",
        f"open({str(victim)!r}, 'w')",
        f"open('{tmp_path}/new', 'w')",
    ):
        outcome = run_program(attempt, without=without)
        assert outcome.reason == "failed", outcome
        assert "the secret" not in outcome.output
    assert victim.read_text() == "before"
    assert not (tmp_path / "new").exists()


def test_modes_outside_are_out_of_reach(tmp_path: Path) -> None:
    needs("root")
    tmp_path.chmod(0o750)
    outcome = run_program(f"import os\nos.chmod({str(tmp_path)!r}, 0o777)", without=["user"])
    assert outcome.reason == "failed"
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o750
    assert run_program("import os\nos.chmod('/usr', 0o777)", without=["user", "landlock"]).reason == "failed"


def test_nothing_of_ours_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "the secret")
    outcome = run_program("import os, sys\nprint(dict(os.environ), sys.argv)")
    assert outcome.passed, outcome
    assert "the secret" not in outcome.output
    assert run_program("import numpy").reason == "failed"
    assert run_program("import codellama").reason == "failed"


NETWORK = {
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "listen": "import socket\nsocket.create_server(('127.0.0.1', 0))",
    "other names": "import ctypes\nassert ctypes.CDLL(None).socket(2, 2, 0) >= 0",
}


@pytest.mark.parametrize("name", NETWORK)
def test_sockets_are_refused(name: str) -> None:
    needs("seccomp")
    assert run_program(NETWORK[name].format(port=9), without=["namespaces", "landlock"]).reason == "failed"


def test_a_network_of_its_own_leads_nowhere() -> None:
    needs("namespaces", ("seccomp", "landlock"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        source = NETWORK["connect"].format(port=server.getsockname()[1])
        assert run_program(source, without=["seccomp", "landlock"]).reason == "failed"
        with pytest.raises(TimeoutError):
            server.accept()


def test_without_any_layer_sockets_are_gone_and_the_words_say_so() -> None:
    assert run_program(NETWORK["connect"].format(port=9), without=ALL).reason == "failed"
    assert isolation(ALL).in_force == ()
    assert len(isolation(ALL).missing) == len(ALL) + 2
    assert "may end other processes of this user" in str(isolation(ALL))
    assert "may end other processes of this user" not in str(isolation())
    assert "Python's socket module alone" in str(isolation(ALL))


def test_without_linux_there_are_limits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = "import ctypes, resource, select, subprocess, sys; sys.platform = 'darwin'; "
    monkeypatch.setattr(execution, "START", elsewhere + execution.START)
    assert isolation().in_force == ()
    assert "there is none but on Linux" in str(isolation())
    for source, reason in (("assert True", "passed"), ("while True: pass", "timeout"), ("import socket", "failed")):
        assert run_program(source, timeout=1).reason == reason
    assert survivors() == []


def test_as_an_unprivileged_user(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else; without root all tests here are that test")
    program = f"""
import sys
sys.path.append({PACKAGE!r})
from codellama.evaluation.execution import isolation, run_program
sleeper = 'import os, time; os.fork() or os.execv("/bin/sleep", ["s", "{SLEEPER}"]); time.sleep(.2)'
print(isolation())
for source in "assert True", "while True: pass", "import socket; socket.socket()", "import os; os._exit(0)", sleeper:
    print(run_program(source, timeout=2).reason)
"""
    candidates = (Path(sys.base_prefix, "bin/python3"), Path("/usr/bin/python3"))
    usable = [one for one in candidates if one.exists() and open_to_all(str(one.resolve()))]
    if not usable or not open_to_all(f"{PACKAGE}/codellama/__init__.py"):
        pytest.skip(f"other users may not run {candidates}, or not read {PACKAGE}")
    done = subprocess.run(
        [usable[0], "-B", "-c", program],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        env={"TMPDIR": "/tmp"},
        user=65534,
        group=65534,
        extra_groups=[],
    )
    lines = done.stdout.splitlines()
    assert lines[-5:] == ["passed", "timeout", "failed", "exited", "passed"], done
    assert "runs as this user" in done.stdout
    assert survivors() == []


def test_what_good_programs_do() -> None:
    source = """
import asyncio, dataclasses, os, pickle, subprocess, tempfile, threading

@dataclasses.dataclass
class Point:
    x: int

assert pickle.loads(pickle.dumps(Point(3))).x == 3
with tempfile.TemporaryDirectory() as folder:
    open(folder + "/x", "w").write("y" * 10**6)
    assert len(open(folder + "/x").read()) == 10**6
threads = [threading.Thread(target=print, args=("안녕",)) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert asyncio.run(asyncio.sleep(0, 5)) == 5
assert subprocess.run(["/bin/echo", "x"], capture_output=True).stdout == b"x\\n"
def depth(n): return n and 1 + depth(n - 1)
assert depth(900) == 900
assert __name__ != "__main__"
"""
    outcome = run_program(source)
    assert outcome.passed, outcome
    assert outcome.output == "안녕\n" * 8


@pytest.mark.parametrize(
    "source",
    [
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()",
        "import sys\nsys.stdout.close()",
        "import shutil, os\nshutil.rmtree(os.getcwd(), ignore_errors=True)",
        "import os\nfor n in range(3000): open(str(n), 'w').close()",
        "import os\nos.mkdir('a'); open('a/b', 'w').close(); os.chmod('a/b', 0); os.chmod('a', 0)",
        "import os\nfor _ in range(1100): os.mkdir('d'); os.chdir('d')",
        "import sys\nfor _ in range(200): sys.stderr.write('x' * 20_000)",
        "import os, sys\nchild = os.fork()\nif child == 0: sys.exit(0)\nassert os.waitpid(child, 0)[0] == child",
    ],
    ids=[
        "threads that never end",
        "closed output",
        "folder removed",
        "many files",
        "modes",
        "deep folders",
        "much output",
        "a child that exits",
    ],
)
@pytest.mark.parametrize("without", [(), BARE_CONTAINER], ids=["all", "bare"])
def test_passes_and_leaves_nothing(source: str, without: tuple[Layer, ...], folder: Path) -> None:
    outcome = run_program(source, without=without)
    assert outcome.passed, outcome
    assert len(outcome.output) <= 65536
    assert list(folder.iterdir()) == []
    assert survivors() == []


def test_output_that_is_no_text() -> None:
    outcome = run_program("import sys\nsys.stdout.buffer.write(b'a\\xff\\xfeb')")
    assert (outcome.passed, outcome.output) == (True, "a\ufffd\ufffdb")


def test_sets_have_one_order() -> None:
    outputs = {run_program("print({'a', 'b', 'c', 'd', 'e', 'f', 'g'})").output for _ in range(3)}
    assert len(outputs) == 1


def test_many_programs_from_several_threads() -> None:
    sources = [f"def f(x): return x + {n}\nassert f(1) == {n + 1 + n % 2}" for n in range(40)]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda source: run_program(source).passed, sources))
    assert verdicts == [n % 2 == 0 for n in range(40)]


@pytest.mark.parametrize("without", [(), BARE_CONTAINER], ids=["all", "bare"])
def test_dies_with_the_process_that_started_it(without: tuple[Layer, ...], folder: Path) -> None:
    program = (
        f"import sys, tempfile; sys.path.append({PACKAGE!r}); tempfile.tempdir = {str(folder)!r}\n"
        "from codellama.evaluation.execution import run_program\n"
        f'run_program(\'import os; open("x", "w"); os.execv("/bin/sleep", ["sleep", "{SLEEPER}"])\', timeout=60, '
        f"without={without})"
    )
    started = subprocess.Popen([sys.executable, "-c", program])
    wait_until(lambda: any(line.startswith("sleep") for line in survivors()))
    started.kill()
    started.wait()
    wait_until(lambda: survivors() == [] and list(folder.iterdir()) == [])


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_limits_are_checked_first() -> None:
    for limits in (
        {"timeout": 0},
        {"timeout": float("nan")},
        {"memory": -1},
        {"output": 0},
        {"cpu_time": float("inf")},
    ):
        with pytest.raises(ValueError, match="must be positive"):
            run_program("", **limits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown layers: walls; there are namespaces"):
        run_program("", without=["walls"])  # type: ignore[list-item]


def test_remove_takes_what_rmtree_does_not(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "file").touch()
    (top / "link").symlink_to(tmp_path)
    (top / "a" / "b").chmod(0)
    (top / "a").chmod(0o500)
    remove(str(top))
    assert list(tmp_path.glob("top*")) == []
    assert tmp_path.is_dir()
