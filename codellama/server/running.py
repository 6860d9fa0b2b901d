"""Generations under way: from the engine's thread into asyncio, and out as one body or as a stream of events.

It knows of HTTP only how bytes are sent and how a client that has gone is noticed.
"""

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

from anyio import to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from codellama.errors import GrammarError, NumericalError
from codellama.generation.prompt import Prompt
from codellama.generation.request import Delta
from codellama.server.access import RECORD
from codellama.server.answers import Json
from codellama.server.faults import BrokenAnswerError, BusyError, DeadEndError, DeadlineError, error_body, tell
from codellama.server.record import Record
from codellama.server.service import Handle, Service

logger = logging.getLogger(__name__)

KEEP_ALIVE = 5.0  # seconds of silence after which a comment shows that somebody is still there


class Answering(Protocol):
    """What an answer in somebody's words must do."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts; those that are answered several times count once."""

    @property
    def n_generated(self) -> int:
        """Tokens of all texts so far."""

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that the cache held already."""

    @property
    def done(self) -> str:
        """What a stream ends with, beside its last event."""

    def openings(self) -> Iterator[Json]:
        """Chunks that a stream begins with."""

    def take(self, index: int, delta: Delta) -> None:
        """Take a delta of a prompt, for `whole`."""

    def push(self, index: int, delta: Delta) -> Iterator[Json]:
        """Take a delta of a prompt and yield the chunks that tell it."""

    def closing(self) -> Iterator[Json]:
        """Chunks that a stream ends with."""

    def whole(self) -> Json | list[Json]:
        """All of it, once everything has ended."""


class Admission:
    """How many prompts may be under way, those that are being made or wait for a row included."""

    def __init__(self, limit: int) -> None:
        """Let in so many."""
        self.limit = limit
        self._taken = 0

    def taking(self, n: int) -> ExitStack:
        """Take n places; closing what is returned gives them back, once.

        Raises:
            BusyError: there are not so many left.
        """
        if self._taken + n > self.limit:
            raise BusyError(f"{self._taken} prompts are under way, of {self.limit} at most; {n} more do not fit now")
        self._taken += n
        places = ExitStack()
        places.callback(self._give_back, n)
        return places

    def _give_back(self, n: int) -> None:
        self._taken -= n


class Run:
    """The prompts of one HTTP request, running. Close it, whatever happens."""

    def __init__(
        self, service: Service, places: ExitStack, prompts: Sequence[Prompt], timeout: float | None = None
    ) -> None:
        """Submit them; call it on the event loop. After timeout seconds, `next` raises DeadlineError.

        Args:
            places: closed by `close`, also where this fails.

        Raises:
            BusyError: a safety hook still reads as much as it may.
            NotReadyError: there is no model.
        """
        self._service, self._places = service, places
        self._loop = asyncio.get_running_loop()
        self._deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._timeout = timeout
        self._deadline = None if timeout is None else self._loop.time() + timeout
        self._open = self._unended = len(prompts)
        self._handles: list[Handle] = []
        try:
            for index, prompt in enumerate(prompts):
                self._handles.append(service.submit(prompt, partial(self._receive, index)))
        except BaseException:
            self.close()
            raise

    def _receive(self, index: int, delta: Delta) -> None:
        """Take a delta, in the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._note, index, delta)

    def _note(self, index: int, delta: Delta) -> None:
        """Keep a delta for `next`; when all have ended the places are free, even if nobody reads what is sent."""
        self._deltas.put_nowait((index, delta))
        self._unended -= delta.finish_reason is not None
        if self._unended == 0:
            self._places.close()

    @property
    def running(self) -> bool:
        """True until every prompt has ended."""
        return self._open > 0

    async def next(self) -> tuple[int, Delta]:
        """Wait for what comes next: the place of a prompt, and its delta.

        Raises:
            BrokenAnswerError: a prompt ended before it was done; DeadlineError: it took too long.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                index, delta = await self._deltas.get()
        except TimeoutError as error:
            raise DeadlineError(
                f"the answer takes longer than {self._timeout:g} seconds, the server's limit"
            ) from error
        if delta.finish_reason is not None:
            self._open -= 1
        if isinstance(delta.error, GrammarError):
            raise DeadEndError(str(delta.error))
        if delta.finish_reason == "error":
            known = isinstance(delta.error, NumericalError | BrokenAnswerError)
            raise BrokenAnswerError(str(delta.error) if known else "the model failed; the server's log says why")
        if delta.finish_reason == "cancelled":
            raise BrokenAnswerError("the server was stopped before the answer was done")
        return index, delta

    def close(self) -> None:
        """End what has not ended and give the places back; harmless when repeated."""
        for handle in self._handles:
            self._service.cancel(handle)
        self._places.close()
        self._handles = []


class Running(Response):
    """A response that is made while it is sent, and that ends when the client goes away."""

    def __init__(self, run: Run, answer: Answering, *, stream: bool, log_answers: bool = False) -> None:
        """Send the answer of a run as server-sent events, or as one JSON object."""
        super().__init__()
        self._run, self._answer, self._stream, self._log_answers = run, answer, stream, log_answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, or stop at once when nobody listens any more."""
        record = scope[RECORD]
        record.prompt_tokens = self._answer.prompt_tokens
        work = asyncio.create_task(
            self._events(send, record) if self._stream else self._whole(scope, receive, send, record)
        )
        left = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not work.done():
                record.ends.append("gone")
            self._run.close()
            unfinished = [task for task in (work, left) if not task.done()]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
        if work.done() and not work.cancelled():
            work.result()  # what went wrong in it is ours to raise

    async def _next(self, record: Record) -> list[Json]:
        """Wait for what comes next, and return the chunks that tell it."""
        index, delta = await self._run.next()
        before = self._answer.n_generated
        chunks: list[Json] = []
        if self._stream:
            chunks += self._answer.push(index, delta)
        else:
            self._answer.take(index, delta)
        record.cached_tokens = self._answer.cached_tokens
        record.take(index, delta, self._answer.n_generated - before)
        if self._log_answers and delta.text:
            logger.info("id=%s answer=%d text=%r", record.id, index, delta.text)
        return chunks

    async def _whole(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        try:
            while self._run.running:
                await self._next(record)
        except BrokenAnswerError as error:
            record.ends.append(type(error).__name__)
            response: Response = tell(error)
        else:
            # Log-probabilities of many tokens are much text: the event loop has other clients meanwhile.
            body = await to_thread.run_sync(lambda: dump(self._answer.whole()))
            response = Response(body, media_type="application/json")
        await response(scope, receive, send)

    async def _events(self, send: Send, record: Record) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in self._answer.openings():
            await _send(send, f"data: {dump(chunk)}\n\n")
        if not any(self._answer.openings()):
            await _send(send, ": keep-alive\n\n")  # else the headers would wait for the first piece
        try:
            while self._run.running:
                try:
                    chunks = await asyncio.wait_for(self._next(record), KEEP_ALIVE)
                except TimeoutError:
                    await _send(send, ": keep-alive\n\n")
                    continue
                for chunk in chunks:
                    await _send(send, f"data: {dump(chunk)}\n\n")
            for chunk in self._answer.closing():
                await _send(send, f"data: {dump(chunk)}\n\n")
        except BrokenAnswerError as error:
            record.ends.append(type(error).__name__)
            await _send(send, f"data: {dump(error_body(error.status, str(error)))}\n\n")
        await send({"type": "http.response.body", "body": self._answer.done.encode(), "more_body": False})


async def gone(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


def dump(value: Any) -> str:
    """Write JSON as it is sent; a lone surrogate, such as one to stop at, cannot be sent as a character."""
    written = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return written.encode(errors="backslashreplace").decode()  # which is how JSON escapes it
