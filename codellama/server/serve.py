"""Start the server: a socket, the app on it, and the engine's thread; and end all three in order.

Under torchrun each process has a part: world rank 0 listens where clients ask; each leader of a replica runs an engine,
and where there are several, an inner server for it; the others follow. It knows nothing of what is asked or answered.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from starlette.types import ASGIApp

from codellama.assembly import Parts, assemble
from codellama.config import RuntimeArgs
from codellama.errors import RankError
from codellama.parallel import replica_size
from codellama.server.app import admitting, make_app
from codellama.server.banner import write_banner
from codellama.server.ending import Server, give_up, handling, leave, nothing
from codellama.server.group import Watch, inner_listener, meet, url_of
from codellama.server.proxy import Proxy
from codellama.server.service import EngineService
from codellama.server.settings import Settings

logger = logging.getLogger(__name__)

LOST_GRACE = 5  # seconds to say so and to end in order when another process is gone


def serve(
    ckpt_dir: str | None,
    tokenizer_path: str | None,
    runtime: RuntimeArgs,
    settings: Settings,
    model_parallel_size: int | None,
    *,
    device: str | None,
    dtype: str | None,
    quantize: str | None,
    seed: int | None,
    checkpoint_format: str | None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; under torchrun, a call of all ranks.

    Where a group that serves loses a rank, or its model fails, this ends the process, with one line and status 1.

    Raises:
        CodeLlamaError: the model cannot be loaded, or it failed.
        ParallelSizeError: model_parallel_size does not divide the number of processes.
        OSError: the port is taken.
    """
    world_size, world_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    size = replica_size(model_parallel_size, world_size)

    def load(on_lost: Callable[[RankError], None]) -> Parts:
        return assemble(
            ckpt_dir, tokenizer_path, runtime, size, device, dtype, seed, None, checkpoint_format, None,
            quantize, on_lost,
        )  # fmt: skip

    leads, is_group = world_rank % size == 0, world_size > 1
    part = Part(load, runtime, settings, n_replicas=world_size // size, leads=leads, is_group=is_group)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # the proxy's client would write a line for each request
    if world_rank == 0:
        part.serve_clients(_listen(settings.host, settings.port))
    else:
        part.serve_group()


class Part:
    """What one process does for the server, from its start to its end."""

    def __init__(
        self,
        load: Callable[[Callable[[RankError], None]], Parts],
        runtime: RuntimeArgs,
        settings: Settings,
        *,
        n_replicas: int,
        leads: bool,
        is_group: bool,
    ) -> None:
        """Prepare; nothing is loaded.

        Args:
            load: makes the parts; it is given what to call when another rank has died.
            n_replicas: copies of the weights in the group.
            leads: this rank is the leader of one.
            is_group: there are other ranks.
        """
        self._load, self._settings = load, settings
        self._n_replicas, self._leads, self._is_group = n_replicas, leads, is_group
        self._service = EngineService(self._build, runtime, on_end=self._leave, on_ready=self._greet)
        self._greeting: Callable[[Parts], str] | None = None
        self._over = threading.Event()
        self._outer: Server | None = None
        self._proxy = Proxy(n_replicas) if n_replicas > 1 else None
        self._listener = inner_listener() if n_replicas > 1 and leads else None
        self._inner: tuple[Server, threading.Thread] | None = None
        self._watch: Watch | None = None

    def serve_clients(self, listener: socket.socket) -> None:
        """Be world rank 0: listen at once, load meanwhile, and serve."""
        settings = self._settings
        app: ASGIApp = make_app(self._service, settings) if self._proxy is None else admitting(self._proxy, settings)
        self._outer = server = Server(app, settings.grace, self._stop)
        host, port = listener.getsockname()[:2]
        logger.info("serving on http://%s:%d/v1 when the model is loaded", f"[{host}]" if ":" in host else host, port)
        self._greeting = partial(write_banner, settings=settings, host=host, port=port)
        self._service.start()
        try:
            with handling((signal.SIGTERM,), nothing):  # uvicorn raises it once more when it has shut down
                server.run(sockets=[listener])
        finally:
            self._stop()
            self._close()
            listener.close()
        self._finish()

    def serve_group(self) -> None:
        """Be another rank: lead a replica or follow, until world rank 0 says that all is over, or is gone."""
        # torchrun sends signals to all: where answers run, world rank 0's word is awaited, which gives them their grace
        with handling((signal.SIGTERM, signal.SIGINT), self._leave_unless_serving):
            self._service.start()
            self._over.wait()
            if self._leads or self._service.error is None:  # else its leader may not even know yet that it is over
                self._service.stop()
            self._close()
            if self._service.error is None and self._watch is not None:
                self._watch.join(LOST_GRACE)
        self._finish()

    def _greet(self, parts: Parts) -> None:
        """Say that requests are answered, on world rank 0."""
        if self._greeting is not None:
            logger.info("%s", self._greeting(parts))

    def _build(self) -> Parts:
        """Load and meet the others, in the engine's thread."""
        parts = self._load(self._lose)
        if self._n_replicas > 1:
            urls, token = meet(parts.parallel, None if self._listener is None else url_of(self._listener))
            if self._listener is not None:
                self._open(self._listener, token)
            if self._proxy is not None:
                self._proxy.open(urls, token)
            self._watch = Watch(parts.parallel, self._leave, self._lose)
        return parts

    def _finish(self) -> None:
        """Raise what went wrong.

        Python aborts where a thread waits inside a collective, as one does when a group has begun to serve and is torn
        apart, or is told to end while it loads: then this process ends without Python's help.
        """
        error, began = self._service.error, self._service.began
        if self._is_group and began and error is not None:
            give_up(error)
        if self._is_group and not began and error is None:
            leave(0)
        if error is not None:
            raise error

    def _open(self, listener: socket.socket, token: str) -> None:
        """Start the replica's own server."""
        inner = replace(self._settings, api_key=token, cors=())
        server = Server(make_app(self._service, inner), inner.grace)
        thread = threading.Thread(target=partial(server.run, sockets=[listener]), name="inner server", daemon=True)
        thread.start()
        self._inner = server, thread

    def _stop(self) -> None:
        """End all replicas' answers now, on world rank 0."""
        if self._watch is not None and not self._over.is_set():
            self._watch.stop_all()
        self._service.stop()

    def _close(self) -> None:
        """End the inner server, whose answers have ended."""
        if self._inner is not None:
            server, thread = self._inner
            server.should_exit = True
            thread.join(LOST_GRACE)
        elif self._listener is not None:
            self._listener.close()

    def _lose(self, error: RankError) -> None:
        """End this process because another one is gone: every answer says so, and nothing is waited for in vain."""
        deadline = threading.Timer(LOST_GRACE, give_up, [error])  # a thread may wait for the one that is gone
        deadline.daemon = True
        deadline.start()
        self._service.fail(error)
        if self._proxy is not None:
            self._proxy.fail("a process of the server is gone")
        self._leave()

    def _leave_unless_serving(self) -> None:
        if self._service.status().state == "loading":
            self._leave()

    def _leave(self) -> None:
        """Let the main thread end this process."""
        self._over.set()
        if self._outer is not None:
            self._outer.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from error
