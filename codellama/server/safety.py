"""A service whose prompts and answers a safety hook reads before anybody else: a wrapper around another service.

The hook may be slow: it runs in a thread of its own for each prompt, beside the engine and the event loop. It knows
nothing of HTTP.
"""

import logging
import queue
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from codellama.errors import SafetyError
from codellama.generation.prompt import Prompt, PromptMaker
from codellama.generation.request import Delta, Request
from codellama.safety import AnswerGate, SafetyHook, admit
from codellama.server.faults import BrokenAnswerError, BusyError
from codellama.server.service import NotReadyError, OnDelta, Service, Status
from codellama.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")


class SafeService:
    """Another service, of which nothing is handed on that the hook has not read.

    A refusal is the last delta of its prompt: finish_reason "content_filter", and a SafetyError as its error.
    """

    def __init__(self, service: Service, hook: SafetyHook, places: threading.BoundedSemaphore, *, stream: bool) -> None:
        """Wrap a service.

        Args:
            places: how many prompts may be under way here: a hook also reads for a client that has gone.
            stream: read an answer as it grows, else once, when it is whole.
        """
        self._service, self._hook, self._places, self._stream = service, hook, places, stream

    @property
    def prompts(self) -> PromptMaker:
        """See Service."""
        return self._service.prompts

    @property
    def tokenizer(self) -> Tokenizer:
        """See Service."""
        return self._service.tokenizer

    def submit(self, prompt: Prompt, on_delta: OnDelta) -> "Reading":
        """Ask the hook, and start the prompt if it may; both happen later.

        Raises:
            NotReadyError: there is no model to run it.
            BusyError: the hook still reads as much as it may at once.
        """
        if (state := self._service.status().state) != "ready":
            raise NotReadyError(f"the model is not ready: it is {state}")
        if not self._places.acquire(blocking=False):
            raise BusyError("the safety check is busy with as many prompts as may be under way")
        gate = AnswerGate(self._hook, prompt, whole=not self._stream)
        reading = Reading(self._service, self._hook, prompt, gate, on_delta)

        def read() -> None:
            last = reading.run()
            self._places.release()
            on_delta(last)

        try:
            threading.Thread(target=read, name="safety", daemon=True).start()
        except RuntimeError:  # the system gives no more threads now
            self._places.release()
            raise
        return reading

    def cancel(self, handle: "Reading") -> None:
        """See Service."""
        handle.cancel()

    def status(self) -> Status:
        """See Service."""
        return self._service.status()


class Reading:
    """A prompt on its way through the hook and the service."""

    def __init__(self, service: Service, hook: SafetyHook, prompt: Prompt, gate: AnswerGate, on_delta: OnDelta) -> None:
        """Prepare; `run` does all of it."""
        self._service, self._hook, self._prompt, self._gate, self._on_delta = service, hook, prompt, gate, on_delta
        self._deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._lock = threading.Lock()  # nothing is submitted after it was cancelled
        self._cancelled = False
        self._request: Request | None = None

    def cancel(self) -> None:
        """End it before its next piece; safe from any thread, and harmless when repeated."""
        with self._lock:
            self._cancelled = True
            if self._request is not None:
                self._service.cancel(self._request)
        self._deltas.put(Delta("", finish_reason="cancelled"))  # also where the service says no more

    def run(self) -> Delta:
        """Be the thread, in which the hook's calls for a prompt follow each other; return the last delta."""
        try:
            last = self._read()
        except SafetyError as refusal:
            last = Delta("", finish_reason="content_filter", error=refusal)
        except BrokenAnswerError as error:
            last = Delta("", finish_reason="error", error=error)
        except Exception as error:  # our own mistake; who waits for an answer is told
            logger.exception("a prompt could not be run")
            last = Delta("", finish_reason="error", error=error)
        if last.finish_reason in ("content_filter", "error"):
            self.cancel()  # at once: nobody reads what is still generated
        return last

    def _read(self) -> Delta:
        """Hand on what may be read, and return the last delta."""
        _asked(partial(admit, self._hook, self._prompt))
        with self._lock:
            if self._cancelled:
                return Delta("", finish_reason="cancelled")
            try:
                self._request = self._service.submit(self._prompt, self._deltas.put)
            except NotReadyError:  # it was stopped meanwhile
                return Delta("", finish_reason="cancelled")
        while True:
            deltas = [self._deltas.get()]
            while deltas[-1].finish_reason is None and not self._deltas.empty():  # while the hook was busy
                deltas.append(self._deltas.get())
            passed = _asked(partial(self._gate.push, *deltas))
            if self._cancelled:
                return Delta("", finish_reason="cancelled")
            if passed.finish_reason is not None:
                return passed
            if passed.text or passed.tokens:
                self._on_delta(passed)


def _asked(ask: Callable[[], T]) -> T:
    """Call what calls the hook; a hook that fails lets nothing through.

    Raises:
        SafetyError: it refuses.
        BrokenAnswerError: it failed. The log says where, and not what: that could hold somebody's text.
    """
    try:
        return ask()
    except SafetyError:
        raise
    except BaseException as error:  # also what a call of sys.exit raises: the thread has a client to tell
        frame = traceback.extract_tb(error.__traceback__)[-1]
        logger.error(
            "the safety hook raised %s in %s, line %d of %s",
            type(error).__name__,
            frame.name,
            frame.lineno,
            frame.filename,
        )
        raise BrokenAnswerError("the safety check failed; the server's log says where") from None
