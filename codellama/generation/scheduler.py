"""Which rows run next: requests wait, are given a row, are prefilled in chunks, decode together, and leave.

It knows nothing of the model or of torch. A Batch is all that a rank needs to run one step.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from codellama.config import RuntimeArgs
from codellama.generation.request import Request
from codellama.generation.rows import RowTable

SHARED_CHUNK = 512
"""Tokens of a prompt that are read at once while other rows decode: they wait for so many."""


@dataclass(frozen=True)
class Batch:
    """One step: T new tokens in each of the cache rows start … start + B - 1.

    Attributes:
        start: first cache row.
        tokens: B lists of T ids.
        positions: where each row's first new token stands; the others follow it.
        logits_from: logits are wanted for the new tokens from this one on; T for none, T - 1 for the last.
        requests: whose rows these are, on the leader; None for a row that runs along because rows are a slice.
    """

    start: int
    tokens: Sequence[Sequence[int]]
    positions: Sequence[int]
    logits_from: int
    requests: Sequence[Request | None] = field(default=(), compare=False)

    @property
    def width(self) -> int:
        """T, the new tokens in each row."""
        return len(self.tokens[0])

    @property
    def length(self) -> int:
        """Cache positions that this step reads or writes."""
        return max(self.positions) + self.width

    def to_integers(self) -> list[int]:
        """Flatten for another rank, which never sees the requests."""
        flat = [token for row in self.tokens for token in row]
        return [self.start, len(self.tokens), self.logits_from, *self.positions, *flat]

    @classmethod
    def from_integers(cls, values: Sequence[int]) -> "Batch":
        """Read what `to_integers` wrote."""
        start, rows, logits_from = values[:3]
        positions, flat = values[3 : 3 + rows], values[3 + rows :]
        width = len(flat) // rows
        tokens = [flat[row * width : (row + 1) * width] for row in range(rows)]
        return cls(start, tokens, positions, logits_from)


class Scheduler:
    """Gives rows to requests in the order they came, and makes the next step's batch."""

    def __init__(self, runtime: RuntimeArgs) -> None:
        """Start with all rows free."""
        self._runtime = runtime
        self._waiting: deque[Request] = deque()
        self._rows: list[Request | None] = [None] * runtime.max_batch_size
        self._lengths = [0] * runtime.max_batch_size  # tokens that a row holds, kept when it is freed
        self._table = RowTable(runtime.max_batch_size)
        self._prompts: deque[Request] = deque()  # admitted and not yet in the cache, in the order they came
        self._prefills = 0  # prompts that were prefilled since the rows last decoded

    @property
    def busy(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._waiting) or any(self._rows)

    def load(self) -> tuple[int, int]:
        """Count the requests that have a row, and those that wait for one."""
        return sum(request is not None for request in self._rows), len(self._waiting)

    def add(self, request: Request) -> None:
        """Let a request wait for a row. One that asks for nothing is finished at once; one that has ended stays so."""
        if request.finish_reason is not None:
            return
        if request.n_max == 0 and not request.scores_prompt:
            request.finish("length")
        else:
            self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request wherever it is."""
        if request.finish_reason is not None:
            return
        if request in self._waiting:  # it may not have come here yet
            self._waiting.remove(request)
        request.finish("cancelled")
        self._free()

    def fail(self, error: BaseException) -> None:
        """End everything with this error and forget what the rows hold."""
        self._forget(lambda request: request.fail(error))

    def end(self) -> None:
        """End everything as cancelled and forget what the rows hold."""
        self._forget(lambda request: request.finish("cancelled"))

    def _forget(self, end: Callable[[Request], None]) -> None:
        for request in (*self._waiting, *self._rows):
            if request is not None and request.finish_reason is None:
                end(request)
        self._waiting.clear()
        self._prompts.clear()
        self._prefills = 0
        self._rows = [None] * len(self._rows)
        self._lengths = [0] * len(self._lengths)
        self._table.forget()

    def schedule(self) -> Batch | None:
        """Make the next batch, or None when there is nothing to do.

        Prompts come before decoding, so that rows decode together. But the running rows decode once between the chunks
        of a long prompt, and after as many prompts as there are rows, so that a stream keeps moving.
        """
        self._admit()
        decode = [request for request in self._rows if request is not None and not request.prefilling]
        if self._prompts and not (decode and self._prefills >= len(self._rows)):
            self._prefills = self._prefills if decode else 0
            return self._prefill(self._prompts[0])
        self._prefills = 0
        return self._decode(decode) if decode else None

    def commit(self, batch: Batch) -> None:
        """Account for a batch that was run and whose requests have taken their tokens: free the rows that are done."""
        for request in batch.requests:
            if request is not None:
                assert request.row is not None, "a request in a batch has a row"
                request.n_cached += batch.width
                # One position stays free to write to while the row runs along.
                self._lengths[request.row] = min(request.n_cached, self._runtime.max_seq_len - 1)
                if request.finish_reason is None and not request.prefilling and request.n_max == 0:
                    request.finish("length")  # the prompt is scored; there is nothing to generate
        self._free()

    def _admit(self) -> None:
        while self._waiting and (free := [row for row, request in enumerate(self._rows) if request is None]):
            request = self._waiting.popleft()
            row, reused = self._table.choose(free, request.prompt)
            if request.scores_prompt:  # which needs the logits of every position
                reused = 0
            request.row, request.n_cached, request.n_reused = row, reused, reused
            self._table.take(row, request.prompt[:reused])
            self._rows[row] = request
            self._lengths[row] = reused
            self._prompts.append(request)

    def _free(self) -> None:
        for row, request in enumerate(self._rows):
            if request is not None and request.finish_reason is not None:
                self._rows[row] = None
                self._table.give_back(row, [*request.prompt, *request.output][: self._lengths[row]])
                if request in self._prompts:
                    self._prompts.remove(request)

    def _prefill(self, request: Request) -> Batch:
        assert request.row is not None, "an admitted request has a row"
        decoding = any(other is not None and not other.prefilling for other in self._rows)
        size = min(self._runtime.chunk_size, SHARED_CHUNK) if decoding else self._runtime.chunk_size
        chunk = request.prompt[request.n_cached : request.n_cached + size]
        last = request.n_cached + len(chunk) == len(request.prompt)
        if last:
            self._prompts.popleft()
        self._prefills += 1 if last else len(self._rows)
        unscored = len(chunk) - 1 if last else len(chunk)
        logits_from = 0 if request.scores_prompt else unscored
        return Batch(request.row, [chunk], [request.n_cached], logits_from, [request])

    def _decode(self, decode: Sequence[Request]) -> Batch:
        rows = [request.row for request in decode if request.row is not None]
        span = range(min(rows), max(rows) + 1)
        tokens, positions, requests = [], [], []
        for row in span:
            owner = self._rows[row]
            active = owner if owner is not None and not owner.prefilling else None
            requests.append(active)
            tokens.append([active.output[-1] if active else 0])
            # A row that runs along writes at its own next position: a free one past what it keeps, a prefilling one
            # where its next chunk will be written.
            positions.append(self._lengths[row])
        return Batch(span.start, tokens, positions, 0, requests)
