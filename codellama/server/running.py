"""Generations under way: from the engine's thread into asyncio, and out as one body or as a stream of events.

It knows of HTTP only how bytes are sent and how a client that has gone is noticed.
"""

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from codellama.errors import NumericalError
from codellama.generation.prompt import Prompt
from codellama.generation.request import Delta, Request
from codellama.server.answers import Answer
from codellama.server.faults import BrokenAnswerError, BusyError, error_body, tell
from codellama.server.service import Service

KEEP_ALIVE = 5.0  # seconds of silence after which a comment shows that somebody is still there


class Admission:
    """How many prompts may be under way, those that wait for a row included."""

    def __init__(self, limit: int) -> None:
        """Let in so many."""
        self.limit = limit
        self._taken = 0

    def take(self, n: int) -> None:
        """Take n places.

        Raises:
            BusyError: there are not so many left.
        """
        if self._taken + n > self.limit:
            raise BusyError(f"{self._taken} prompts are under way, of {self.limit} at most; {n} more do not fit now")
        self._taken += n

    def give_back(self, n: int) -> None:
        """Give n places back."""
        self._taken -= n


class Run:
    """The prompts of one HTTP request, running. Close it, whatever happens."""

    def __init__(self, service: Service, admission: Admission, prompts: Sequence[Prompt]) -> None:
        """Submit them; call it on the event loop.

        Raises:
            BusyError: too many are under way.
            NotReadyError: there is no model.
        """
        admission.take(len(prompts))
        self._service, self._admission, self._n = service, admission, len(prompts)
        self._loop = asyncio.get_running_loop()
        self._deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._open = len(prompts)
        self._handles: list[Request] = []
        try:
            for index, prompt in enumerate(prompts):
                self._handles.append(service.submit(prompt, partial(self._receive, index)))
        except BaseException:
            self.close()
            raise

    def _receive(self, index: int, delta: Delta) -> None:
        """Take a delta, in the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deltas.put_nowait, (index, delta))

    @property
    def running(self) -> bool:
        """True until every prompt has ended."""
        return self._open > 0

    async def next(self) -> tuple[int, Delta]:
        """Wait for what comes next: the place of a prompt, and its delta.

        Raises:
            BrokenAnswerError: a prompt ended before it was done.
        """
        index, delta = await self._deltas.get()
        if delta.finish_reason is not None:
            self._open -= 1
        if delta.finish_reason == "error":
            known = isinstance(delta.error, NumericalError)
            raise BrokenAnswerError(str(delta.error) if known else "the model failed; the server's log says why")
        if delta.finish_reason == "cancelled":
            raise BrokenAnswerError("the server was stopped before the answer was done")
        return index, delta

    def close(self) -> None:
        """End what has not ended and give the places back; harmless when repeated."""
        for handle in self._handles:
            self._service.cancel(handle)
        self._admission.give_back(self._n)
        self._handles, self._n = [], 0


class Running(Response):
    """A response that is made while it is sent, and that ends when the client goes away."""

    def __init__(self, run: Run, answer: Answer, *, stream: bool) -> None:
        """Send the answer of a run as server-sent events, or as one JSON object."""
        super().__init__()
        self._run, self._answer, self._stream = run, answer, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, or stop at once when nobody listens any more."""
        work = asyncio.create_task(self._events(send) if self._stream else self._whole(scope, receive, send))
        left = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._run.close()
            unfinished = [task for task in (work, left) if not task.done()]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
        if work.done() and not work.cancelled():
            work.result()  # what went wrong in it is ours to raise

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while self._run.running:
                index, delta = await self._run.next()
                for _ in self._answer.push(index, delta):
                    pass
        except BrokenAnswerError as error:
            response: Response = tell(error)
        else:
            response = Response(dump(self._answer.whole()), media_type="application/json")
        await response(scope, receive, send)

    async def _events(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in self._answer.openings():
            await _send(send, f"data: {dump(chunk)}\n\n")
        if not any(self._answer.openings()):
            await _send(send, ": keep-alive\n\n")  # else the headers would wait for the first piece
        try:
            while self._run.running:
                try:
                    index, delta = await asyncio.wait_for(self._run.next(), KEEP_ALIVE)
                except TimeoutError:
                    await _send(send, ": keep-alive\n\n")
                    continue
                for chunk in self._answer.push(index, delta):
                    await _send(send, f"data: {dump(chunk)}\n\n")
            for chunk in self._answer.closing():
                await _send(send, f"data: {dump(chunk)}\n\n")
        except BrokenAnswerError as error:
            await _send(send, f"data: {dump(error_body(500, str(error)))}\n\n")
        await _send(send, "data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def gone(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


def dump(value: dict[str, Any]) -> str:
    """Write JSON as it is sent."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
