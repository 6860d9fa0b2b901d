"""The control plane: one leader tells its followers what to do, and finds out when one of them is gone.

It is a gloo group of its own, never the group that the model's collectives use, so that waiting burns no core (NCCL
would) and the two kinds of traffic cannot meet. It knows nothing of batches or requests: integers and objects.

Between its messages the leader sends idle ones, two a second. A follower that waits drops them; thereby its wait
returns to Python, where Ctrl-C can act, and a follower that died while it waited is found. There is never more than one
idle message under way: a follower in its own code has not received it yet, and need not.

A follower that is gone has died if it was waiting, or if its answer is expected; one in its own code may have come to
the end of its script, and is missed at the next message. What fails half-way leaves the ranks at different places, so
the channel is then of no more use: every later call on it fails at once, where it would wait for ever.
"""

import atexit
import logging
import os
import pickle
import re
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from codellama.errors import RankError

IDLE_SECONDS = 0.5
EXIT_SECONDS = 0.2
_INLINE = 254  # integers that travel in the first message
_IDLE, _INTEGERS, _OBJECT = 0, 1, 2

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """An exception on its way to another rank; one that cannot be pickled arrives as a RankError with its text."""

    error: Exception

    def __reduce__(self) -> tuple[type["Failure"], tuple[Exception]]:
        """Pickle the error if it can be rebuilt from that."""
        try:
            pickle.loads(pickle.dumps(self.error))
        except Exception:  # whatever a foreign exception's pickling does
            return Failure, (RankError(f"another rank raised {one_line(self.error)}"),)
        return Failure, (self.error,)


def outcome_of(make: Callable[[], T]) -> T | Failure:
    """Call make, and hold what it raises."""
    try:
        return make()
    except RankError:
        raise  # the others cannot be reached any more
    except Exception as error:
        return Failure(error)


def unwrap(outcome: T | Failure) -> T:
    """Return what was made, or raise what was held."""
    if isinstance(outcome, Failure):
        raise outcome.error
    return outcome


def one_line(error: Exception) -> str:
    """Name an exception, with the first line of its text; gloo's has a place in its source before and advice after."""
    if type(error) is not RuntimeError:
        return traceback.format_exception_only(error)[0].split("\n")[0]
    return re.sub(r"^\[\S+\] ", "", str(error).strip()).split("\n")[0].split(". ")[0]


