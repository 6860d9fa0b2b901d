"""Which rows run next: requests wait, are given a row, are prefilled in chunks, decode together, and leave.

It knows nothing of the model or of torch.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from codellama.config import RuntimeArgs
from codellama.generation.batch import LAST_DRAWN, Batch
from codellama.generation.request import Request
from codellama.generation.rows import LEAST_REUSE, RowTable, common_length

SHARED_CHUNK = 512
"""Tokens of prompts that are read between two steps of the rows that decode: they wait for so many."""


STEP_TOKENS = 32
"""Tokens that are read in the time that one more step takes beside its tokens, roughly, on any machine."""


MOVE_STEPS = 8
"""What it costs to move a row, in steps of one row: it is read and written once."""

READ_AGAIN = 4
"""Ids of a prompt that are read anew in the time of a step of one row."""


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
        self._along = 0  # rows that ran along in steps since rows were dense

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
        self._passed = self._delay = self._along = 0
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
            if decode:
                self._close_up(decode)
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
        for request, tokens in zip(batch.requests, batch.tokens, strict=True):
            if request is not None:
                request.n_cached += len(tokens)
        for request in drawing:
            request.n_pending += 1

    def commit(
        self, batch: Batch, drawing: Sequence[Request] = (), accepted: Mapping[Request, int] | None = None
    ) -> None:
        """Account for a launched batch whose requests have taken their tokens: free the rows that are done.

        Args:
            batch: the step.
            drawing: the requests that drew a token.
            accepted: of how many of a request's new tokens the keys and values stay; all where it is not named. What
                was guessed wrongly is written over by the next step.
        """
        for drawer in drawing:
            drawer.n_pending -= 1
        for owner, tokens in zip(batch.requests, batch.tokens, strict=True):
            if owner is not None and accepted and owner in accepted:
                assert 0 < accepted[owner] <= len(tokens), "the first new token was no guess"
                owner.n_cached -= len(tokens) - accepted[owner]
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
        length, source = self._find_beginning(request)
        if length:
            self._copies.append((source, row_of(request), request.n_cached, length))
            request.n_reused += length - request.n_cached
            request.n_cached = length

    def _find_beginning(self, request: Request) -> tuple[int, int]:
        """How many of a prompt's ids are worth being copied from another row, and from which one; else 0 of any."""
        if request.scores_prompt:
            return 0, 0
        wanted = request.prompt[:-1]
        length, source = self._table.longest(wanted)
        for row, other in enumerate(self._rows):
            if other is not None and other is not request and other.n_cached > length:
                shared = min(common_length(other.prompt, wanted), other.n_cached)
                if shared == len(other.prompt):
                    shared += common_length(other.output[: other.n_cached - shared], wanted[shared:])
                if shared > length:
                    length, source = shared, row
        return (length, source) if length >= request.n_cached + LEAST_REUSE else (0, 0)

    def _free(self) -> None:
        for row, request in enumerate(self._rows):
            if request is not None and request.finish_reason is not None:
                self._rows[row] = None
                self._table.give_back(row, [*request.prompt, *request.output][: request.n_cached])
                if request in self._prompts:
                    self._prompts.remove(request)

    def _prefill(self, decoding: bool) -> Batch | None:
        """Read a chunk of a prompt, or several short prompts; None if those that decode have waited enough."""
        size = min(self._runtime.chunk_size, SHARED_CHUNK) if decoding else self._runtime.chunk_size
        first, request = self._prompts[0], min(self._prompts, key=_n_left)
        if self._passed + self._cost(_n_left(request), size) > size:
            request = first
        self._copy_beginning(request)
        cost = self._cost(min(_n_left(request), size), size)
        if decoding and self._delay + cost > size:
            return None
        room = min(size - (self._delay if decoding else 0), size if request is first else size - self._passed)
        group = self._gather(request, min(room, SHARED_CHUNK))
        if len(group) > 1:
            cost = self._cost(_padded(group), size)
        self._delay = self._delay + cost if decoding else 0
        self._passed = 0 if first in group else self._passed + cost
        return self._read(group, size)

    def _gather(self, request: Request, room: int) -> list[Request]:
        """Find the prompts that are read to their end together with a request's, padding counted in this room.

        Each must cost no more than in a step of its own. One that begins like another one of them waits for it, and
        copies.
        """
        group = [request]
        if _n_left(request) > room:
            return group
        for other in sorted(self._prompts, key=_n_left):
            length = self._find_beginning(other)[0]
            left = len(other.prompt) - max(other.n_cached, length)
            size = _padded([*group, other], left)
            worth_it = size <= room and size - _padded(group) <= left + STEP_TOKENS
            if other in group or not worth_it or any(_begins_like(other, member, length) for member in group):
                continue
            self._copy_beginning(other)
            group.append(other)
        return group

    def _read(self, group: Sequence[Request], size: int) -> Batch:
        """Make a batch of the next chunk of each of these prompts."""
        span, owners = _span(group), {row_of(request): request for request in group}
        requests = [owners.get(row) for row in span]
        chunks = [request.prompt[request.n_cached :][:size] if request else [] for request in requests]
        wanted = [0] * len(span)
        for index, (request, chunk) in enumerate(zip(requests, chunks, strict=True)):
            if request is not None:
                last = len(chunk) == _n_left(request)
                wanted[index] = len(chunk) if request.scores_prompt else int(last)
                if last:
                    self._prompts.remove(request)
        positions = [request.n_cached if request else -1 for request in requests]
        return Batch(span.start, chunks, positions, wanted, requests)

    def _cost(self, n_tokens: int, size: int) -> int:
        """Tokens of the next step, of up to this size; but reading a few is not free either."""
        return max(min(n_tokens, size), size // len(self._rows))

    def _close_up(self, decode: Sequence[Request]) -> None:
        """Move a row that decodes far from the others next to them, once what ran along has cost as much as that.

        So rows that run along cost twice the best choice at most, whoever ends when. What the free row holds that is
        moved to is lost, and counts.
        """
        rows = sorted(row_of(request) for request in decode)
        idle = rows[-1] - rows[0] + 1 - len(rows)
        self._along = self._along + idle if idle else 0
        free = [row for row in range(rows[0], rows[-1]) if self._rows[row] is None]
        if not free:
            return
        source = rows[-1] if rows[-1] - rows[-2] >= rows[1] - rows[0] else rows[0]
        near = rows[-2] if source == rows[-1] else rows[1]  # the others begin there
        target = min(free, key=lambda row: (self._table.n_held(row), abs(row - near)))
        if self._along < MOVE_STEPS + self._table.n_held(target) // READ_AGAIN:
            return
        request = self._rows[source]
        assert request is not None, "a row that decodes is somebody's"
        self._table.take_row(target)
        self._copies.append((source, target, 0, request.n_cached))
        self._rows[source], self._rows[target], request.row = None, request, target
        self._table.give_back(source, ())
        self._along = 0

    def _decode(self, decode: Sequence[Request]) -> Batch:
        span, decoding = _span(decode), {row_of(request): request for request in decode}
        requests = [decoding.get(row) for row in span]
        # Guesses are few enough to be judged in about the time of a step without.
        most = min(STEP_TOKENS, self._runtime.chunk_size) // len(span) - 1
        tokens = [[_last_id(request), *request.draft(most)] if request else [] for request in requests]
        positions = [request.n_cached if request else -1 for request in requests]
        return Batch(span.start, tokens, positions, [len(row) for row in tokens], requests)


def row_of(request: Request) -> int:
    """The row of an admitted request."""
    assert request.row is not None, "an admitted request has a row"
    return request.row


def _span(requests: Sequence[Request]) -> range:
    """The slice of rows from the first of these requests to the last one."""
    rows = [row_of(request) for request in requests]
    return range(min(rows), max(rows) + 1)


def _padded(group: Sequence[Request], at_least: int = 0) -> int:
    """Tokens that a step of these prompts computes, padding and rows that run along counted."""
    *known, last = group
    longest = max([*map(_n_left, known), at_least or _n_left(last)])
    return len(_span(group)) * longest


def _begins_like(request: Request, other: Request, n_held: int) -> bool:
    """True where another prompt holds more of a request's beginning than is in the cache, and enough to copy."""
    if request.scores_prompt:
        return False
    return common_length(request.prompt[:-1], other.prompt) >= max(request.n_cached, n_held) + LEAST_REUSE


def _has_all(request: Request) -> bool:
    """True where a request asked for its prompt's scores alone, and has them."""
    return request.finish_reason is None and not request.prefilling and request.n_max == 0


def _decodes(request: Request) -> bool:
    """True where a request is past its prompt, and what is drawn and not read yet is not its last token.

    One that has failed still has its row where the step that it failed in is not committed yet.
    """
    return (
        request.finish_reason is None
        and not request.prefilling
        and len(request.output) + request.n_pending < request.n_max
    )


def _last_id(request: Request) -> int:
    return LAST_DRAWN if request.n_pending else request.output[-1]


def _n_left(request: Request) -> int:
    """Ids of a prompt that are not in the cache yet."""
    return len(request.prompt) - request.n_cached
