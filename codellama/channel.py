"""The control plane: one leader tells its followers what to do, and finds out when one of them is gone.

It is a gloo group of its own, never the group that the model's collectives use, so that waiting burns no core (NCCL
would) and the two kinds of traffic cannot meet. It knows nothing of batches or requests: integers and objects.

While nothing is sent, the leader sends an idle message every second. A follower that waits drops it; thereby its wait
returns to Python, where Ctrl-C can act, and a follower that died while it waited is found. There is never more than one
idle message under way: a follower in its own code has not received it yet, and need not.
"""

import logging
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from codellama.errors import RankError

IDLE_SECONDS = 1.0
_INLINE = 254  # integers that travel in the first message
_IDLE, _INTEGERS, _OBJECT = 0, 1, 2

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """An exception on its way to another rank."""

    error: Exception


def outcome_of(make: Callable[[], T]) -> T | Failure:
    """Call make, and hold what it raises; an exception that cannot be pickled becomes a RankError with its text."""
    try:
        return make()
    except RankError:
        raise  # the others cannot be reached any more
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # whatever a foreign exception's pickling does
            return Failure(RankError(f"another rank raised {error!r}"))
        return Failure(error)


def unwrap(outcome: T | Failure) -> T:
    """Return what was made, or raise what was held."""
    if isinstance(outcome, Failure):
        raise outcome.error
    return outcome


class Channel:
    """From the first member of a group to the others. Ranks are world ranks."""

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int]) -> None:
        """Open the channel on every member; the leader's starts to send idle messages."""
        self._group = group
        self._members = list(members)
        self._leader = self._members[0]
        self._lock = threading.Lock()
        self._idle: dist.Work | None = None
        self._heard = False
        self._sent = False
        if self.is_leader:
            arguments = (weakref.ref(self),)
            threading.Thread(target=_send_idle, args=arguments, daemon=True, name="codellama-idle").start()

    @property
    def is_leader(self) -> bool:
        """True on the rank that sends."""
        return dist.get_rank() == self._leader

    def send_integers(self, values: Sequence[int]) -> None:
        """Send a list of integers from the leader to every follower.

        Raises:
            RankError: a follower is gone.
        """
        self._send(_INTEGERS, torch.tensor(values, dtype=torch.int64))

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
            try:
                dist.send(torch.tensor([content.numel()]), self._leader, group=self._group)
                dist.send(content, self._leader, group=self._group)
            except RuntimeError as error:
                raise self._gone("the leader", error) from error
            gathered: list[Any] = self.receive_object()
            return gathered
        values = [value]
        for member in self._members[1:]:
            try:
                length = torch.zeros(1, dtype=torch.int64)
                dist.recv(length, member, group=self._group)
                content = torch.empty(int(length), dtype=torch.uint8)
                dist.recv(content, member, group=self._group)
            except RuntimeError as error:
                raise self._gone(f"rank {member}", error) from error
            values.append(pickle.loads(content.numpy().tobytes()))
        self.send_object(values)
        return values

    def _send(self, kind: int, payload: torch.Tensor) -> None:
        first = torch.zeros(_INLINE + 2, dtype=torch.int64)
        first[0], first[1] = kind, payload.numel()
        inline = payload[:_INLINE]
        first[2 : 2 + inline.numel()] = inline
        with self._lock:
            try:
                if self._idle is not None:
                    self._idle.wait()
                    self._idle = None
                dist.broadcast(first, self._leader, group=self._group)
                if payload.numel() > _INLINE:
                    dist.broadcast(payload[_INLINE:].clone(), self._leader, group=self._group)
            except RuntimeError as error:
                raise self._gone("a follower", error) from error
            self._heard, self._sent = False, True

    def _receive(self, expected: int) -> torch.Tensor:
        first = torch.zeros(_INLINE + 2, dtype=torch.int64)
        try:
            while True:
                dist.broadcast(first, self._leader, group=self._group)
                if first[0] != _IDLE:
                    break
            length = int(first[1])
            if length <= _INLINE:
                payload = first[2 : 2 + length]
            else:
                rest = torch.zeros(length - _INLINE, dtype=torch.int64)
                dist.broadcast(rest, self._leader, group=self._group)
                payload = torch.cat([first[2:], rest])
        except RuntimeError as error:
            raise self._gone("the leader", error) from error
        if first[0] != expected:
            raise RankError(
                f"rank {dist.get_rank()} and the leader, rank {self._leader}, are in different calls: "
                f"every rank must make the same calls in the same order"
            )
        return payload

    def _gone(self, who: str, error: RuntimeError) -> RankError:
        reason = str(error).strip().split("\n")[0]
        return RankError(f"rank {dist.get_rank()} lost {who}, which died or raised; giving up ({reason})")

    def beat(self) -> None:
        """Send an idle message unless something was sent since the last beat, or one is still under way."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._idle is not None:
                if not self._idle.is_completed():
                    return
                work, self._idle = self._idle, None
                work.wait()  # raises where the follower is gone
                self._heard = True
            if self._sent:
                self._sent = False
                return
            self._idle = dist.broadcast(
                torch.zeros(_INLINE + 2, dtype=torch.int64), self._leader, group=self._group, async_op=True
            )
        finally:
            self._lock.release()

    def _end(self, error: RuntimeError) -> None:
        """End this process if a follower died while it waited for us; one that left its script in peace did not."""
        if self._heard:
            logger.critical("%s", self._gone("a follower", error))
            os.kill(os.getpid(), signal.SIGTERM)


def _send_idle(reference: "weakref.ref[Channel]") -> None:
    """Beat until the channel is collected. Holds no reference while it sleeps."""
    pause = threading.Event()
    while True:
        pause.wait(IDLE_SECONDS)
        channel = reference()
        if channel is None:
            return
        try:
            channel.beat()
        except RuntimeError as error:
            channel._end(error)
            return
        del channel
