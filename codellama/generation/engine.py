"""The only generation loop: schedule, tell the other ranks, run, sample, hand out.

It knows nothing of text: token ids in, token ids out; a request that carries a GeneratedText decodes for itself. The
leader (model-parallel rank 0) alone decides tokens; the other ranks follow batch by batch.

Ids can be read one step late: the next step begins with what the device drew last, and while it runs, the host hands
out what the step before it gave. A request that ended there has drawn one token too many, which is dropped.
"""

import math
import queue
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from codellama.cache import KVCache
from codellama.errors import NumericalError, RankError
from codellama.generation.batch import Batch
from codellama.generation.pending import Pending, extremes_of, widest
from codellama.generation.request import Completion, Delta, Request
from codellama.generation.runner import Runner
from codellama.generation.sampling import adjust, draw_batch, score
from codellama.generation.scheduler import Scheduler, row_of
from codellama.parallel import Parallel

_DONE, _FAILED = -1, -2  # in place of a batch's first row


class Engine:
    """Runs requests to their end, many at once."""

    def __init__(self, runner: Runner, scheduler: Scheduler, parallel: Parallel, late: bool | None = None) -> None:
        """Drive this rank's runner; on the leader, with this scheduler.

        Args:
            runner: the model and its cache on this rank.
            scheduler: it decides on the leader alone.
            parallel: this rank's place.
            late: read ids one step late where nothing needs them sooner; None does so on a GPU, since on a CPU nothing
                runs beside the host.
        """
        self._runner = runner
        self._scheduler = scheduler
        self._parallel = parallel
        self._inbox: queue.SimpleQueue[tuple[Callable[[Request], None], Request] | None] = queue.SimpleQueue()
        self._stopping = False
        self._closed = False
        self._late = runner.device.type == "cuda" if late is None else late
        self._pending: Pending | None = None

    def submit(self, request: Request, on_delta: Callable[[Delta], None] | None = None) -> None:
        """Queue a request; safe from any thread. on_delta is called by the thread that steps.

        A request ends once, by itself, by `cancel`, or with the engine: then its last delta has a finish_reason.
        """
        if on_delta is not None:
            request.on_delta = on_delta
        self._inbox.put((self._scheduler.add, request))
        if self._closed:
            request.cancel()

    def cancel(self, request: Request) -> None:
        """End a request before the next step; safe from any thread, and harmless when it has ended."""
        self._inbox.put((self._scheduler.cancel, request))

    @property
    def cache(self) -> KVCache:
        """The keys and values of this rank."""
        return self._runner.cache

    def load(self) -> tuple[int, int]:
        """Count the requests that run and those that wait; from any thread, and not to the last one."""
        running, waiting = self._scheduler.load()
        return running, waiting + self._inbox.qsize()

    def step(self) -> bool:
        """Run one batch on all ranks. Call it on the leader; returns False when there is nothing to do.

        What a request's own logits_processor, grammar or on_delta raises ends that request alone. What is raised here
        has ended all of them, with finish_reason "error" and the same exception.

        Raises:
            NumericalError: the logits are not finite.
            RankError: another rank is gone.
        """
        assert not self._closed, "a closed engine runs nothing"
        try:
            return self._step()
        except BaseException as error:
            self._fail(error)
            raise

    def _step(self) -> bool:
        self._read_inbox()
        if self._scheduler.needs_ids:
            self._settle()
        batch = self._scheduler.schedule()
        if batch is None:
            return self._settle() or self._scheduler.busy
        if self._late and any(batch.wanted):
            batch = replace(batch, shared=True)
        if self._parallel.channel is not None:
            self._parallel.channel.send_integers(batch.to_integers())
        launched = self._launch(batch)
        self._settle()
        self._pending = launched
        if not self._late:
            self._settle()
        return True

    def _launch(self, batch: Batch) -> Pending:
        """Run a batch and draw from its logits, without a wait for the device where nobody needs a number."""
        extremes: list[Tensor] = []
        asking: list[tuple[Request, Tensor, Tensor]] = []
        offset, pieces = 0, self._forward(batch)
        try:
            for logits in pieces:
                extremes.append(extremes_of(logits, self._parallel.size))
                if any(map(_looks, batch.requests)):
                    self._check_finite(extremes[-1].tolist())
                drawn = self._draw(batch, offset, logits)
                if batch.shared and drawn:
                    self._runner.keep([row_of(request) for request, *_ in drawn], [token for *_, token in drawn])
                asking += drawn
                offset += len(logits)
        finally:
            for _ in pieces:  # after a failure here too: the other ranks compute every piece, and wait for this one
                pass
        pending = Pending(batch, asking, widest(extremes), self._runner.device)
        self._scheduler.launch(batch, pending.requests)
        return pending

    def _settle(self) -> bool:
        """Hand out what the step that was launched last gave; False where there is none."""
        if self._pending is None:
            return False
        pending, self._pending = self._pending, None
        result = pending.read()
        self._check_finite(result.extremes)
        accepted: dict[Request, int] = {}
        guesses = dict(zip(pending.batch.requests, pending.batch.tokens, strict=True))
        for request, tokens in result.drawn:
            if request.finish_reason is None:
                taken = request.take(tokens, guesses[request][1:] if len(tokens) > 1 else [])
                if len(tokens) > 1:
                    accepted[request] = taken
        self._scheduler.commit(pending.batch, pending.requests, accepted)
        return True

    def run(self, requests: Iterable[Request]) -> list[Completion]:
        """Run requests to their end and return their results in order. The leader's part of a batch call.

        The requests may be made as they are taken: if that fails, the other ranks are let go as after any failure.
        """
        with self._session():
            requests = list(requests)
            for request in requests:
                self.submit(request)
            while any(request.finish_reason is None for request in requests):
                self.step()
        return [request.completion() for request in requests]

    def stream(self, request: Request) -> Generator[Delta]:
        """Run one request and yield what each step adds; closing the iterator cancels it. The leader's part."""
        deltas: list[Delta] = []
        with self._session():
            self.submit(request, deltas.append)
            try:
                while request.finish_reason is None:
                    self.step()
                    yield from deltas
                    deltas.clear()
            finally:
                self.cancel(request)

    def loop(self) -> None:
        """Run requests as they come, until `stop`. The leader's part of a server: one call, one long session.

        While there is nothing to do it sleeps on the inbox. What has not ended then is left to `close`.

        Raises:
            NumericalError, RankError: as `step`; all requests have ended.
        """
        self._stopping = False
        with self._session():
            while not self._stopping:
                if not self.step() and not self._stopping:  # the step may have read the wish to stop
                    self._act(self._inbox.get())

    def stop(self) -> None:
        """Let `loop` return after the step that runs; safe from any thread."""
        self._inbox.put(None)

    def follow(self) -> None:
        """Run the leader's batches until it says that the call is done. The other ranks' part of every call.

        Raises:
            RankError: the leader is gone.
        """
        channel = self._parallel.channel
        assert channel is not None, "a rank that follows is not alone"
        while (values := channel.receive_integers())[0] >= 0:
            for _ in self._forward(Batch.from_integers(values)):
                pass
        if values[0] == _FAILED:
            self._runner.forget()

    def close(self) -> None:
        """Free weights and cache, and let what has not ended end as cancelled; so ends what is submitted later."""
        self._closed = True
        self._pending = None
        self._read_inbox()
        self._scheduler.end()
        self._runner.free()

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Let the other ranks go at the end; after a failure, forget what may be spoilt."""
        try:
            yield
        except GeneratorExit:  # a stream that was closed early
            self._read_inbox()
            self._release(_DONE)
            raise
        except RankError as error:  # there is nobody left to release
            self._fail(error)
            raise
        except Exception as error:
            self._fail(error)
            self._release(_FAILED)
            raise
        except BaseException as error:  # Ctrl-C may have left the others inside a collective: our exit tells them
            self._parallel.give_up("was interrupted")
            self._fail(error)
            raise
        else:
            self._release(_DONE)

    def _forward(self, batch: Batch) -> Iterator[Tensor]:
        """Run a batch on this rank: its logits in pieces; at the end, what was drawn goes from the leader to all."""
        with self._parallel.lockstep():
            yield from self._runner.run(batch)
            if batch.shared:
                self._parallel.hand_out_(self._runner.drawn[batch.start : batch.start + len(batch.tokens)])

    def _read_inbox(self) -> None:
        while not self._inbox.empty():
            self._act(self._inbox.get())

    def _act(self, entry: tuple[Callable[[Request], None], Request] | None) -> None:
        """Do what an entry of the inbox asks for."""
        if entry is None:
            self._stopping = True
            return
        act, request = entry
        act(request)

    def _fail(self, error: BaseException) -> None:
        """End every request, those that still lie in the inbox too, and forget what may be spoilt."""
        self._pending = None
        self._scheduler.fail(error)
        while not self._inbox.empty():
            if (entry := self._inbox.get()) is not None:
                entry[1].fail(error)
        self._runner.forget()

    def _release(self, reason: int) -> None:
        if self._parallel.channel is not None:
            self._parallel.channel.send_integers([reason])

    def _draw(self, batch: Batch, offset: int, logits: Tensor) -> list[tuple[Request, Tensor, Tensor]]:
        """Score prompts, and draw: each request that wants a token, the logits that it is drawn from, and the token."""
        asking: list[tuple[Request, Tensor, Tensor, float]] = []
        for request, begin, end, position in batch.spans():
            start, stop = max(begin, offset), min(end, offset + len(logits))
            if start >= stop or request.finish_reason is not None:
                continue
            part = logits[start - offset : stop - offset]
            following = position + start - begin + 1  # the logits at position p are about the token at p + 1
            known = request.prompt[following : following + len(part)]
            if request.scores_prompt and known:
                request.scores += score(part[: len(known)], known, request.params.top_logprobs)
            # Of these, what follows all that is known and all that was drawn before.
            n_new = following + len(part) - request.n_tokens - request.n_pending
            if n_new > 0 and request.n_max > 0:
                asking += self._ask(request, part[-n_new:], following + len(part) - n_new - request.n_tokens)
        if not asking:
            return []
        given = torch.stack([adjusted for _, _, adjusted, _ in asking])
        params, uniforms = [request.params for request, *_ in asking], [uniform for *_, uniform in asking]
        tokens = draw_batch(given, params, uniforms)
        return [(request, own, token) for (request, own, *_), token in zip(asking, tokens, strict=True)]

    def _ask(self, request: Request, logits: Tensor, n_before: int) -> list[tuple[Request, Tensor, Tensor, float]]:
        """Prepare to draw tokens that follow each other if all guesses hold, from `[n, V]`.

        What its own logits_processor or grammar raises ends the request.

        Args:
            request: whose logits these are.
            logits: as the model computed them.
            n_before: tokens that were drawn before and are not read yet.

        Returns:
            For each: the request, its logits, what it makes of them, and its random number.
        """
        asking: list[tuple[Request, Tensor, Tensor, float]] = []
        try:
            for row, uniform in zip(logits, request.uniforms(n_before + len(logits))[n_before:], strict=True):
                allowed = request.allowed()
                changed = adjust(row, request.params, request.history(), request.seen, request.counts, allowed)
                asking.append((request, row, row if changed is None else changed, uniform))
        except StopIteration as error:  # which would look like the end of a stream
            request.fail(RuntimeError(f"logits_processor raised {error!r}"))
        except Exception as error:
            request.fail(error)
        return asking

    def _check_finite(self, extremes: Sequence[Sequence[float]]) -> None:
        """Refuse NaN and infinity, and name the ranks whose share of the vocabulary holds them."""
        bad = [rank for rank, bounds in enumerate(extremes) if not all(map(math.isfinite, bounds))]
        if not bad:
            return
        first = self._parallel.replica * self._parallel.size
        ranks = ", ".join(str(first + rank) for rank in bad)
        found = "NaN" if any(math.isnan(bounds[0]) for bounds in extremes) else "infinity"
        raise NumericalError(
            f"the model produced {found} instead of logits on rank {ranks}: the weights are damaged, or the values "
            f"overflow {self._runner.cache.keys[0].dtype}; verify the checkpoint, or try dtype=torch.float32"
        )


def _looks(request: Request | None) -> bool:
    """True for a request that needs numbers on the host while its step runs, so they must be numbers."""
    return request is not None and (request.scores_prompt or request.params.logits_processor is not None)
