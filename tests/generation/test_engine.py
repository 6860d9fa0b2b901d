"""The loop: what it runs, what it frees, and how it ends. (Neighbours and order: tests/test_llama.py.)"""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from codellama.cache import KVCache
from codellama.config import RuntimeArgs, SamplingParams
from codellama.errors import NumericalError
from codellama.generation.batch import Batch
from codellama.generation.engine import Engine
from codellama.generation.request import Delta, Request
from codellama.generation.runner import Runner
from codellama.generation.scheduler import Scheduler
from codellama.parallel import Parallel
from tests.support import tiny


class CountingRunner(Runner):
    """Keeps the batches that it ran."""

    def run(self, batch: Batch) -> Iterator[Tensor]:
        self.batches.append(batch)
        return super().run(batch)


def new_engine(rows: int = 4, max_seq_len: int = 128, chunk_size: int = 32) -> tuple[Engine, CountingRunner]:
    model = tiny.whole_model(tiny.ARGS, tiny.random_weights(tiny.ARGS))
    cpu = torch.device("cpu")
    cache = KVCache.allocate(tiny.ARGS, rows=rows, max_seq_len=max_seq_len, dtype=torch.float32, device=cpu)
    runner = CountingRunner(model, cache, cpu)
    runner.batches = []
    runtime = RuntimeArgs(max_seq_len=max_seq_len, max_batch_size=rows, chunk_size=chunk_size)
    return Engine(runner, Scheduler(runtime), Parallel()), runner


def request(prompt: list[int], n: int | None = 8, max_seq_len: int = 128, **options: object) -> Request:
    return Request(prompt, SamplingParams(max_gen_len=n, **options), 0, tiny.VOCAB, max_seq_len)


def test_prompts_of_different_lengths_are_each_prefilled_whole() -> None:
    """Two prompts and 16 new tokens each: 2 prefills and 15 steps, not one step per token of the longer prompt."""
    engine, runner = new_engine(chunk_size=64)
    engine.run([request([7] * 8, 16), request([9] * 50, 16)])
    widths = [(len(batch.tokens), batch.width) for batch in runner.batches]
    assert widths == [(1, 8), (1, 50), *[(2, 1)] * 15]


def test_a_finished_row_is_taken_at_once_and_does_not_compute() -> None:
    engine, runner = new_engine(rows=2)
    short, long, queued = request([1] * 3, 2), request([2] * 3, 12), request([3] * 3, 2)
    engine.run([short, long, queued])
    rows = [(batch.start, len(batch.tokens), batch.width) for batch in runner.batches]
    # prefill short and long; one step finishes short; queued takes row 0; one step finishes it; long goes on alone
    assert rows == [(0, 2, 3), (0, 2, 1), (0, 1, 3), (0, 2, 1), *[(1, 1, 1)] * 9]


def test_a_step_reads_no_more_of_the_cache_than_is_in_use() -> None:
    engine, runner = new_engine()
    engine.run([request([1] * 3, 4)])
    assert [batch.length for batch in runner.batches] == [3, 4, 5, 6]


def test_logits_are_computed_only_where_they_are_used() -> None:
    engine, runner = new_engine(chunk_size=10)
    engine.run([request([4] * 25, 2)])
    assert [(batch.width, batch.wanted[0]) for batch in runner.batches] == [(10, 0), (10, 0), (5, 1), (1, 1)]


def test_running_rows_move_between_the_chunks_of_a_long_prompt() -> None:
    engine, runner = new_engine(chunk_size=10)
    first = request([4] * 5, 30)
    engine.submit(first)
    engine.step()
    engine.submit(request([5] * 40, 2))
    for _ in range(8):
        engine.step()
    assert [batch.width for batch in runner.batches[1:]] == [10, 1, 10, 1, 10, 1, 10, 1]
    assert len(first.output) == 5


