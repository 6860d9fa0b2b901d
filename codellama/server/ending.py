"""How a server's process ends: what signals do, the grace of running answers, and an end without Python's help.

It knows nothing of what is served.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

from codellama.server.proxy import KEEP_SECONDS

logger = logging.getLogger(__name__)


def nothing() -> None:
    """Go on."""


class Server(uvicorn.Server):
    """Cuts the answers that still run when the grace is over; the second signal ends the process at once."""

    def __init__(self, app: ASGIApp, grace: float, cut: Callable[[], None] = nothing) -> None:
        """Serve an app; cut ends its answers, so many seconds after the first signal."""
        last = int(grace) + 5  # by then a running answer has been cut, and has said so
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="on", ws="none", timeout_graceful_shutdown=last,
            timeout_keep_alive=2 * int(KEEP_SECONDS), server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self._grace, self._cut = grace, cut

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        timer = threading.Timer(self._grace, self._cut)
        timer.start()
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn."""
        signal.signal(sig, signal.SIG_DFL)
        super().handle_exit(sig, frame)


@contextlib.contextmanager
def handling(numbers: tuple[signal.Signals, ...], act: Callable[[], None]) -> Iterator[None]:
    """Do this at the first of these signals; the second one ends the process at once, as if nobody handled it."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        act()

    before = [(number, signal.signal(number, handle)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def give_up(error: BaseException) -> NoReturn:
    """End this process because of this error."""
    logger.critical("%s", error)
    leave(1)


def leave(status: int) -> NoReturn:
    """End this process without Python, which aborts where a thread waits inside a collective."""
    logging.shutdown()
    os._exit(status)
