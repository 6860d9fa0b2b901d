"""Whatever comes, is copied, and leaves in between: each request gets what the model says about it alone.

The model alone is one dense pass over prompt and output, without a cache; each token must be the one that the logits
before it give, so a request that was cancelled is checked as far as it came.
"""

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from codellama.cache import KVCache
from codellama.config import ModelArgs, RuntimeArgs, SamplingParams
from codellama.generation.batch import LAST_DRAWN, Batch
from codellama.generation.engine import Engine
from codellama.generation.request import Request
from codellama.generation.runner import Runner
from codellama.generation.sampling import sample
from codellama.generation.scheduler import Scheduler
from codellama.model import Transformer
from codellama.parallel import Parallel
from tests.support import tiny

ARGS = ModelArgs(dim=24, n_layers=2, n_heads=6, n_kv_heads=3, vocab_size=40, multiple_of=32, rope_theta=10_000.0)
MAX_SEQ_LEN, STOP = 80, 5
CPU = torch.device("cpu")
PARAMS = ({}, {"temperature": 0.9, "top_p": 0.9}, {"temperature": 1.5, "top_k": 8, "logprobs": True})


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny.whole_model(ARGS, tiny.random_weights(ARGS))


class Recorder(Runner):
    """Counts tokens that were copied, steps with rows that ran along, with several prompts, with unread ids."""

    copied = 0
    along = 0
    blind = 0
    together = 0

    def run(self, batch: Batch) -> Iterator[Tensor]:
        self.copied += sum(stop - start for _, _, start, stop in batch.copies)
        self.along += min(batch.positions) < 0
        self.together += sum(len(tokens) > 1 for tokens in batch.tokens) > 1
        self.blind += any(LAST_DRAWN in tokens for tokens in batch.tokens)
        return super().run(batch)


class Load:
    """An engine, and what has been asked of it."""

    def __init__(self, model: Transformer, rng: random.Random, late: bool) -> None:
        self.rng = rng
        self.rows = rng.randrange(1, 6)
        runtime = RuntimeArgs(max_seq_len=MAX_SEQ_LEN, max_batch_size=self.rows, chunk_size=rng.randrange(1, 30))
        cache = KVCache.allocate(
            ARGS, rows=self.rows, max_seq_len=MAX_SEQ_LEN, dtype=torch.float32, device=CPU
        )  # fmt: skip
        self.runner = Recorder(model, cache, CPU)
        self.scheduler = Scheduler(runtime)
        self.engine = Engine(self.runner, self.scheduler, Parallel(), late)
        self.requests: list[Request] = []
        self.handed: dict[Request, list[int]] = {}

    def ids(self, length: int) -> list[int]:
        return [self.rng.randrange(ARGS.vocab_size) for _ in range(length)]

    def submit(self) -> None:
        """Ask for one to three answers to a prompt, which may begin like another one and its answer."""
        begin: Sequence[int] = ()
        if self.requests and self.rng.random() < 0.7:
            other = self.rng.choice(self.requests)
            begin = [*other.prompt, *other.output][: self.rng.choice((12, 30, 60))]
        prompt = [*begin, *self.ids(self.rng.choice((1, 3, 15)))]
        options = self.rng.choice(PARAMS)
        params = SamplingParams(max_gen_len=self.rng.choice((1, 2, 7)), stop_tokens=frozenset({STOP}), **options)
        for seed in range(self.rng.choice((1, 1, 1, 2, 3))):
            request = Request(prompt, params, seed, ARGS.vocab_size, MAX_SEQ_LEN)
            handed = self.handed[request] = []
            self.requests.append(request)
            self.engine.submit(request, lambda delta, handed=handed: handed.extend(delta.tokens))

    def run(self) -> None:
        for _ in range(self.rng.randrange(2, 6)):
            self.submit()
            for _ in range(self.rng.choice((0, 1, 3, 8))):
                self.engine.step()
            if self.rng.random() < 0.3:
                self.engine.cancel(self.rng.choice(self.requests))
        while self.engine.step():
            pass


def expected(model: Transformer, request: Request) -> list[int]:
    """What the logits of one dense pass give after each token, the one that ended the request included."""
    ids = torch.tensor([[*request.prompt, *request.output]])
    with torch.inference_mode():
        hidden = model(ids, torch.arange(ids.shape[1])[None])[0, len(request.prompt) - 1 :]
        logits = model.logits(hidden)
    rng = random.Random(str(request.seed))
    return [int(sample(row, request.params, rng.random(), ())) for row in logits]


def test_any_interleaving_gives_each_request_what_it_gets_alone(model: Transformer) -> None:
    rng = random.Random(3)
    seen = {"reused": 0, "copied": 0, "along": 0, "blind": 0, "together": 0, "cancelled": 0, "length": 0, "stop": 0}
    for index in range(200):
        load = Load(model, rng, late=index % 2 == 1)
        load.run()
        assert not load.scheduler.busy
        assert load.scheduler._table._held.keys() == set(range(load.rows)), "all rows are free"
        for request in load.requests:
            tokens = expected(model, request)
            assert request.output == tokens[: len(request.output)]
            assert load.handed[request] == request.output
            assert request.finish_reason is not None
            if request.finish_reason != "cancelled":
                ended = tokens[-1] if len(request.output) < request.n_max else None
                assert (ended, request.finish_reason) in ((STOP, "stop"), (None, "length"))
            seen[request.finish_reason] += 1
            seen["reused"] += request.n_reused > 0
        seen["copied"] += load.runner.copied > 0
        seen["along"] += load.runner.along > 0
        seen["together"] += load.runner.together > 0
        seen["blind"] += load.runner.blind > 0
    assert min(seen.values()) > 20, seen


@pytest.mark.parametrize("late", [False, True])
def test_a_row_that_moves_goes_on_as_if_it_had_not(model: Transformer, late: bool) -> None:
    """Rows 0, 4 and 5 go on when the others have ended; 0 moves to 3, where somebody's answer was."""
    cache = KVCache.allocate(ARGS, rows=6, max_seq_len=MAX_SEQ_LEN, dtype=torch.float32, device=CPU)
    runner = Recorder(model, cache, CPU)
    scheduler = Scheduler(RuntimeArgs(max_seq_len=MAX_SEQ_LEN, max_batch_size=6, chunk_size=30))
    engine = Engine(runner, scheduler, Parallel(), late)
    params = [SamplingParams(max_gen_len=60 if row in (0, 4, 5) else 1, temperature=0.8) for row in range(6)]
    requests = [Request([row + 1, 7, row], params[row], row, ARGS.vocab_size, MAX_SEQ_LEN) for row in range(6)]
    engine.run(requests)
    assert [request.row for request in requests] == [3, 1, 2, 3, 4, 5]
    assert runner.copied >= 3, "what it held then"
    for request in requests:
        assert request.output == expected(model, request)[: len(request.output)]
        assert len(request.output) == request.n_max
