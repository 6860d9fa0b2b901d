"""Ctrl-C while an answer is written: it ends the answer and not the process.

Alone, a process gets SIGINT. Under torchrun it must not come to that: the terminal would send it to torchrun, which
ends all ranks. So the terminal is told to make no signal of the key, and the key is read. This module knows nothing
of models.
"""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from types import FrameType

_CTRL_C = b"\x03"
_LOCAL_FLAGS, _CHARACTERS = 3, 6  # places in what termios tells


class Interrupt:
    """Watches for Ctrl-C during one answer.

    Attributes:
        ended: a signal came although keys are read: the whole group of processes is asked to end.
    """

    def __init__(self, *, by_key: bool, breaks: bool) -> None:
        """Watch.

        Args:
            by_key: read the key, since a signal would end other processes.
            breaks: the first signal interrupts what is waited for; else the second one does.
        """
        self._by_key = by_key
        self._n_free = 0 if breaks else 1
        self._signals = 0
        self._key = False
        self._waits = False
        self.ended = False

    @property
    def asked(self) -> bool:
        """True once Ctrl-C was pressed."""
        if self._by_key and not self._key and sys.stdin.isatty():
            descriptor = sys.stdin.fileno()
            while select.select([descriptor], [], [], 0)[0] and (typed := os.read(descriptor, 1024)):
                self._key = self._key or _CTRL_C in typed
        return self._key or self._signals > 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch during the body."""
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            with _keys_are_read() if self._by_key and sys.stdin.isatty() else contextlib.nullcontext():
                yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark a body that may be interrupted.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed, as often as it takes.
        """
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        self.ended = self._by_key
        if self._waits and not self._by_key and self._signals > self._n_free:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _keys_are_read() -> Iterator[None]:
    """Let keys arrive one by one, unseen, and be no signals."""
    import termios  # late: only where there are several ranks, which is never on Windows

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    changed = termios.tcgetattr(descriptor)
    changed[_LOCAL_FLAGS] &= ~(termios.ISIG | termios.ICANON | termios.ECHO)
    changed[_CHARACTERS][termios.VMIN], changed[_CHARACTERS][termios.VTIME] = 1, 0
    termios.tcsetattr(descriptor, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
