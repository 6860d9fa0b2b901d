"""A program in a terminal of its own, where keys are typed and what is shown is read."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-Z\\-_=>])")
# Makes the terminal the process's own, so that Ctrl-C means what it does for people.
_LAUNCH = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
CTRL_C, CTRL_D, ALT_ENTER = "\x03", "\x04", "\x1b\r"


class PseudoTerminal:
    """Runs `python ARGUMENTS` from the beginning of a with block; at its end, whatever still runs is killed."""

    def __init__(self, *arguments: str, env: dict[str, str], seconds: float = 60) -> None:
        self._arguments = arguments
        self._env = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"} | env
        self._env |= {"PYTHONPATH": str(_ROOT), "NO_COLOR": "1", "PYTHONWARNINGS": "default"}
        self._seconds = seconds
        self._bytes = b""
        self._place = 0

    def __enter__(self) -> "PseudoTerminal":
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        words = [sys.executable, "-c", _LAUNCH, sys.executable, *self._arguments]
        self.process = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, env=self._env, start_new_session=True
        )
        os.close(slave)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._master)

    @property
    def shown(self) -> str:
        """All that was shown so far, as text."""
        return _ESCAPES.sub("", self._bytes.decode(errors="replace")).replace("\r", "").replace("\b", "")

    def type(self, text: str | bytes) -> None:
        os.write(self._master, text.encode() if isinstance(text, str) else text)

    def expect(self, pattern: str) -> str:
        """Wait until this is shown behind what was expected before, and return what stands in between."""
        until = time.monotonic() + self._seconds
        while (found := re.search(pattern, self.shown[self._place :])) is None:
            left = until - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.shown[self._place :]!r}"
            if not self._read(min(left, 0.2)):
                assert self.process.poll() is None or self._read(0), f"ended without {pattern!r}: {self.shown!r}"
        before = self.shown[self._place : self._place + found.start()]
        self._place += found.end()
        return before

    def end(self) -> int:
        """Wait until the program has ended, and return its exit status."""
        until = time.monotonic() + self._seconds
        while self.process.poll() is None:
            assert time.monotonic() < until, f"still running: {self.shown!r}"
            self._read(0.1)
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            piece = os.read(self._master, 65536)
        except OSError:  # nobody has the other side any more
            time.sleep(0.05)
            return False
        self._bytes += piece
        return bool(piece)