def test_cancel_ends_a_request_before_the_next_step() -> None:
    engine, runner = new_engine()
    deltas: list[Delta] = []
    running, waiting = request([1] * 3, 50), request([2] * 3, 50)
    engine.submit(running, deltas.append)
    for _ in range(3):
        engine.step()
    engine.cancel(running)
    engine.submit(waiting)
    engine.cancel(waiting)
    ran = len(runner.batches)
    assert not engine.step()
    assert len(runner.batches) == ran
    assert (running.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled")
    assert deltas[-1].finish_reason == "cancelled"
    assert len(running.output) == 3
    engine.cancel(running)
    assert not engine.step()


def test_a_stream_yields_each_token_and_is_cancelled_when_it_is_closed() -> None:
    engine, runner = new_engine()
    asked = request([1] * 3, 6)
    deltas = list(engine.stream(asked))
    assert [token for delta in deltas for token in delta.tokens] == asked.output
    assert [delta.finish_reason for delta in deltas] == [None] * 5 + ["length"]
    left = request([1] * 3, 60)
    stream = engine.stream(left)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert left.finish_reason == "cancelled"
    ran = len(runner.batches)
    assert not engine.step()
    assert len(runner.batches) == ran


def explode(ids: object, logits: Tensor) -> Tensor:
    raise LookupError("from the caller")


class FailingRunner(Runner):
    """Runs as it should until it is told to fail; calls a function first."""

    def run(self, batch: Batch) -> Iterator[Tensor]:
        if self.before is not None:
            self.before()
            raise ArithmeticError("inside the model")
        return super().run(batch)


def failing_engine(rows: int = 2) -> tuple[Engine, FailingRunner]:
    engine, runner = new_engine(rows=rows)
    runner.__class__ = FailingRunner
    runner.before = None
    return engine, runner


def test_a_raising_processor_ends_its_own_request_alone() -> None:
    engine, _ = new_engine(rows=2)
    requests = [request([1] * 3, 5), request([2] * 3, 5, logits_processor=explode), request([3] * 3, 5)]
    alone = [engine.run([request([id] * 3, 5)])[0].tokens for id in (1, 3)]
    first, failed, third = engine.run(requests)
    assert [first.tokens, third.tokens] == alone
    assert (failed.finish_reason, failed.tokens) == ("error", ())
    assert isinstance(failed.error, LookupError)
    assert first.error is third.error is None


def test_a_raising_receiver_ends_its_own_request_alone() -> None:
    engine, _ = new_engine()
    mine, other = request([1] * 3, 5), request([2] * 3, 5)

    def receive(delta: Delta) -> None:
        raise LookupError("from the receiver")

    engine.submit(mine, receive)
    engine.submit(other)
    while engine.step():
        pass
    assert (mine.finish_reason, other.finish_reason) == ("error", "length")
    assert isinstance(mine.error, LookupError)
    assert len(other.output) == 5


def test_a_raising_receiver_of_a_score_ends_its_own_request_alone() -> None:
    engine, _ = new_engine()
    scored, other = request([1] * 3, 0, echo=True, logprobs=True), request([2] * 3, 5)

    def receive(delta: Delta) -> None:
        raise LookupError("from the receiver")

    engine.submit(other)
    engine.submit(scored, receive)
    while engine.step():
        pass
    assert (scored.finish_reason, other.finish_reason) == ("length", "length")
    assert len(other.output) == 5


def test_a_closed_engine_has_ended_everything_and_takes_nothing() -> None:
    engine, runner = new_engine()
    requests = [request([1] * 3, 50) for _ in range(3)]

    def receive(delta: Delta) -> None:
        raise LookupError("from the receiver")

    for asked in requests:
        engine.submit(asked, receive)
    engine.close()
    late = request([1] * 3, 5)
    engine.submit(late)
    assert [asked.finish_reason for asked in (*requests, late)] == ["cancelled"] * 4
    assert all(parameter.is_meta for parameter in runner.model.parameters())


def test_a_score_that_is_cancelled_returns_as_many_tokens_as_scores() -> None:
    engine, _ = new_engine(chunk_size=10)
    asked = request([4] * 35, 0, echo=True, logprobs=True)
    engine.submit(asked)
    engine.step()
    engine.cancel(asked)
    engine.step()
    done = asked.completion()
    assert (done.finish_reason, len(done.tokens), len(done.scores)) == ("cancelled", 11, 11)


def test_a_failure_of_the_model_ends_every_request_once_with_its_cause() -> None:
    """Those that run, wait, and are submitted while the failing step runs; then the engine goes on as if new."""
    engine, runner = failing_engine(rows=1)
    deltas: dict[str, list[Delta]] = {"running": [], "waiting": [], "late": []}
    requests = {name: request([1] * 3, 9) for name in deltas}
    engine.submit(requests["running"], deltas["running"].append)
    engine.submit(requests["waiting"], deltas["waiting"].append)
    engine.step()
    runner.before = lambda: engine.submit(requests["late"], deltas["late"].append)
    with pytest.raises(ArithmeticError, match="inside the model") as caught:
        engine.step()
    for name, asked in requests.items():
        assert (asked.finish_reason, asked.error) == ("error", caught.value), name
        assert [delta.finish_reason for delta in deltas[name]].count("error") == 1, name
        assert (deltas[name][-1].finish_reason, deltas[name][-1].error) == ("error", caught.value), name
    runner.before = None
    assert not any(tensor.any() for tensor in (*runner.cache.keys, *runner.cache.values))
    assert not engine.step()
    (done,) = engine.run([request([1] * 3, 5)])
    assert len(done.tokens) == 5


def test_cancelled_before_it_is_submitted() -> None:
    engine, _ = new_engine()
    asked, other = request([1] * 3, 5), request([2] * 3, 5)
    deltas: list[Delta] = []
    engine.cancel(asked)
    engine.submit(asked, deltas.append)
    engine.submit(other)
    while engine.step():
        pass
    assert (asked.finish_reason, other.finish_reason) == ("cancelled", "length")
    assert asked.output == []
    assert [delta.finish_reason for delta in deltas] == ["cancelled"]


@pytest.mark.parametrize(
    ("value", "found"), [(float("inf"), "infinity"), (-float("inf"), "infinity"), (float("nan"), "NaN")]
)
def test_logits_that_are_not_finite_are_an_error(value: float, found: str) -> None:
    engine, runner = new_engine()
    runner.model.output.weight.data[7, 0] = value  # of one piece
    with pytest.raises(NumericalError, match=f"the model produced {found} instead of logits on rank 0"):
        engine.run([request([1] * 3, 5, logprobs=True)])


def test_a_processor_may_forbid_with_minus_infinity() -> None:
    engine, _ = new_engine()

    def only(ids: object, logits: Tensor) -> Tensor:
        logits[:] = -float("inf")
        logits[9] = 0.0
        return logits

    (done,) = engine.run([request([1] * 3, 3, logits_processor=only, logprobs=True, top_logprobs=4)])
    assert done.tokens == (9, 9, 9)
    assert all(-100 < value < 0 for score in done.scores for value in (score.logprob, *(v for _, v in score.top)))


def test_scoring_a_prompt_generates_nothing() -> None:
    engine, runner = new_engine(chunk_size=16)
    (done,) = engine.run([request([3] * 40, 0, echo=True, logprobs=True)])
    assert len(done.scores) == len(done.tokens) == 40
    assert [(batch.width, batch.wanted[0]) for batch in runner.batches] == [(16, 16), (16, 16), (8, 8)]
    (nothing,) = engine.run([request([3] * 40, 0)])
    assert (nothing.tokens, nothing.finish_reason) == ((), "length")
    assert len(runner.batches) == 3


def test_a_loop_sleeps_until_something_comes_and_returns_when_told() -> None:
    engine, runner = new_engine()
    expected = engine.run([request([7] * 8), request([9] * 5)])
    looping = threading.Thread(target=engine.loop, daemon=True)
    looping.start()
    for completion, prompt in zip(expected, ([7] * 8, [9] * 5), strict=True):
        ended = threading.Event()
        asked = request(prompt)
        engine.submit(asked, lambda delta, ended=ended: delta.finish_reason and ended.set())
        assert ended.wait(20)
        assert asked.completion() == completion
    steps = len(runner.batches)
    engine.stop()
    looping.join(20)
    assert not looping.is_alive()
    assert len(runner.batches) == steps
    for _ in range(200):  # whether the loop sleeps by then or is about to look into its inbox
        again = threading.Thread(target=engine.loop, daemon=True)
        again.start()
        engine.stop()
        again.join(20)
        assert not again.is_alive()
    assert engine.run([request([7] * 8)]) == expected[:1]  # a later call is not told to stop


def test_a_loop_that_fails_ends_what_came_and_raises() -> None:
    engine, runner = new_engine()
    runner.model.norm.weight.data.fill_(float("nan"))
    first, second = request([7] * 8), request([9] * 5)
    engine.submit(first)
    engine.submit(second)
    engine.stop()
    engine.submit(request([5] * 5))
    with pytest.raises(NumericalError, match="NaN"):
        engine.loop()
    assert (first.finish_reason, second.finish_reason) == ("error", "error")
