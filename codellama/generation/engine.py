"""The only generation loop: schedule, tell the other ranks, run, sample, hand out.

It knows nothing of text: token ids in, token ids out; a request that carries a GeneratedText decodes for itself. The
leader (model-parallel rank 0) alone decides tokens; the other ranks follow batch by batch.
"""

import queue
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from codellama.errors import NumericalError, RankError
from codellama.generation.request import Completion, Delta, Request
from codellama.generation.runner import Runner
from codellama.generation.sampling import sample, score
from codellama.generation.scheduler import Batch, Scheduler
from codellama.parallel import Parallel

_DONE, _FAILED = -1, -2  # in place of a batch's first row


class Engine:
    """Runs requests to their end, many at once."""

    def __init__(self, runner: Runner, scheduler: Scheduler, parallel: Parallel) -> None:
        """Drive this rank's runner; on the leader, with this scheduler."""
        self._runner = runner
        self._scheduler = scheduler
        self._parallel = parallel
        self._inbox: queue.SimpleQueue[tuple[Callable[[Request], None], Request]] = queue.SimpleQueue()

    def submit(self, request: Request, on_delta: Callable[[Delta], None] | None = None) -> None:
        """Queue a request; safe from any thread. on_delta is called by the thread that steps."""
        if on_delta is not None:
            request.on_delta = on_delta
        self._inbox.put((self._scheduler.add, request))

    def cancel(self, request: Request) -> None:
        """End a request before the next step; safe from any thread, and harmless when it has ended."""
        self._inbox.put((self._scheduler.cancel, request))

    def step(self) -> bool:
        """Run one batch on all ranks. Call it on the leader; returns False when there is nothing to do.

        Raises:
            NumericalError: the logits hold NaN.
            RankError: another rank is gone.
        """
        self._read_inbox()
        batch = self._scheduler.schedule()
        if batch is None:
            return self._scheduler.busy
        if self._parallel.channel is not None:
            self._parallel.channel.send_integers(batch.to_integers())
        offset, pieces = batch.logits_from, self._forward(batch)
        try:
            for logits in pieces:
                self._check_nan(logits)
                self._take(batch, offset, logits)
                offset += logits.shape[1]
        finally:
            for _ in pieces:  # after a failure here too: the other ranks compute every piece, and wait for this one
                pass
        self._scheduler.commit(batch)
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

    def stream(self, request: Request) -> Iterator[Delta]:
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

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Let the other ranks go at the end; after a failure, forget what may be spoilt."""
        try:
            yield
        except GeneratorExit:  # a stream that was closed early
            self._read_inbox()
            self._release(_DONE)
            raise
        except RankError:  # there is nobody left to release
            self._reset()
            raise
        except Exception:
            self._reset()
            self._release(_FAILED)
            raise
        except BaseException:  # Ctrl-C may have left the other ranks inside a collective: they learn it from our exit
            self._parallel.give_up("was interrupted")
            self._reset()
            raise
        else:
            self._release(_DONE)

    def _forward(self, batch: Batch) -> Iterator[Tensor]:
        with self._parallel.lockstep():
            yield from self._runner.run(batch)

    def _read_inbox(self) -> None:
        while not self._inbox.empty():
            act, request = self._inbox.get()
            act(request)

    def _reset(self) -> None:
        self._inbox = queue.SimpleQueue()
        self._scheduler.clear()
        self._runner.forget()

    def _release(self, reason: int) -> None:
        if self._parallel.channel is not None:
            self._parallel.channel.send_integers([reason])

    def _take(self, batch: Batch, offset: int, logits: Tensor) -> None:
        """Give each request of the batch its scores and its next token."""
        drawn: list[tuple[Request, Tensor, Tensor]] = []
        for row, request in enumerate(batch.requests):
            if request is None:
                continue
            # The logits at position p are about the token at p + 1.
            following = batch.positions[row] + offset + 1
            known = request.prompt[following : following + logits.shape[1]]
            if request.scores_prompt and known:
                request.scores += score(logits[row, : len(known)], known, request.params.top_logprobs)
            if following + logits.shape[1] - 1 == request.n_tokens and request.n_max > 0:
                last = logits[row, -1]
                drawn.append((request, last, sample(last, request.params, request.rng.random(), request.history())))
        if not drawn:
            return
        tokens = torch.stack([token for _, _, token in drawn]).tolist()  # one wait for all rows
        for (request, last, _), token in zip(drawn, tokens, strict=True):
            params = request.params
            request.append(token, score(last[None], [token], params.top_logprobs)[0] if params.logprobs else None)

    def _check_nan(self, logits: Tensor) -> None:
        """Refuse NaN, and name the ranks whose share of the vocabulary holds it."""
        if not torch.isnan(logits).any():
            return
        share = logits.shape[-1] // self._parallel.size
        bad = torch.isnan(logits).any(dim=0).any(dim=0).view(self._parallel.size, share).any(dim=1)
        first = self._parallel.replica * self._parallel.size
        ranks = ", ".join(str(first + rank) for rank in bad.nonzero().flatten().tolist())
        raise NumericalError(
            f"the model produced NaN instead of logits on rank {ranks}: the weights are damaged, or the values "
            f"overflow {self._runner.cache.keys[0].dtype}; verify the checkpoint, or try dtype=torch.float32"
        )
