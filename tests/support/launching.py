"""`open_page` as a program of its own, as `codellama chat --web` runs it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import codellama
from tests.support.serving import wait_until

PROGRAM = """
import json, logging, sys
from codellama.chat.web import open_page
logging.basicConfig(level=logging.INFO, format="%(message)s")
try:
    open_page(**json.loads(sys.argv[1]), headless=True)
except Exception as error:
    sys.exit(f"failed: {error}")
"""
READY = re.compile(r"^the chat page is at (\S+) and talks to (\S+);", re.MULTILINE)


class Launched:
    """Runs within a block, and is killed at its end if it still does."""

    def __init__(self, **arguments: Any) -> None:
        """Prepare; the arguments are those of open_page."""

        self._words = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
        self.told = ""

    def __enter__(self) -> "Launched":
        self.process = subprocess.Popen(
            self._words, cwd=Path(codellama.__file__).parents[1], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told += line

    def ready(self) -> tuple[str, str]:
        """Wait for the page and return its address and the server's base URL."""
        wait_until(lambda: READY.search(self.told) or self.process.poll() is not None, 120)
        found = READY.search(self.told)
        assert found, self.told
        return found[1], found[2]

    @property
    def children(self) -> list[int]:
        """Process ids of the server and the page."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def end(self, number: signal.Signals) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # the children are tethered
        self.process.wait()
        self._reader.join(30)
        assert self.process.stderr is not None
        self.process.stderr.close()


def runs(pid: int) -> bool:
    """Say whether a process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
