"""Ids that are read one step late: the same answers as at once, and the host waits for no step that nobody needs."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codellama import Llama
from codellama.cache import KVCache
from codellama.config import Grammar, ModelArgs, RuntimeArgs, SamplingParams
from codellama.errors import NumericalError
from codellama.generation.batch import LAST_DRAWN, Batch
from codellama.generation.engine import Engine
from codellama.generation.generated_text import GeneratedText
from codellama.generation.grammar import Grammars
from codellama.generation.request import Completion, Delta, Request
from codellama.generation.runner import Runner
from codellama.generation.scheduler import Scheduler
from codellama.model import Transformer
from codellama.parallel import Parallel
from codellama.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.distributed import run_ranks

ARGS = ModelArgs(
    dim=24, n_layers=2, n_heads=6, n_kv_heads=3, vocab_size=tiny.VOCAB, multiple_of=32, rope_theta=10_000.0
)
MAX_SEQ_LEN = 64
CPU = torch.device("cpu")


def prefer_even(ids: Sequence[int], logits: Tensor) -> Tensor:
    logits[::2] += len(ids) % 3
    return logits


PARAMS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.9, "top_p": 0.9, "logprobs": True},
    {"temperature": 1.5, "top_k": 8, "logprobs": True, "top_logprobs": 3},
    {"temperature": 0.7, "repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "logprobs": True, "top_logprobs": 1},
    {"echo": True, "logprobs": True, "temperature": 1.0},
    {"logits_processor": prefer_even},
    {"temperature": 2.0, "stop": ("e", "th")},
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny.whole_model(ARGS, tiny.random_weights(ARGS))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Recorder(Runner):
    """Keeps the batches, and says when one begins."""

    events: list[str]
    batches: list[Batch]

    def run(self, batch: Batch) -> Iterator[Tensor]:
        self.batches.append(batch)
        self.events.append(f"step {len(self.batches)}")
        return super().run(batch)


def new_engine(model: Transformer, late: bool | None, rows: int = 3, chunk_size: int = 16) -> tuple[Engine, Recorder]:
    cache = KVCache.allocate(ARGS, rows=rows, max_seq_len=MAX_SEQ_LEN, dtype=torch.float32, device=CPU)
    runner = Recorder(model, cache, CPU)
    runner.events, runner.batches = [], []
    runtime = RuntimeArgs(max_seq_len=MAX_SEQ_LEN, max_batch_size=rows, chunk_size=chunk_size)
    return Engine(runner, Scheduler(runtime), Parallel(), late), runner


def request(prompt: list[int], n: int = 6, text: GeneratedText | None = None, **options: Any) -> Request:
    return Request(prompt, SamplingParams(max_gen_len=n, **options), 3, ARGS.vocab_size, MAX_SEQ_LEN, text)


def load(model: Transformer, tokenizer: Tokenizer, seed: int, late: bool) -> tuple[list[Completion], list[Any], int]:
    """A random load: what each request got, whole and in deltas, and how many rows decoded before an id was read."""
    rng = random.Random(seed)
    engine, runner = new_engine(model, late, rows=rng.randrange(1, 5), chunk_size=rng.randrange(2, 20))
    requests: list[Request] = []
    deltas: list[list[Delta]] = []
    for _ in range(rng.randrange(3, 9)):
        options = rng.choice(PARAMS)
        begin = rng.choice(requests).prompt[:20] if requests and rng.random() < 0.5 else []
        prompt = [*begin, *(rng.randrange(ARGS.vocab_size) for _ in range(rng.choice((1, 4, 19))))]
        text = GeneratedText(tokenizer, options.get("stop", ()))
        asked = request(prompt, rng.choice((0, 1, 2, 12)), text, stop_tokens=frozenset(range(40, 70)), **options)
        requests.append(asked)
        deltas.append([])
        engine.submit(asked, deltas[-1].append)
        for _ in range(rng.choice((0, 0, 2, 5))):
            engine.step()
    while engine.step():
        pass
    joined = [
        (
            "".join(delta.text for delta in handed),
            [token for delta in handed for token in delta.tokens],
            [score for delta in handed for score in delta.scores],
        )
        for handed in deltas
    ]
    blind = sum(LAST_DRAWN in tokens for batch in runner.batches for tokens in batch.tokens)
    assert not engine._scheduler.busy
    return [asked.completion() for asked in requests], joined, blind


def test_any_load_is_answered_as_at_once(model: Transformer, tokenizer: Tokenizer) -> None:
    """Rows that run beside others may differ in the last bits of a score, so scores have a tolerance."""
    reasons, blind = {"stop": 0, "length": 0}, 0
    for seed in range(40):
        expected, expected_deltas, none = load(model, tokenizer, seed, late=False)
        found, deltas, some = load(model, tokenizer, seed, late=True)
        assert none == 0
        blind += some
        for one, other, handed, others in zip(expected, found, expected_deltas, deltas, strict=True):
            assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
            assert [handed[:2], others[:2]] == [(one.text, list(one.tokens))] * 2
            scores = [score.logprob for score in other.scores]
            assert scores == pytest.approx([score.logprob for score in one.scores], abs=1e-4)
            assert [score.logprob for score in others[2]] == scores
            assert [len(score.top) for score in one.scores] == [len(score.top) for score in other.scores]
            reasons[one.finish_reason] += 1
    assert min(reasons.values()) > 20, reasons
    assert blind > 200, "most steps begin before the ids of the last one are read"


def test_a_step_begins_before_the_last_one_is_handed_out(model: Transformer) -> None:
    for late, order in (
        (False, ["step 1", "1", "step 2", "2", "step 3", "3"]),
        (True, ["step 1", "step 2", "1", "step 3", "2", "3"]),
    ):
        engine, runner = new_engine(model, late)
        asked = request([1, 2, 3], 3)
        engine.submit(asked, lambda delta, runner=runner, asked=asked: runner.events.append(f"{len(asked.output)}"))
        while engine.step():
            pass
        assert runner.events == order


def test_on_a_cpu_ids_are_read_at_once(model: Transformer) -> None:
    engine, runner = new_engine(model, late=None)
    engine.run([request([1, 2, 3], 4)])
    assert [batch.tokens[0][0] == LAST_DRAWN for batch in runner.batches] == [False] * 4
    assert not any(batch.shared for batch in runner.batches)


def test_what_was_drawn_behind_the_end_is_dropped(model: Transformer) -> None:
    """A stop token costs one step of its row, a length none; the row is used again at once, with its own ids."""
    engine, _ = new_engine(model, late=False, rows=1)
    whole, after = engine.run([request([5, 6, 7], 8), request([9, 4], 5)])
    stop = whole.tokens[3]
    first = whole.tokens.index(stop)
    for late, steps in ((False, first + 1 + 5), (True, first + 2 + 5)):
        engine, runner = new_engine(model, late, rows=1)
        found, following = engine.run([request([5, 6, 7], 8, stop_tokens=frozenset({stop})), request([9, 4], 5)])
        assert (found.tokens, found.finish_reason) == (whole.tokens[:first], "stop")
        assert following.tokens == after.tokens
        assert len(runner.batches) == steps
    engine, runner = new_engine(model, late=True, rows=1)
    engine.run([request([5, 6, 7], 8)])
    assert len(runner.batches) == 8, "the host knows the length beforehand"


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": prefer_even},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.3},
        {"frequency_penalty": 0.3},
        {"grammar": Grammar.regex("[0-9]{4}")},
    ],
)
def test_where_the_host_needs_an_id_it_reads_it_first(
    model: Transformer, tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    """And reads late again when the request that needed it is gone."""
    engine, runner = new_engine(model, late=True)
    needing, other = request([1, 2, 3], 3, **options), request([4, 5, 6], 9)
    if needing.params.grammar is not None:
        pytest.importorskip("llguidance", reason="the extra [grammar]")
        needing.matcher = Grammars(tokenizer, ARGS.vocab_size).matcher(needing.params.grammar)
    engine.run([needing, other])
    blind = [
        [asked is needing for asked, tokens in zip(batch.requests, batch.tokens, strict=True) if LAST_DRAWN in tokens]
        for batch in runner.batches
    ]
    assert blind == [[], [], [], [], *[[False]] * 5]
    assert len(needing.output) == 3


def test_a_cancelled_request_gets_nothing_more(model: Transformer) -> None:
    engine, _ = new_engine(model, late=True)
    asked, other = request([1, 2, 3], 20), request([4, 5, 6], 9)
    deltas: list[Delta] = []
    engine.submit(asked, deltas.append)
    engine.submit(other)
    for _ in range(6):
        engine.step()
    engine.cancel(asked)
    n = len(asked.output)
    while engine.step():
        pass
    assert (len(asked.output), deltas[-1].finish_reason, other.finish_reason) == (n, "cancelled", "length")
    assert 0 < n < 6


def test_a_stream_that_is_closed_early_leaves_nothing(model: Transformer) -> None:
    engine, runner = new_engine(model, late=True)
    asked = request([1, 2, 3], 20)
    stream = engine.stream(asked)
    next(stream)
    stream.close()
    assert asked.finish_reason == "cancelled"
    ran = len(runner.batches)
    while engine.step():
        pass
    assert (len(runner.batches), engine.load()) == (ran, (0, 0))
    (done,) = engine.run([request([9, 4], 5)])
    assert done == new_engine(model, late=False)[0].run([request([9, 4], 5)])[0]


def test_numbers_that_are_none_are_found_late_and_end_all(model: Transformer) -> None:
    engine, runner = new_engine(tiny.whole_model(ARGS, tiny.random_weights(ARGS)), late=True)
    first, second = request([1, 2, 3], 20), request([4, 5], 20)
    engine.submit(first)
    engine.submit(second)
    for _ in range(5):
        engine.step()
    runner.model.norm.weight.data.fill_(float("nan"))
    engine.step()
    with pytest.raises(NumericalError, match="NaN instead of logits on rank 0"):
        engine.step()
    assert (first.finish_reason, second.finish_reason) == ("error", "error")
    assert not engine.step()


def answers(folder: Path, late: bool) -> list[Any]:
    """What two ranks answer with an engine of their own over a generator's parts; none but the leader has answers."""
    llama = Llama.build(folder, max_seq_len=64, max_batch_size=3, dtype="float32", device="cpu")
    runtime = RuntimeArgs(max_seq_len=64, max_batch_size=3, chunk_size=8)
    engine = Engine(llama.engine._runner, Scheduler(runtime), llama.parallel, late)
    found: list[Any] = []
    for attempt in range(2):
        if not llama.parallel.is_leader:
            engine.follow()
            continue
        prompts = ([1, 5, 9], [1, 7, *range(30, 50)], [1], [1, 8, 8, 8], [1, 40, 41, 42])
        params = [SamplingParams(max_gen_len=4 + 3 * n, temperature=0.8 * (n % 2)) for n in range(len(prompts))]
        asked = [Request(prompt, wish, attempt, tiny.VOCAB, 64) for prompt, wish in zip(prompts, params, strict=True)]
        found.append([completion.tokens for completion in engine.run(asked)])
    if llama.parallel.is_leader:  # a failure that the leader alone finds must not leave the other rank in a collective
        bad = SamplingParams(max_gen_len=9, logits_processor=lambda ids, logits: logits[:3])
        asked = [
            Request([1, 2], bad, 0, tiny.VOCAB, 64),
            Request([1, 3], SamplingParams(max_gen_len=5), 0, tiny.VOCAB, 64),
        ]
        failed, other = engine.run(asked)
        found.append([failed.finish_reason, other.tokens])
    else:
        engine.follow()
    llama.close()
    return found


def test_two_ranks_draw_alike(tmp_path: Path) -> None:
    """The other rank's device is told what was drawn; it embeds the wrong ids otherwise."""
    tiny.tiny_checkpoint(tmp_path)
    (alone,) = run_ranks(1, answers, tmp_path, False)
    late, follower = run_ranks(2, answers, tmp_path, True)
    assert late == alone
    assert follower == []
