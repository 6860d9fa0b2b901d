"""Drives the scheduler with made-up tokens and a made-up cache, and checks each of its batches; no torch, no model.

The cache holds ids: each batch copies from row to row, then writes its tokens at its positions. Before a batch, every
request must find its own history in its row, whether it runs or not: nobody else wrote there.
"""

from collections.abc import Sequence
from typing import Any

from codellama.config import RuntimeArgs, SamplingParams
from codellama.generation.batch import Batch
from codellama.generation.request import Request
from codellama.generation.scheduler import Scheduler

VOCAB = 1000


class Machine:
    """Runs batches as the engine does.

    Attributes:
        cache: what each row holds; kept: what a row held when it was freed.
        prefilled: the part of its prompt that is in the cache, in the order in which it came there.
        copied: ids that went from row to row; steps: batches so far.
        admitted: requests in the order in which they were given rows; running: those that have not ended.
    """

    def __init__(self, rows: int = 2, max_seq_len: int = 32, chunk_size: int = 8) -> None:
        self.runtime = RuntimeArgs(max_seq_len=max_seq_len, max_batch_size=rows, chunk_size=chunk_size)
        self.scheduler = Scheduler(self.runtime)
        self.cache = [[-1] * max_seq_len for _ in range(rows)]
        self.kept: list[list[int]] = [[] for _ in range(rows)]
        self.prefilled: dict[Request, list[int]] = {}
        self.requests: list[Request] = []
        self.admitted: list[Request] = []
        self.running: set[Request] = set()
        self.copied = 0
        self.steps = 0
        self.guessed = self.right = self.moved = 0

    def add(self, length: int, n: int = 4, begin: Sequence[int] = (), **params: Any) -> Request:
        """Queue a request whose prompt begins like this, and goes on like no other's."""
        prompt = [*begin, *((len(self.requests) * 37 + at) % VOCAB for at in range(length - len(begin)))]
        request = Request(prompt, SamplingParams(max_gen_len=n, **params), 0, VOCAB, self.runtime.max_seq_len)
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def step(self) -> Batch | None:
        """Schedule, check, run, commit."""
        free = set(range(self.runtime.max_batch_size)) - {request.row for request in self.running}
        batch = self.scheduler.schedule()
        self.admit(sorted(free), batch)
        if batch is None:
            assert not self.scheduler.busy
            return None
        accepted: dict[Request, int] = {}
        self.steps += 1
        self.copy(batch)
        self.check(batch)
        for row, (tokens, first) in enumerate(zip(batch.tokens, batch.positions, strict=True), start=batch.start):
            if first >= 0:
                self.cache[row][first : first + len(tokens)] = tokens
        for request, tokens, position in zip(batch.requests, batch.tokens, batch.positions, strict=True):
            if request is not None and request.n_max > 0 and position + len(tokens) >= request.n_tokens:
                guesses = tokens[1:] if position >= len(request.prompt) else []
                drawn = [(self.next(request, len(request.output) + n), None) for n in range(len(guesses) + 1)]
                n = request.take(drawn, guesses)
                self.guessed += len(guesses)
                self.right += n - 1
                if guesses:
                    accepted[request] = n
        self.scheduler.launch(batch)
        self.scheduler.commit(batch, (), accepted)
        self.leave()
        return batch

    @staticmethod
    def next(request: Request, at: int) -> int:
        """The token that comes at this place of an output: periodic where a request speculates, most of the time."""
        if request.params.speculate:
            return (request.prompt[0] + at % 5 + (at % 13 == 0)) % VOCAB
        return (request.prompt[0] + 7 * at) % VOCAB

    def finish(self, limit: int = 10_000) -> None:
        """Run until there is nothing to do."""
        for _ in range(limit):
            if self.step() is None:
                return
        raise AssertionError(f"not done after {limit} steps")

    def cancel(self, request: Request) -> None:
        self.scheduler.cancel(request)
        self.leave()

    def admit(self, free: Sequence[int], batch: Batch | None) -> None:
        """Find out who was given a row: those who came first, each a free one that holds what it relies on."""
        fresh = [request for request in self.requests if request.row is not None and request not in self.admitted]
        assert {request.row for request in fresh} <= set(free)
        copied = dict.fromkeys(range(len(self.cache)), 0)
        for _, target, start, stop in batch.copies if batch else ():
            copied[target] += stop - start
        for request in fresh:
            assert request.row is not None
            kept = request.n_reused - copied[request.row]
            assert self.kept[request.row][:kept] == request.prompt[:kept]
            self.prefilled[request] = request.prompt[:kept]
        left = [request for request in self.requests if request.row is None and request.finish_reason is None]
        assert [request for request in left if len(fresh) < len(free)] == [], "nobody waits while a row is free"
        self.admitted += fresh
        self.running |= set(fresh)

    def copy(self, batch: Batch) -> None:
        """Copy, in the order of the batch, what a request does not have yet."""
        owners = {request.row: request for request in self.running}
        for source, target, start, stop in batch.copies:
            owner = owners[target]
            assert source != target
            if owner.output:  # it moves
                assert (start, stop) == (0, owner.n_cached)
                assert source not in owners, "its row is free now"
                self.cache[target][:stop] = self.cache[source][:stop]
                self.kept[source] = []
                self.moved += 1
                continue
            assert start == len(self.prefilled[owner]) < stop < len(owner.prompt)
            self.cache[target][start:stop] = self.cache[source][start:stop]
            self.prefilled[owner] += owner.prompt[start:stop]
            self.copied += stop - start

    def leave(self) -> None:
        for request in [request for request in self.running if request.finish_reason is not None]:
            assert request.row is not None
            self.running.remove(request)
            self.kept[request.row] = [*request.prompt, *request.output][: request.n_cached]

    def check(self, batch: Batch) -> None:
        rows = range(batch.start, batch.start + len(batch.tokens))
        assert 0 <= batch.start < rows.stop <= self.runtime.max_batch_size
        assert len(batch.positions) == len(batch.requests) == len(rows)
        assert max(len(tokens) for tokens in batch.tokens) == batch.width
        decoding = all(request is None or request.output for request in batch.requests)
        assert 1 <= len(rows) * batch.width <= self.runtime.chunk_size or len(rows) == 1 or decoding, "padding counts"
        assert batch.width <= self.runtime.chunk_size
        assert batch.length <= self.runtime.max_seq_len
        again = Batch.from_integers(batch.to_integers())
        assert again == batch
        assert (again.width, again.length) == (batch.width, batch.length)
        assert batch.requests[0] is not None, "the slice begins and ends with a row that works"
        assert batch.requests[-1] is not None
        owners = {request.row: request for request in self.running}
        assert len(owners) == len(self.running), "no two share a row"
        for row, request, tokens, position in zip(rows, batch.requests, batch.tokens, batch.positions, strict=True):
            if request is not None:
                self.check_request(row, request, tokens, position, batch)
            else:
                assert (position, tokens) == (-1, []), "a row that runs along writes nothing"
        for row, owner in owners.items():
            history = [*owner.prompt, *owner.output]
            assert self.cache[row][: owner.n_cached] == history[: owner.n_cached], "each finds what is its own"
            assert not (owner.scores_prompt and owner.n_reused)
        for row in set(range(self.runtime.max_batch_size)) - owners.keys():
            assert self.cache[row][: len(self.kept[row])] == self.kept[row], "a free row keeps what it holds"

    def check_request(self, row: int, request: Request, tokens: Sequence[int], position: int, batch: Batch) -> None:
        assert request.row == row
        assert request in self.running
        history = [*request.prompt, *request.output]
        wanted = batch.wanted[row - batch.start]
        assert position == request.n_cached
        assert history[position : position + len(tokens)] == tokens[: len(history) - position]
        if position < len(request.prompt):
            assert not any(other and other.output for other in batch.requests), "nobody decodes"
            self.prefilled[request] += tokens
            assert self.prefilled[request] == request.prompt[: position + len(tokens)], "each once and in order"
            last = position + len(tokens) == len(request.prompt)
            assert last or sum(map(bool, batch.tokens)) == 1, "together, prompts are read to their ends"
            assert wanted == (len(tokens) if request.scores_prompt else last)
        else:
            assert position == request.n_tokens - 1
            assert tokens[0] == request.output[-1]
            assert wanted == len(tokens) <= request.params.speculate + 1
            assert position + len(tokens) < len(request.prompt) + request.n_max + 1, "no guess beyond the end"


def rows_of(batch: Batch | None) -> list[int]:
    """Rows that work, without those that run along."""
    assert batch is not None
    return [row for row, request in enumerate(batch.requests, start=batch.start) if request is not None]
