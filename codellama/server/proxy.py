"""Before several replicas: an app that hands each request to the least busy of them, and their answers back.

Replicas are servers of their own; it knows where they listen and the key that they want, and nothing of what is asked
or answered: bytes come in and go out as they are, streams piece by piece.
"""

import asyncio
import logging
import zlib
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from codellama.server.faults import error_body, fault_response
from codellama.server.running import dump, gone
from codellama.server.totals import merge

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 5.0
KEEP_SECONDS = 30.0  # an idle connection to a replica is used again for so long; replicas keep theirs open for longer
_LIKENESS = 256  # bytes of a body that say which conversation it is, among replicas that are equally busy
_TIMEOUT = httpx2.Timeout(None, connect=CONNECT_SECONDS)  # how long an answer may take is the replica's business
_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
    b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
_OURS = {b"content-length", b"authorization", b"expect"}  # of a request: they are written anew

Headers = Iterable[tuple[bytes, bytes]]


@dataclass
class Replica:
    """A copy of the weights: where it listens, and how many requests it has."""

    name: str
    url: str
    in_flight: int = 0


class Proxy:
    """An ASGI app in front of replicas. Nothing is answered before `open` nor after `fail`."""

    def __init__(self, n_replicas: int) -> None:
        """Wait for so many replicas."""
        self._n_replicas = n_replicas
        self._replicas: list[Replica] = []
        self._authorization = b""
        self._client = httpx2.AsyncClient(
            limits=httpx2.Limits(keepalive_expiry=KEEP_SECONDS), timeout=_TIMEOUT, trust_env=False
        )  # fmt: skip
        self._failure: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._broken = asyncio.Event()

    def open(self, urls: Sequence[str], token: str) -> None:
        """Begin to hand requests on; safe from any thread.

        Args:
            urls: http://HOST:PORT of each replica.
            token: the key that the replicas want.
        """
        assert len(urls) == self._n_replicas, "every replica says where it listens"
        self._authorization = f"Bearer {token}".encode()
        self._replicas = [Replica(str(index), url) for index, url in enumerate(urls)]

    def fail(self, message: str) -> None:
        """End all that is under way with this message, and answer nothing more; safe from any thread."""
        self._failure = message
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._broken.set)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            raise AssertionError(f"the server accepts no {scope['type']}")  # uvicorn is told so

    async def _live(self, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        if self._failure is not None:  # before there was a loop to tell
            self._broken.set()
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._client.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._failure is not None or not self._replicas:
            state = "it is loading" if self._failure is None else self._failure
            await fault_response(503, f"the model is not ready: {state}")(scope, receive, send)
        elif scope["path"] == "/health":
            await (await self._health())(scope, receive, send)
        elif scope["path"] == "/metrics":
            await (await self._metrics())(scope, receive, send)
        else:
            body = await _read(receive)
            if body is not None:
                await self._hand_on(body, scope, receive, send)

    async def _hand_on(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a replica answer, until it has, or its client has gone, or all is over."""
        replica = self._choose(body)
        url = _url_of(replica, scope)
        if url is None:
            await fault_response(400, "the path is no path")(scope, receive, send)
            return
        exchange = _Exchange(self._client, replica, url, self._authorization, scope, body, send)
        try:
            work, _, broken = await _first(exchange.run(), gone(receive), self._broken.wait())
        finally:
            exchange.leave()
        if work is not None and not work.cancelled():
            work.result()  # what went wrong in it is ours to raise
        elif broken is not None:
            await exchange.break_off(self._failure or "the server failed")

    def _choose(self, body: bytes) -> Replica:
        """Take the least busy replica; among equals, the one that is likely to hold the beginning already."""
        least = min(replica.in_flight for replica in self._replicas)
        equals = [replica for replica in self._replicas if replica.in_flight == least]
        return equals[zlib.crc32(body[:_LIKENESS]) % len(equals)]

    async def _health(self) -> Response:
        for replica, found in zip(self._replicas, await self._ask("/health"), strict=True):
            if found is None:
                return fault_response(503, f"replica {replica.name} cannot be reached")
            if found.status_code != 200:
                return Response(found.content, found.status_code, media_type="application/json")
        return JSONResponse({"status": "ok", "replicas": len(self._replicas)})

    async def _metrics(self) -> Response:
        found = await self._ask("/metrics")
        texts = [None if one is None or one.status_code != 200 else one.text for one in found]
        return merge(texts, [replica.in_flight for replica in self._replicas])

    async def _ask(self, path: str) -> list[httpx2.Response | None]:
        """Ask each replica for something small; None is one that does not answer."""

        async def ask(replica: Replica) -> httpx2.Response | None:
            headers = [(b"authorization", self._authorization)]
            try:
                return await self._client.get(f"{replica.url}{path}", headers=headers, timeout=HEALTH_SECONDS)
            except httpx2.TransportError:
                return None

        return await asyncio.gather(*map(ask, self._replicas))


class _Exchange:
    """One request on its way to a replica, and the answer on its way back."""

    def __init__(
        self,
        client: httpx2.AsyncClient,
        replica: Replica,
        url: httpx2.URL,
        authorization: bytes,
        scope: Scope,
        body: bytes,
        send: Send,
    ) -> None:
        headers = [pair for pair in _end_to_end(scope["headers"]) if pair[0] not in _OURS]
        headers.append((b"authorization", authorization))
        self._request = httpx2.Request(scope["method"], url, headers=headers, content=body)
        self._client, self._replica, self._send, self._scope = client, replica, send, scope
        self._replica.in_flight += 1
        self._is_there = True
        self._is_stream = False
        self._started = False
        self._tail = b"\n\n"

    async def run(self) -> None:
        """Send it on, and the answer back; a replica that is lost on the way is told like any other fault."""
        try:
            response = await self._client.send(self._request, stream=True)
            try:
                await self._pass_on(response)
            finally:
                await response.aclose()  # before its end, this closes the connection, and that cancels it there
        except httpx2.TransportError as error:
            logger.error("replica %s cannot be reached: %s", self._replica.name, type(error).__name__)
            await self.break_off(f"replica {self._replica.name} cannot be reached")

    def leave(self) -> None:
        """Count as busy no more; harmless when repeated."""
        self._replica.in_flight -= self._is_there
        self._is_there = False

    async def break_off(self, message: str) -> None:
        """End the answer with an error, as far as that is still possible."""
        if not self._started:
            await fault_response(503, message)(self._scope, _nothing, self._send)
        elif self._is_stream:
            apart = b"" if self._tail.endswith(b"\n\n") else b"\n\n"
            event = f"data: {dump(error_body(500, message))}\n\ndata: [DONE]\n\n".encode()
            await self._send({"type": "http.response.body", "body": apart + event, "more_body": False})
        # else only a piece of a whole answer is missing, and the closed connection tells

    async def _pass_on(self, response: httpx2.Response) -> None:
        headers = [pair for pair in _end_to_end(response.headers.raw) if pair[0] != b"date"]  # uvicorn writes its own
        self._is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        start = {"type": "http.response.start", "status": response.status_code, "headers": headers}
        last = b""
        if self._is_stream:
            self._started = True
            await self._send(start)
            async for piece in response.aiter_raw():
                self._tail = (self._tail + piece)[-2:]
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        else:
            last = b"".join([piece async for piece in response.aiter_raw()])
            self._started = True
            await self._send(start)
        self.leave()  # before the client can ask for more
        await self._send({"type": "http.response.body", "body": last, "more_body": False})


def _url_of(replica: Replica, scope: Scope) -> httpx2.URL | None:
    """Put the path that was asked for behind the replica's address; None where that would become another address."""
    path, query = scope.get("raw_path") or scope["path"].encode(), scope.get("query_string", b"")
    try:
        return httpx2.URL(replica.url).copy_with(raw_path=path + b"?" + query if query else path)
    except (httpx2.InvalidURL, UnicodeDecodeError):
        return None


def _end_to_end(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Drop what is about one connection alone, also what the Connection header names."""
    pairs = [(name.lower(), value) for name, value in headers]
    named = {word.strip().lower() for name, value in pairs if name == b"connection" for word in value.split(b",")}
    return [(name, value) for name, value in pairs if name not in _HOP_BY_HOP and name not in named]


async def _first(*works: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any] | None]:
    """Run them until one has ended, and cancel the others; None is in the place of these."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended = [task if task.done() else None for task in tasks]
        unfinished = [task for task in tasks if not task.done()]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
    return ended


async def _read(receive: Receive) -> bytes | None:
    """Read a body, whose size the guard has judged; None where its client has gone."""
    pieces: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _nothing() -> dict[str, Any]:
    raise AssertionError("a whole response reads nothing")
