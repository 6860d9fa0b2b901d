"""Guesses against a plain search; and that they change no token, whatever else is asked for."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from codellama import Llama
from codellama.cache import KVCache
from codellama.config import ModelArgs, RuntimeArgs, SamplingParams
from codellama.generation.drafting import SIZES, Drafter
from codellama.generation.engine import Engine
from codellama.generation.generated_text import GeneratedText
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
MAX_SEQ_LEN = 96
PARAMS: tuple[dict[str, Any], ...] = (
    {},
    {"logprobs": True, "top_logprobs": 2},
    {"temperature": 0.2, "top_p": 0.9, "logprobs": True},
    {"temperature": 0.3, "top_k": 20},
    {"echo": True, "logprobs": True},
    {"stop": ("e", "th", "ab")},
    {"repetition_penalty": 1.2},
    {"logits_processor": lambda ids, logits: logits.roll(1)},
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """A random one that says few words, and in which the last one counts most, so that it repeats itself."""
    weights = tiny.random_weights(ARGS)
    for name, tensor in weights.items():
        if name.endswith(("wo.weight", "w2.weight")):
            tensor *= 0.2
    weights["output.weight"][14:] *= 0.1
    return tiny.whole_model(ARGS, weights)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def searched(ids: Sequence[int], n: int) -> list[int]:
    """The definition: the last place before the end where the last ids occur, the longest run of them first."""
    for size in SIZES:
        for at in range(len(ids) - 1, size - 1, -1):
            if list(ids[at - size : at]) == list(ids[len(ids) - size :]):
                text = list(ids)
                for index in range(n):
                    text.append(text[at + index])
                return text[len(ids) :]
    return []


def test_what_followed_the_last_time_is_guessed() -> None:
    rng = random.Random(5)
    found = 0
    for _ in range(300):
        ids = [rng.randrange(rng.choice((2, 5, 30))) for _ in range(rng.randrange(1, 60))]
        drafter = Drafter(ids[: rng.randrange(len(ids))])
        while len(drafter) < len(ids):
            drafter.extend(ids[len(drafter) :][: rng.randrange(1, 9)])
        n = rng.randrange(1, 12)
        assert drafter.draft(n) == searched(ids, n)
        found += bool(searched(ids, n))
    assert 60 < found < 240


def new_engine(model: Transformer, rows: int, chunk_size: int, late: bool) -> Engine:
    cpu = torch.device("cpu")
    cache = KVCache.allocate(ARGS, rows=rows, max_seq_len=MAX_SEQ_LEN, dtype=torch.float32, device=cpu)
    runtime = RuntimeArgs(max_seq_len=MAX_SEQ_LEN, max_batch_size=rows, chunk_size=chunk_size)
    return Engine(Runner(model, cache, cpu), Scheduler(runtime), Parallel(), late)


def answered(
    model: Transformer, tokenizer: Tokenizer, seed: int, guess: bool, late: bool
) -> tuple[list[Completion], list[list[Delta]]]:
    """A random load; some of its prompts repeat themselves, and some requests go on from what was answered before."""
    rng = random.Random(seed)
    engine = new_engine(model, rng.randrange(1, 4), rng.randrange(4, 40), late)
    requests: list[Request] = []
    deltas: list[list[Delta]] = []
    for _ in range(rng.randrange(2, 5)):
        options, speculate = rng.choice(PARAMS), rng.choice((1, 3, 8))
        part = [rng.randrange(ARGS.vocab_size) for _ in range(rng.choice((2, 5, 9)))]
        prompt = part * rng.randrange(1, 4)
        for _ in range(rng.choice((1, 1, 2))):
            params = SamplingParams(
                max_gen_len=rng.choice((1, 2, 7, 40)),
                stop_tokens=frozenset({rng.choice((2, 11, 60))}),
                speculate=speculate if guess else 0,
                **options,
            )
            text = GeneratedText(tokenizer, params.stop)
            requests.append(Request(prompt, params, seed + len(requests), ARGS.vocab_size, MAX_SEQ_LEN, text))
            deltas.append([])
            engine.submit(requests[-1], deltas[-1].append)
        for _ in range(rng.choice((0, 0, 4, 9))):
            engine.step()
    while engine.step():
        pass
    assert not engine._scheduler.busy
    for request, handed in zip(requests, deltas, strict=True):
        assert handed[-1].n_steps == request.n_steps
    return [request.completion() for request in requests], deltas


def test_guesses_change_nothing_but_the_number_of_steps(model: Transformer, tokenizer: Tokenizer) -> None:
    tokens, steps, reasons = 0, 0, {"stop": 0, "length": 0}
    for seed in range(30):
        expected, _ = answered(model, tokenizer, seed, guess=False, late=False)
        found, deltas = answered(model, tokenizer, seed, guess=True, late=seed % 2 == 1)
        for one, other, handed in zip(expected, found, deltas, strict=True):
            assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
            assert "".join(delta.text for delta in handed) == one.text
            scores = [score.logprob for score in other.scores]
            assert scores == pytest.approx([score.logprob for score in one.scores], abs=1e-4)
            assert other.n_steps <= one.n_steps
            tokens, steps = tokens + one.n_steps, steps + other.n_steps
            reasons[one.finish_reason] += 1
    assert min(reasons.values()) > 15, reasons
    assert tokens - steps > 100, (tokens, steps)


def test_a_request_that_repeats_itself_takes_few_steps(model: Transformer) -> None:
    """When it has turned in its circle once, all guesses are right."""
    prompt = [5, 6, 7]
    for speculate, most in ((0, 60), (7, 25)):
        engine = new_engine(model, 1, 32, late=False)
        params = SamplingParams(max_gen_len=60, speculate=speculate)
        (done,) = engine.run([Request(prompt, params, 0, ARGS.vocab_size, MAX_SEQ_LEN)])
        assert len(done.tokens) == 60
        assert done.n_steps <= most
        if not speculate:
            assert done.n_steps == 60
            plain = done.tokens
    assert done.tokens == plain


def test_what_was_guessed_wrongly_is_not_reused(model: Transformer) -> None:
    """A row that speculated is given to a prompt that goes on from its answer, and to one that goes on otherwise."""
    engine = new_engine(model, 1, 32, late=False)
    first = Request([5, 6, 7], SamplingParams(max_gen_len=30, speculate=8), 0, ARGS.vocab_size, MAX_SEQ_LEN)
    engine.run([first])
    said = [*first.prompt, *first.output]
    for prompt in ([*said, 9, 8], [*said[:-1], 3, 9, 8], said[:20]):
        params = SamplingParams(max_gen_len=9, speculate=4)
        following = Request(prompt, params, 0, ARGS.vocab_size, MAX_SEQ_LEN)
        engine.run([following])
        assert following.n_reused > 0
        (fresh,) = new_engine(model, 1, 32, late=False).run(
            [Request(prompt, SamplingParams(max_gen_len=9), 0, ARGS.vocab_size, MAX_SEQ_LEN)]
        )
        assert tuple(following.output) == fresh.tokens


def answers(folder: Path, speculate: int) -> Any:
    """What each rank gets from a call, under torchrun or alone."""
    llama = Llama.build(folder, max_seq_len=96, max_batch_size=3, dtype="float32", device="cpu")
    prompts = [[1, 5, 9, 5, 9, 5, 9], [1, 7, 7, 7], [1, 30, 31, 32, 33, 30, 31]]
    found = [
        llama.generate(prompts, 24, temperature=temperature, seed=3, speculate=speculate)[0]
        for temperature in (0.0, 0.3)
    ]
    llama.close()
    return found


def test_two_ranks_judge_alike(tmp_path: Path) -> None:
    tiny.tiny_checkpoint(tmp_path)
    (alone,) = run_ranks(1, answers, tmp_path, 0)
    assert run_ranks(2, answers, tmp_path, 6) == [alone, alone]


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (2.5, TypeError), (True, TypeError), (None, TypeError)])
def test_bad_wishes(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="speculate is"):
        SamplingParams(speculate=value)
