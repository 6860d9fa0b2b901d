"""Clients that cannot share our environment, against a live server: the openai SDK's own tests, and ShellGPT.

`make clients` runs it. It makes environments in build/clients, fetches the SDK's source there, and prints a line for
each check; the status is 1 when one failed. It needs a package index, so CI does not run it.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
ROOT = Path(__file__).parents[2]
SDK_TESTS = ("chat/test_completions.py", "test_completions.py", "test_models.py")
# Chats that a server has stored are listed and retrieved in TestCompletions, too; this one stores nothing.
SDK_CASES = "(create and not Messages) or (Models and (list or retrieve))"
SDK_NEEDS = ("aiohttp", "inline-snapshot", "nest_asyncio", "pytest", "pytest-asyncio", "rich")
SHELL_GPT = ("shell-gpt==1.5.1", "click")


def environment(folder: Path, *packages: str) -> Path:
    """Make an environment once and return its programs' folder."""
    done = folder / "done"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *packages], check=True)
        done.write_text("\n".join(packages))
    return folder / "bin"


def sdk_source(build: Path) -> Path:
    """Fetch the source of the SDK that our environment has, once."""
    source = f"openai-{version('openai')}"
    if not (build / source).exists():
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*fetch, "--dest", build, source.replace("-", "==")], check=True)
        with tarfile.open(build / f"{source}.tar.gz") as archive:
            archive.extractall(build, filter="data")
    return build / source


@contextlib.contextmanager
def server() -> Iterator[tuple[str, int]]:
    """Serve the demo checkpoint and yield the base URL and the process's id."""
    command = [sys.executable, "-m", "codellama", "serve", "--port", "0", "--device", "cpu", "--dtype", "float32"]
    command += ["--max_seq_len", "2048"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log, cwd=ROOT)
        try:
            yield address(process, log.fileno()), process.pid
        finally:
            process.terminate()
            process.wait(30)


def address(process: subprocess.Popen[bytes], log: int) -> str:
    """Return the address in the log's first line, once the model is loaded."""
    url, until = "", time.monotonic() + 60
    while time.monotonic() < until:
        said = os.pread(log, 10_000, 0).decode()
        assert process.poll() is None, said
        if "\n" in said:
            url = said.split()[2]
            with contextlib.suppress(urllib.error.HTTPError):  # 503 while it loads
                opener.open(url.removesuffix("/v1") + "/health")
                return url
        time.sleep(0.1)
    raise TimeoutError("the server did not start within a minute")


def run_sdk_tests(url: str, build: Path) -> bool:
    """Run the SDK's own tests of the resources that we serve."""
    programs = environment(build / "sdk", f"openai=={version('openai')}", *SDK_NEEDS)
    command = [programs / "python", "-m", "pytest", "-q", "--tb=short", "--show-capture=no", "-o", "addopts="]
    command += ["-k", SDK_CASES, *(f"tests/api_resources/{name}" for name in SDK_TESTS)]
    variables = {**os.environ, "TEST_API_BASE_URL": url, "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, cwd=sdk_source(build), env=variables, capture_output=True, text=True)
    return report(f"openai {version('openai')}, its own tests", done, done.returncode == 0)


class ShellGpt:
    """ShellGPT with a home of its own."""

    def __init__(self, url: str, build: Path, home: Path) -> None:
        self._program = environment(build / "shell_gpt", *SHELL_GPT) / "sgpt"
        self._variables = {
            "PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home), "API_BASE_URL": url,
            "OPENAI_API_KEY": "any", "NO_PROXY": "127.0.0.1", "PRETTIFY_MARKDOWN": "false",
        }  # fmt: skip

    def __call__(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [self._program, "--no-cache", *arguments]
        return subprocess.run(
            command, env=self._variables, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
        )

    def check(self) -> bool:
        """Ask in every mode; a chat long enough that its history loses its beginning."""
        ok = self._asked("a question", "Write a function that adds two numbers.")
        ok &= self._asked("code alone", "--code", "reverse a list")
        for turn, asked in enumerate(("adds two numbers", "reverses a list")):
            ok &= self._asked(f"a chat, turn {turn + 1}", "--chat", "two", f"Write a function that {asked}.")
        shown = self("--show-chat", "two")
        ok &= report("sgpt: the chat is kept", shown, shown.stdout.count("user: Write a function") == 2)
        self._variables["CHAT_CACHE_LENGTH"] = "4"
        for turn in range(5):
            ok &= self._asked(
                f"a long chat, turn {turn + 1}", "--chat", "long", f"Write a function that adds {turn + 3}."
            )
        return ok

    def _asked(self, what: str, *arguments: str) -> bool:
        done = self(*arguments)
        return report(f"sgpt: {what}", done, done.returncode == 0 and done.stdout.strip() != "")


def report(what: str, done: "subprocess.CompletedProcess[str]", ok: bool) -> bool:
    """Print how a check went, with all that was said where it failed."""
    said = (done.stdout.strip().splitlines() or [""])[-1][:80] if ok else f"\n{done.stdout}\n{done.stderr}"
    print(f"{'ok' if ok else 'FAILED'}  {what}: {said}", flush=True)
    return ok


def main() -> int:
    """Run all; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build/clients", help="where environments are made")
    build = parser.parse_args().build
    build.mkdir(parents=True, exist_ok=True)
    with server() as (url, _), tempfile.TemporaryDirectory() as home:
        checks = [run_sdk_tests(url, build), ShellGpt(url, build, Path(home)).check()]
    return 0 if all(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
