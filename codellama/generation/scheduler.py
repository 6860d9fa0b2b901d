"""Which rows run next: requests wait, are given a row, are prefilled in chunks, decode together, and leave.

It knows nothing of the model or of torch. A Batch is all that a rank needs to run one step.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from codellama.config import RuntimeArgs
from codellama.generation.request import Request
from codellama.generation.rows import LEAST_REUSE, RowTable, common_length

LAST_DRAWN = -1
"""In place of an id: the one that was drawn last in this row, which the device holds and the host has not read."""

SHARED_CHUNK = 512
"""Tokens of prompts that are read between two steps of the rows that decode: they wait for so many."""


@dataclass(frozen=True)
class Batch:
    """One step: T new tokens in each of the cache rows start … start + B - 1.

    Attributes:
        start: first cache row.
        tokens: B lists of T ids, or LAST_DRAWN where a row decodes before its last id was read.
        positions: where each row's first new token stands; the others follow it. -1 for a row that runs along because
            rows are a slice: it writes nothing.
        logits_from: logits are wanted for the new tokens from this one on; T for none, T - 1 for the last.
        requests: whose rows these are, on the leader; None for a row that runs along.
        copies: what goes from row to row before the step, in this order: source, target, first position, end.
        shared: the ids that are drawn from this step are given to all ranks' devices, since a later one may need them.
    """

    start: int
    tokens: Sequence[Sequence[int]]
    positions: Sequence[int]
    logits_from: int
    requests: Sequence[Request | None] = field(default=(), compare=False)
    copies: Sequence[tuple[int, int, int, int]] = ()
    shared: bool = False

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
        tokens = [token for row in self.tokens for token in row]
        copies = [value for copy in self.copies for value in copy]
        sizes = [len(self.tokens), len(self.copies), int(self.shared)]
        return [self.start, *sizes, self.logits_from, *copies, *self.positions, *tokens]

    @classmethod
    def from_integers(cls, values: Sequence[int]) -> "Batch":
        """Read what `to_integers` wrote."""
        start, rows, n_copies, shared, logits_from = values[:5]
        copies = [(values[at], values[at + 1], values[at + 2], values[at + 3]) for at in range(5, 5 + 4 * n_copies, 4)]
        rest = values[5 + 4 * n_copies :]
        positions, flat = rest[:rows], rest[rows:]
        width = len(flat) // rows
        tokens = [flat[row * width : (row + 1) * width] for row in range(rows)]
        return cls(start, tokens, positions, logits_from, copies=tuple(copies), shared=bool(shared))


class Scheduler:
    """Gives rows to requests in the order they came, and makes the next step's batch.

    What several prompts begin with is computed once: before a chunk of a prompt is read, what any other row has of it
    is copied. So nobody waits for anybody, whoever is first.
    """

    def __init__(self, runtime: RuntimeArgs) -> None:
        """Start with all rows free."""
        self._runtime = runtime
        self._waiting: deque[Request] = deque()
        self._rows: list[Request | None] = [None] * runtime.max_batch_size
        self._table = RowTable(runtime.max_batch_size)
        self._copies: list[tuple[int, int, int, int]] = []  # of the batch that is being made
        self._prompts: deque[Request] = deque()  # admitted and not yet in the cache, in the order they came
        self._passed = 0  # tokens that were read of later prompts since the first of these was read
        self._delay = 0  # tokens of prompts that were read while rows waited to decode

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
        self._copies.clear()
        self._passed = self._delay = 0
        self._rows = [None] * len(self._rows)
        self._table.forget()

    def schedule(self) -> Batch | None:
        """Make the next batch, or None when there is nothing to do.

        Prompts come before decoding, so that rows decode together. But rows that decode wait for no more than
        SHARED_CHUNK tokens of prompts. Short prompts pass long ones, but the one that came first waits for no more than
        a chunk of others between two of its own.
        """
        self._admit()
        decode = [request for request in self._rows if request is not None and _decodes(request)]
        batch = self._prefill(bool(decode)) if self._prompts else None
        if batch is None:
            self._delay = 0
            batch = self._decode(decode) if decode else None
        if self._copies:
            assert batch is not None, "what was copied is used at once"
            batch, self._copies = replace(batch, copies=tuple(self._copies)), []
        return batch

    @property
    def needs_ids(self) -> bool:
        """True where the next batch cannot be made well before the ids of the last one are read."""
        return any(request is not None and request.n_pending > 0 and request.needs_ids for request in self._rows)

    def launch(self, batch: Batch, drawing: Sequence[Request] = ()) -> None:
        """Account for a batch that runs: what it writes is as good as written, and these requests draw a token.

        The next batch can be made before this one is committed: one late, never two.
        """
        for request in batch.requests:
            if request is not None:
                request.n_cached += batch.width
        for request in drawing:
            request.n_pending += 1

    def commit(self, batch: Batch, drawing: Sequence[Request] = ()) -> None:
        """Account for a launched batch whose requests have taken their tokens: free the rows that are done."""
        for drawer in drawing:
            drawer.n_pending -= 1
        for request in batch.requests:
            if request is not None and _has_all(request):
                request.finish("length")  # the prompt is scored; there is nothing to generate
        self._free()

    def _admit(self) -> None:
        while self._waiting and (taken := self._table.take(self._waiting[0].prompt)):
            request = self._waiting.popleft()
            row, reused = taken
            if request.scores_prompt:  # which needs the logits of every position
                reused = 0
            request.row, request.n_cached, request.n_reused = row, reused, reused
            self._rows[row] = request
            self._prompts.append(request)
            self._copy_beginning(request)  # at once: the next one may be given the row that holds it

    def _copy_beginning(self, request: Request) -> None:
        """Copy what another row holds of a prompt, its last id excepted, if that is enough to be worth it."""
        assert request.row is not None, "an admitted request has a row"
        if request.scores_prompt:
            return
        wanted = request.prompt[:-1]
        length, source = self._table.longest(wanted)
        for row, other in enumerate(self._rows):
            if other is not None and other is not request and other.n_cached > length:
                shared = min(common_length(other.prompt, wanted), other.n_cached)
                if shared == len(other.prompt):
                    shared += common_length(other.output[: other.n_cached - shared], wanted[shared:])
                if shared > length:
                    length, source = shared, row
        if length >= request.n_cached + LEAST_REUSE:
            self._copies.append((source, request.row, request.n_cached, length))
            request.n_reused += length - request.n_cached
            request.n_cached = length

    def _free(self) -> None:
        for row, request in enumerate(self._rows):
            if request is not None and request.finish_reason is not None:
                self._rows[row] = None
                self._table.give_back(row, [*request.prompt, *request.output][: request.n_cached])
                if request in self._prompts:
                    self._prompts.remove(request)

    def _prefill(self, decoding: bool) -> Batch | None:
        """Read a chunk of a prompt, or None if those that decode have waited enough."""
        size = min(self._runtime.chunk_size, SHARED_CHUNK) if decoding else self._runtime.chunk_size
        first, request = self._prompts[0], min(self._prompts, key=_n_left)
        if self._passed + self._cost(request, size) > size:
            request = first
        self._copy_beginning(request)
        cost = self._cost(request, size)
        if decoding and self._delay + cost > size:
            return None
        self._delay = self._delay + cost if decoding else 0
        self._passed = 0 if request is first else self._passed + cost
        assert request.row is not None, "an admitted request has a row"
        chunk = request.prompt[request.n_cached : request.n_cached + size]
        last = len(chunk) == _n_left(request)
        if last:
            self._prompts.remove(request)
        unscored = len(chunk) - 1 if last else len(chunk)
        logits_from = 0 if request.scores_prompt else unscored
        return Batch(request.row, [chunk], [request.n_cached], logits_from, [request])

    def _cost(self, request: Request, size: int) -> int:
        """Tokens of a request's next chunk of up to this size; but reading a few is not free either."""
        return max(min(_n_left(request), size), size // len(self._rows))

    def _decode(self, decode: Sequence[Request]) -> Batch:
        rows = [row_of(request) for request in decode]
        span = range(min(rows), max(rows) + 1)
        owners = [self._rows[row] for row in span]
        requests = [owner if owner is not None and _decodes(owner) else None for owner in owners]
        tokens = [[_last_id(request) if request else 0] for request in requests]
        positions = [request.n_cached if request else -1 for request in requests]
        return Batch(span.start, tokens, positions, 0, requests)


def row_of(request: Request) -> int:
    """The row of an admitted request."""
    assert request.row is not None, "an admitted request has a row"
    return request.row


def _has_all(request: Request) -> bool:
    """True where a request asked for its prompt's scores alone, and has them."""
    return request.finish_reason is None and not request.prefilling and request.n_max == 0


def _decodes(request: Request) -> bool:
    """True where a request is past its prompt, and what is drawn and not read yet is not its last token."""
    return not request.prefilling and len(request.output) + request.n_pending < request.n_max


def _last_id(request: Request) -> int:
    return LAST_DRAWN if request.n_pending else request.output[-1]


def _n_left(request: Request) -> int:
    """Ids of a prompt that are not in the cache yet."""
    return len(request.prompt) - request.n_cached