class Channel:
    """From the first member of a group to the others. Ranks are world ranks."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        members: Sequence[int],
        on_lost: Callable[[RankError], None] | None = None,
    ) -> None:
        """Open the channel on every member; the leader's starts to send idle messages.

        Args:
            on_lost: called on the leader, in the thread of the idle messages, when a follower has died; None ends this
                process by SIGTERM.
        """
        self._group = group
        self._on_lost = on_lost
        self._members = list(members)
        self._leader = self._members[0]
        self._rank = dist.get_rank()
        self._lost: RankError | None = None
        self._expecting = False
        self._lock = threading.Lock()
        # A thread of gloo's lets go of a tensor a moment after the call that sent it has returned, and needs the
        # interpreter for that: the process aborts where that is being torn down (seen in 1 of 60 runs).
        atexit.unregister(_pause)
        atexit.register(_pause)
        self._idle: dist.Work | None = None
        self._heard = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if self.is_leader:
            arguments = (weakref.ref(self), self._stop)
            self._thread = threading.Thread(target=_send_idle, args=arguments, daemon=True, name="codellama-idle")
            self._thread.start()

    @property
    def is_leader(self) -> bool:
        """True on the rank that sends."""
        return self._rank == self._leader

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """On the leader, run a body at whose end every follower owes an answer: one that is gone by then has died."""
        self._expecting = True
        try:
            yield
        finally:
            self._expecting = False

    def close(self) -> None:
        """Take the group down, on all members together; after that every call fails at once.

        Each waits for the others, so that nobody is talking; a channel that was given up is not waited for.
        """
        self._stop.set()  # an idle message that nobody receives any more would hold the group up
        if self._thread is not None:
            self._thread.join()
        if self._lost is None:
            self._wait_for_all()
        self._lost = self._lost or RankError(f"rank {self._rank} has closed this generator")
        if dist.is_initialized():
            dist.destroy_process_group(self._group)

    def _wait_for_all(self) -> None:
        try:
            self.gather_objects(None)
        except RankError as error:  # there is nobody to wait for; it can be closed all the same
            logger.warning("%s", error)

    def give_up(self, error: RankError) -> None:
        """Let every later call on this rank raise this error; the first one counts."""
        self._lost = self._lost or error

    def send_integers(self, values: Sequence[int]) -> None:
        """Send a list of integers from the leader to every follower.

        Raises:
            RankError: a follower is gone.
        """
        self._send(_INTEGERS, torch.tensor(values, dtype=torch.int64, device="cpu"))

    def send_object(self, value: Any) -> None:
        """Send any picklable object from the leader to every follower.

        Raises:
            RankError: a follower is gone.
        """
        content = pickle.dumps(value)
        padded = content + bytes(-len(content) % 8)
        self._send(_OBJECT, torch.frombuffer(bytearray(padded), dtype=torch.int64))

    def receive_integers(self) -> list[int]:
        """Wait, on a follower, for the leader's integers.

        Raises:
            RankError: the leader is gone, or sent something else.
        """
        values: list[int] = self._receive(_INTEGERS).tolist()
        return values

    def receive_object(self) -> Any:
        """Wait, on a follower, for the leader's object.

        Raises:
            RankError: the leader is gone, or sent something else.
        """
        return pickle.loads(self._receive(_OBJECT).numpy(force=True).tobytes())

    def gather_objects(self, value: Any) -> list[Any]:
        """Collect one object from every member, and give the list to all of them, in the order of ranks.

        Raises:
            RankError: a member is gone.
        """
        if not self.is_leader:
            content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
            with self._contact("the leader"):
                dist.send(torch.tensor([content.numel()], device="cpu"), self._leader, group=self._group)
                dist.send(content, self._leader, group=self._group)
            gathered: list[Any] = self.receive_object()
            return gathered
        values = [value]
        with self.expecting():
            for member in self._members[1:]:
                with self._contact(f"rank {member}"):
                    length = torch.zeros(1, dtype=torch.int64, device="cpu")
                    dist.recv(length, member, group=self._group)
                    content = torch.empty(int(length), dtype=torch.uint8, device="cpu")
                    dist.recv(content, member, group=self._group)
                values.append(pickle.loads(content.numpy().tobytes()))
        self.send_object(values)
        return values

    def _send(self, kind: int, payload: torch.Tensor) -> None:
        first = torch.zeros(_INLINE + 2, dtype=torch.int64, device="cpu")
        first[0], first[1] = kind, payload.numel()
        inline = payload[:_INLINE]
        first[2 : 2 + inline.numel()] = inline
        with self._lock, self._contact("a follower"):
            if self._idle is not None:
                self._idle.wait()
                self._idle = None
            dist.broadcast(first, self._leader, group=self._group)
            if payload.numel() > _INLINE:
                dist.broadcast(payload[_INLINE:].clone(), self._leader, group=self._group)
            self._heard = False

    def _receive(self, expected: int) -> torch.Tensor:
        first = torch.full((_INLINE + 2,), _IDLE, dtype=torch.int64, device="cpu")
        with self._contact("the leader"):
            while first[0] == _IDLE:
                dist.broadcast(first, self._leader, group=self._group)
            length = int(first[1])
            payload = first[2 : 2 + length]
            if length > _INLINE:
                rest = torch.zeros(length - _INLINE, dtype=torch.int64, device="cpu")
                dist.broadcast(rest, self._leader, group=self._group)
                payload = torch.cat([payload, rest])
        if first[0] != expected:
            error = RankError(
                f"rank {self._rank} and the leader, rank {self._leader}, are in different calls: "
                f"every rank must make the same calls in the same order"
            )
            self.give_up(error)
            raise error
        return payload

    @contextmanager
    def _contact(self, who: str) -> Iterator[None]:
        """Run a body that talks to others; where it fails, say who is lost, and give up."""
        if self._lost is not None:
            raise RankError(*self._lost.args)
        try:
            yield
        except RuntimeError as error:
            gone = self._gone(who, error)
            self.give_up(gone)
            raise gone from error
        except BaseException:
            self.give_up(RankError(f"rank {self._rank} was interrupted while it talked to {who}; start anew"))
            raise

    def _gone(self, who: str, error: RuntimeError) -> RankError:
        return RankError(f"rank {self._rank} lost {who}, which died or raised; giving up ({one_line(error)})")

    def beat(self) -> None:
        """Send an idle message unless one is still under way."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._idle is not None:
                if not self._idle.is_completed():
                    return
                work, self._idle = self._idle, None
                work.wait()  # raises where the follower is gone
                self._heard = True
            self._idle = dist.broadcast(
                torch.zeros(_INLINE + 2, dtype=torch.int64, device="cpu"),
                self._leader,
                group=self._group,
                async_op=True,
            )
        finally:
            self._lock.release()

    def _end(self, error: RuntimeError) -> None:
        """End this process if a follower died; one that left its script in peace did not, nor one already missed."""
        if self._lost is not None or not (self._heard or self._expecting):
            return
        gone = self._gone("a follower", error)
        if self._on_lost is not None:
            self._on_lost(gone)
        else:
            logger.critical("%s", gone)
            os.kill(os.getpid(), signal.SIGTERM)


def _pause() -> None:
    time.sleep(EXIT_SECONDS)


def _send_idle(reference: "weakref.ref[Channel]", stop: threading.Event) -> None:
    """Beat until the channel is closed or collected. Holds no reference while it sleeps."""
    while not stop.wait(IDLE_SECONDS):
        channel = reference()
        if channel is None:
            return
        try:
            channel.beat()
        except RuntimeError as error:
            channel._end(error)
            return
        except ValueError:  # the caller has destroyed the process group
            return
        del channel
