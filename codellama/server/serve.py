"""Start the server: a socket, the app on it, and the engine's thread; and end all three in order.

It knows nothing of what is asked or answered.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from codellama.assembly import Parts, assemble
from codellama.config import RuntimeArgs
from codellama.errors import ParallelSizeError
from codellama.safety import SafetyHook
from codellama.server.app import make_app
from codellama.server.service import EngineService

logger = logging.getLogger(__name__)

GRACE = 10  # seconds that running answers get after SIGTERM


def serve(
    ckpt_dir: str | None,
    tokenizer_path: str | None,
    runtime: RuntimeArgs,
    *,
    host: str,
    port: int,
    model_id: str,
    api_key: str | None,
    max_queue: int,
    device: str | None,
    dtype: str | None,
    seed: int | None,
    checkpoint_format: str | None,
    safety: SafetyHook | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; under torchrun, world rank 0 serves and the others follow.

    Raises:
        CodeLlamaError: the model cannot be loaded, or it failed.
        OSError: the port is taken.
    """

    def build() -> Parts:
        parts = assemble(
            ckpt_dir, tokenizer_path, runtime, None, device, dtype, seed, None, checkpoint_format, None
        )  # fmt: skip
        if parts.parallel.n_replicas > 1:
            raise ParallelSizeError("a server runs one copy of the weights; start one for each copy")
        return parts

    if os.environ.get("RANK", "0") != "0":
        parts = build()
        with _graceful(), parts.parallel.together():  # torchrun sends SIGTERM to all: the leader's word is awaited
            parts.engine.follow()
        return
    serve_parts(
        build, runtime, host=host, port=port, model_id=model_id, api_key=api_key, max_queue=max_queue, safety=safety
    )  # fmt: skip


def serve_parts(
    build: Callable[[], Parts],
    runtime: RuntimeArgs,
    *,
    host: str,
    port: int,
    model_id: str,
    api_key: str | None,
    max_queue: int,
    safety: SafetyHook | None = None,
) -> None:
    """Listen at once, load meanwhile, and serve; arguments and errors are those of `serve`."""
    listener = _listen(host, port)

    def leave() -> None:
        server.should_exit = True

    service = EngineService(build, runtime, on_end=leave)
    app = make_app(service, model_id, api_key, max_queue, safety=safety)
    last = GRACE + 5  # by then a running answer has been cut, and has said so
    config = uvicorn.Config(
        app, log_level="warning", lifespan="off", timeout_graceful_shutdown=last, server_header=False
    )  # fmt: skip
    server = _Server(config, cut=service.stop)
    address = listener.getsockname()
    logger.info("serving on http://%s:%d/v1 (SIGTERM or Ctrl-C ends it)", *address[:2])
    service.start()
    try:
        with _graceful():
            server.run(sockets=[listener])
    finally:
        service.stop()
        listener.close()
    if service.error is not None:
        raise service.error


class _Server(uvicorn.Server):
    """Cuts the answers that still run when the grace is over."""

    def __init__(self, config: uvicorn.Config, cut: Callable[[], None]) -> None:
        super().__init__(config)
        self._cut = cut

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = threading.Timer(GRACE, self._cut)
        timer.start()
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def _listen(host: str, port: int) -> socket.socket:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from error


@contextlib.contextmanager
def _graceful() -> Iterator[None]:
    """Make SIGTERM a way to end, not to die of: uvicorn raises it once more when it has shut down."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
