"""The processes of one server: how the replicas meet, how one word ends all, and what happens when one is lost.

Control goes over the world's channel, like all that ranks tell each other; requests go over HTTP. It knows nothing of
either's content, and loads no torch: who joined the ranks does.
"""

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from codellama.errors import RankError

if TYPE_CHECKING:
    from codellama.parallel import Parallel

logger = logging.getLogger(__name__)

_STOP = 1


def inner_listener() -> socket.socket:
    """Listen, on a free port, where the other processes of the group can reach this one and as few others as may be.

    That is the loopback address where all are on this machine, else the address from which the first one is reached.
    """
    host = "127.0.0.1"
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        family, _, _, _, address = socket.getaddrinfo(*first, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: it asks for the way
            host = probe.getsockname()[0]
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def url_of(listener: socket.socket) -> str:
    """Write where a socket listens."""
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def meet(parallel: "Parallel", url: str | None) -> tuple[list[str], str]:
    """Tell each other where the replicas listen, and agree on a key. A call of all ranks.

    Args:
        url: where this rank's replica listens; None on ranks that are no leaders.

    Returns:
        The replicas' addresses, in their order, and the key.
    """
    assert parallel.world is not None, "several replicas are several processes"
    token = parallel.share(lambda: secrets.token_urlsafe(32))
    urls = [found for found in parallel.world.gather_objects(url) if found is not None]
    return urls, token


class Watch:
    """The world's channel while several replicas serve: idle messages find a rank that died, and one word stops all."""

    def __init__(self, parallel: "Parallel", on_stop: Callable[[], None], on_lost: Callable[[RankError], None]) -> None:
        """Begin to watch; on world rank 0 the channel's own thread does, and calls what `join` was given.

        Args:
            on_stop: called from a thread of another rank when world rank 0 says that all is over.
            on_lost: called from it when world rank 0, or who stands between, is gone.
        """
        assert parallel.world is not None, "several replicas are several processes"
        self._channel = parallel.world
        self._on_stop, self._on_lost = on_stop, on_lost
        self._expecting = ExitStack()
        self._lock = threading.Lock()
        self._told = False
        self._thread: threading.Thread | None
        if self._channel.is_leader:
            self._expecting.enter_context(self._channel.expecting())  # every rank is to be there until it is told
            self._thread = None
        else:
            self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
            self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the word, which is on its way: Python cannot end well while a thread waits inside a collective."""
        if self._thread is not None:
            self._thread.join(seconds)

    def stop_all(self) -> None:
        """Let every other rank stop, on world rank 0; harmless when repeated, and where a rank is gone."""
        with self._lock:
            if self._told:
                return
            self._told = True
            self._expecting.close()
            try:
                self._channel.send_integers([_STOP])
            except RankError as error:
                logger.error("%s", error)

    def _listen(self) -> None:
        try:
            self._channel.receive_integers()
        except RankError as error:
            self._on_lost(error)
        else:
            self._on_stop()
