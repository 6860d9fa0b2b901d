"""Whose turn it is: one call or one stream of a generator at a time, from any number of threads.

It knows nothing of what a call does. Nobody waits in silence for what cannot come: a thread that would wait for itself
is told so, and a stream whose thread has ended is taken away from it.
"""

import inspect
import threading
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager

_PATIENCE = 0.2  # seconds after which a waiting call looks whether the one before it is still alive


class TextStream(Iterator[str]):
    """Pieces of a text as they become certain. Closing it, or forgetting it, ends the generation."""

    def __init__(self, pieces: Generator[str], turns: "Turns") -> None:
        """Stream what pieces yields; its code runs inside `turns.take(stream)`."""
        self._pieces = pieces
        self._turns = turns
        self.ended_by: str | None = None

    @property
    def running(self) -> bool:
        """True while a piece is being made."""
        return inspect.getgeneratorstate(self._pieces) == inspect.GEN_RUNNING

    def __next__(self) -> str:
        if self.ended_by is not None:
            raise RuntimeError(f"this stream was ended: {self.ended_by}")
        self._turns.touch(self)
        return next(self._pieces)

    def close(self) -> None:
        """End the generation; harmless at the end."""
        self._pieces.close()

    def end(self, reason: str) -> None:
        """Close the stream for its reader, who is told the reason; harmless at the end."""
        if inspect.getgeneratorstate(self._pieces) != inspect.GEN_CLOSED:
            self.ended_by = reason
            self._pieces.close()


StreamRef = weakref.ref[TextStream]


class OpenStreams:
    """The streams of one generator that may still be open; it keeps none of them alive."""

    def __init__(self) -> None:
        """Start with none."""
        self._streams: weakref.WeakSet[TextStream] = weakref.WeakSet()

    def add(self, stream: TextStream) -> None:
        """Remember a stream."""
        self._streams.add(stream)

    def close(self) -> None:
        """End those that are still open."""
        for stream in list(self._streams):
            stream.close()


class Turns:
    """A lock that knows who holds it."""

    def __init__(self) -> None:
        """Start with nobody's turn."""
        self._lock = threading.Lock()
        self._holder: threading.Thread | None = None
        self._stream: weakref.ref[TextStream] | None = None

    @contextmanager
    def take(self, stream: "weakref.ref[TextStream] | None" = None) -> Iterator[None]:
        """Wait for the turn of a call, or of a stream, and hold it for the body.

        Raises:
            RuntimeError: this thread holds it already, so it would wait for itself.
        """
        self._refuse_own()
        while not self._lock.acquire(timeout=_PATIENCE):
            self._free_orphan()
        self._holder, self._stream = threading.current_thread(), stream
        try:
            yield
        finally:
            self._holder, self._stream = None, None
            self._lock.release()

    def touch(self, stream: TextStream) -> None:
        """Note that this thread is the one that reads the open stream now."""
        if self._stream is not None and self._stream() is stream and not stream.running:
            self._holder = threading.current_thread()

    def end_stream(self, reason: str) -> None:
        """End the open stream, if there is one, unless a piece is being made."""
        stream = self._stream() if self._stream is not None else None
        if stream is not None and not stream.running:
            stream.end(reason)

    def _refuse_own(self) -> None:
        if self._holder is not threading.current_thread():
            return
        stream = self._stream() if self._stream is not None else None
        if stream is not None and not stream.running:
            raise RuntimeError("this thread has an open stream of this generator: exhaust it or close() it first")
        raise RuntimeError(
            "this thread is inside a call of this generator, which would wait for itself: a logits_processor cannot "
            "generate with the generator that calls it, nor can a safety hook"
        )

    def _free_orphan(self) -> None:
        """Close a stream whose thread has ended: nobody will."""
        holder = self._holder
        stream = self._stream() if self._stream is not None else None
        if stream is not None and holder is not None and not holder.is_alive() and not stream.running:
            stream.end("the thread that read it had ended, and another call was waiting for its turn")
