"""Sampling against distributions that are enumerated token by token, in float64, from the definitions."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from codellama.config import SamplingParams
from codellama.generation.sampling import adjust, draw_batch, penalize, penalize_generated, sample, score

DRAWS = 20_000
ALMOST_1 = 0.9999999999999999  # the largest number below 1


def exact(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Temperature, top_k, top_p, min_p: one token at a time."""
    top = max(logits)
    weights = [math.exp((logit - top) / params.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda id: -weights[id])
    kept = order[: params.top_k]
    mass, nucleus = 0.0, []
    for id in kept:
        if params.top_p < 1 and mass >= params.top_p * sum(weights[id] for id in kept):
            break
        nucleus.append(id)
        mass += weights[id]
    nucleus = [id for id in nucleus if weights[id] >= params.min_p * weights[order[0]]]
    total = sum(weights[id] for id in nucleus)
    return [weights[id] / total if id in nucleus else 0.0 for id in range(len(logits))]


def random_logits(count: int, seed: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, params: SamplingParams, uniform: float, ids: Sequence[int] = (0,)) -> int:
    token = sample(logits, params, uniform, ids)
    assert token.shape == ()
    assert token.dtype == torch.int64
    return int(token)


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_k": 100},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.05},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 2.0, "min_p": 1.0},
    {"temperature": 2.0, "top_k": 7, "top_p": 0.8},
    {"temperature": 3.0, "top_k": 9, "top_p": 0.95, "min_p": 0.3},
]


@pytest.mark.parametrize("given", [CASES[1], CASES[3], CASES[5], CASES[8], CASES[11]], ids=str)
def test_frequencies(given: dict[str, float]) -> None:
    """20,000 draws of 12 tokens: each frequency within 5 standard deviations, 5 · sqrt(p(1-p)/20000), of its share."""
    params = SamplingParams(**given)  # type: ignore[arg-type]
    logits = random_logits(12, seed=1)
    expected = exact(logits.tolist(), params)
    rng = random.Random(2)
    counts = Counter(draw(logits, params, rng.random()) for _ in range(DRAWS))
    for id, share in enumerate(expected):
        bound = 5 * math.sqrt(share * (1 - share) / DRAWS)
        assert abs(counts[id] / DRAWS - share) <= bound + 1e-12, (id, counts[id] / DRAWS, share)


@pytest.mark.parametrize("given", CASES, ids=str)
def test_the_inverse_of_the_cumulative_distribution(given: dict[str, float]) -> None:
    """An even grid of 500 uniforms finds each token's share to within 2 grid steps: no luck in it."""
    params = SamplingParams(**given)  # type: ignore[arg-type]
    for seed in range(5):
        logits = random_logits(20, seed)
        expected = exact(logits.tolist(), params)
        drawn = [draw(logits, params, (step + 0.5) / 500) for step in range(500)]
        assert drawn == sorted(drawn), "in the order of ids"
        counts = Counter(drawn)
        assert [id for id in counts if expected[id] == 0] == []
        assert [id for id, share in enumerate(expected) if abs(counts[id] / 500 - share) > 2 / 500] == []


@pytest.mark.parametrize("top_p", [0.1005, 0.2565, 0.3005, 0.7505, 0.9995])
def test_top_p_of_a_flat_distribution(top_p: float) -> None:
    """1,000 equal tokens: below and above the 256 candidates that are looked at first."""
    params = SamplingParams(temperature=1.0, top_p=top_p)
    logits = torch.zeros(1000)
    kept = {draw(logits, params, (step + 0.5) / 1000) for step in range(1000)}
    assert len(kept) == math.ceil(top_p * 1000)


@pytest.mark.parametrize(("count", "top_p", "kept"), [(4, 0.5, 2), (4, 0.25, 1), (4, 0.75, 3), (1024, 0.5, 512)])
def test_top_p_that_is_reached_exactly(count: int, top_p: float, kept: int) -> None:
    params = SamplingParams(temperature=1.0, top_p=top_p)
    assert len({draw(torch.zeros(count), params, (step + 0.5) / count) for step in range(count)}) == kept


def test_top_p_beyond_the_candidates_keeps_the_most_probable() -> None:
    """Probabilities fall slowly: the nucleus of 0.9 holds 671 of 1,000 tokens, shuffled over the ids."""
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(3))
    logits = torch.empty(1000)
    logits[order] = -torch.arange(1000) / 300
    params = SamplingParams(temperature=1.0, top_p=0.9)
    expected = exact(logits.tolist(), params)
    kept = [id for id, share in enumerate(expected) if share > 0]
    assert 256 < len(kept) < 1000
    drawn = Counter(draw(logits, params, (step + 0.5) / 8000) for step in range(8000))
    assert sorted(drawn) == kept
    assert max(abs(drawn[id] / 8000 - expected[id]) for id in kept) <= 2 / 8000


@pytest.mark.parametrize("given", CASES, ids=str)
def test_the_ends_of_the_unit_interval_give_kept_tokens(given: dict[str, float]) -> None:
    """The first and the last token kept, but for a few of 1e-12 in all."""
    params = SamplingParams(**given)  # type: ignore[arg-type]
    for seed in range(20):
        logits = random_logits(50, seed)
        expected = exact(logits.tolist(), params)
        for uniform in (0.0, 5e-324, 1e-17):
            first = draw(logits, params, uniform)
            assert expected[first] > 0
            assert sum(expected[:first]) < 1e-12
        for uniform in (ALMOST_1, 1 - 2**-52):
            last = draw(logits, params, uniform)
            assert expected[last] > 0
            assert sum(expected[last + 1 :]) < 1e-12


def test_tokens_of_no_probability_are_never_drawn() -> None:
    """-inf at both ends and in the middle, as a grammar writes it."""
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    params = SamplingParams(temperature=1.0)
    drawn = [draw(logits, params, uniform) for uniform in (0.0, 0.25, 0.49, 0.5, 0.75, ALMOST_1)]
    assert drawn == [1, 1, 1, 3, 3, 3]


@pytest.mark.parametrize(
    "given", [{}, {"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.0}, {"temperature": 9.0, "top_k": 1}]
)
def test_greedy(given: dict[str, float]) -> None:
    params = SamplingParams(**given)  # type: ignore[arg-type]
    for seed in range(20):
        logits = random_logits(40, seed)
        best = max(range(40), key=logits.tolist().__getitem__)
        assert {draw(logits, params, uniform) for uniform in (0.0, 0.5, ALMOST_1)} == {best}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-50, 5e-324])
def test_a_tiny_temperature_is_greedy_in_the_limit(temperature: float) -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, -2.0])
    params = SamplingParams(temperature=temperature)
    assert [draw(logits, params, uniform) for uniform in (0.0, 0.5, ALMOST_1)] == [1, 1, 1]


def test_a_huge_temperature_is_flat() -> None:
    logits = torch.tensor([0.0, 30.0, 10.0, -20.0])
    params = SamplingParams(temperature=1e30)
    assert [draw(logits, params, (step + 0.5) / 8) for step in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_equal_inputs_give_equal_tokens() -> None:
    logits = random_logits(5000, seed=4)
    for given in CASES:
        params = SamplingParams(**given)  # type: ignore[arg-type]
        for uniform in (0.1, 0.6, 0.99):
            assert draw(logits, params, uniform) == draw(logits.clone(), params, uniform)


def test_repetition_penalty_values() -> None:
    logits = torch.tensor([2.0, -2.0, 0.0, 5.0, -1.0])
    assert penalize(logits, 2.0, [0, 1, 2, 0, 0]).tolist() == [1.0, -4.0, 0.0, 5.0, -1.0]
    assert penalize(logits, 0.5, [4, 3]).tolist() == [2.0, -2.0, 0.0, 10.0, -0.5]
    assert logits.tolist() == [2.0, -2.0, 0.0, 5.0, -1.0]


def test_repetition_penalty_comes_before_the_choice() -> None:
    logits = torch.tensor([2.0, 1.5, 0.0])
    assert draw(logits, SamplingParams(repetition_penalty=1.2), 0.5, [0]) == 0
    assert draw(logits, SamplingParams(repetition_penalty=1.5), 0.5, [0]) == 1
    params = SamplingParams(temperature=1.0, repetition_penalty=4.0)
    expected = exact([0.5, 1.5, 0.0], SamplingParams(temperature=1.0))
    counts = Counter(draw(logits, params, (step + 0.5) / 500, [0, 0]) for step in range(500))
    assert max(abs(counts[id] / 500 - share) for id, share in enumerate(expected)) <= 2 / 500


def test_a_repetition_penalty_beyond_float32() -> None:
    """It bans a negative logit and cannot change a logit of 0."""
    params = SamplingParams(repetition_penalty=1e300)
    assert draw(torch.tensor([-1.0, -2.0, -3.0]), params, 0.5, [0, 1]) == 2
    assert draw(torch.tensor([0.0, 3.0, -1.0]), params, 0.5, [0, 2]) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_are_not_modified(temperature: float) -> None:
    logits = random_logits(300, seed=5)
    before = logits.clone()

    def processor(ids: Sequence[int], given: Tensor) -> Tensor:
        return given.fill_(-1.0)

    params = SamplingParams(
        temperature=temperature, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.5, logits_processor=processor
    )
    draw(logits, params, 0.5, [3, 7])
    assert torch.equal(logits, before)


def test_logits_processor_comes_first_and_sees_the_ids() -> None:
    seen = []

    def processor(ids: Sequence[int], given: Tensor) -> Tensor:
        seen.append((list(ids), given.tolist()))
        return torch.tensor([0, 8, 6], dtype=torch.int64)

    params = SamplingParams(logits_processor=processor, repetition_penalty=2.0)
    assert draw(torch.tensor([9.0, 0.0, 0.0]), params, 0.5, [1, 1]) == 2, "8 of token 1 became 4"
    assert seen == [([1, 1], [9.0, 0.0, 0.0])]


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, -1.25), (2.0, 0.5)])
def test_penalties_of_what_was_generated(presence: float, frequency: float) -> None:
    """Each logit by the definition, and nothing else; the prompt does not count."""
    logits = random_logits(50, seed=8)
    counts = {3: 1, 49: 6, 0: 2}
    expected = [
        value - (presence + frequency * counts[id] if id in counts else 0) for id, value in enumerate(logits.tolist())
    ]
    before = logits.clone()
    assert penalize_generated(logits, presence, frequency, counts).tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(logits, before)
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    assert int(sample(logits, params, 0.5, [1, 2, 3], counts)) == max(range(50), key=lambda id: expected[id])


def test_the_order_of_what_changes_logits() -> None:
    """The penalties multiply before they subtract, then comes the bias, and the grammar has the last word."""
    logits = torch.tensor([2.0, 1.9, 1.0, 0.0])
    params: dict[str, Any] = {"repetition_penalty": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    # 0: 2/2 - 0.5 - 2·0.25 = 0; 1: 1.9; 2: 1; 3: 0
    assert int(sample(logits, SamplingParams(**params), 0.5, [0], {0: 2})) == 1
    for bias, expected in ((1.89, 1), (1.91, 0)):
        biased = SamplingParams(**params, logit_bias={0: bias})
        assert int(sample(logits, biased, 0.5, [0], {0: 2})) == expected
    biased = SamplingParams(**params, logit_bias={1: 100, 0: -100})
    for temperature in (0.0, 1.0):
        chosen = replace(biased, temperature=temperature)
        assert int(sample(logits, chosen, 1 - 1e-9, [0], {0: 2}, bytearray([1, 0, 0, 0]))) == 0


def test_a_masked_distribution_is_the_rest_in_proportion() -> None:
    params = SamplingParams(temperature=1.0)
    logits = random_logits(12, seed=9)
    allowed = bytearray(id % 3 == 1 for id in range(12))
    weights = [math.exp(value) * allowed[id] for id, value in enumerate(logits.tolist())]
    rng = random.Random(3)
    counts = Counter(int(sample(logits, params, rng.random(), [], None, allowed)) for _ in range(DRAWS))
    assert counts.keys() == {1, 4, 7, 10}
    for id, weight in enumerate(weights):
        share = weight / sum(weights)
        assert counts[id] / DRAWS == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / DRAWS))


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (torch.zeros(4), r"\[4\]"),
        (torch.zeros(1, 3), r"\[1, 3\]"),
        (torch.tensor(0.0), r"\[\]"),
        ([0.0, 0.0, 0.0], "list"),
        (None, "NoneType"),
    ],
)
def test_a_logits_processor_that_returns_something_else(returned: object, found: str) -> None:
    params = SamplingParams(logits_processor=lambda ids, logits: returned)
    with pytest.raises(ValueError, match=rf"logits_processor returned {found}; a tensor of \[3\] was expected"):
        sample(torch.zeros(3), params, 0.5, [0])


@pytest.mark.parametrize("value", [-math.inf, math.nan])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logits_processor_that_allows_nothing(value: float, temperature: float) -> None:
    """A token that it excluded must not come back as if it had been chosen."""
    params = SamplingParams(temperature=temperature, logits_processor=lambda ids, logits: torch.full((3,), value))
    with pytest.raises(ValueError, match="logits_processor"):
        sample(torch.zeros(3), params, 0.5, [0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logits_processor_that_forces_a_token(temperature: float) -> None:
    params = SamplingParams(
        temperature=temperature, logits_processor=lambda ids, logits: logits.index_fill(0, torch.tensor([1]), math.inf)
    )
    assert [draw(torch.zeros(4), params, uniform) for uniform in (0.0, 0.5, ALMOST_1)] == [1, 1, 1]


def test_scores_are_log_softmax() -> None:
    logits = random_logits(5 * 100, seed=6).view(5, 100)
    ids = [0, 99, 17, 17, 50]
    expected = torch.log_softmax(logits.double(), dim=-1)
    scores = score(logits, ids, 0)
    for row, (id, found) in enumerate(zip(ids, scores, strict=True)):
        assert found.logprob == pytest.approx(expected[row, id].item(), abs=1e-5)
        assert found.top == ()


@pytest.mark.parametrize(("top", "length"), [(1, 1), (5, 5), (100, 100), (101, 100)])
def test_top_lists(top: int, length: int) -> None:
    logits = random_logits(2 * 100, seed=7).view(2, 100)
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, found in enumerate(score(logits, [3, 4], top)):
        order = sorted(range(100), key=lambda id: -expected[row, id].item())
        assert [id for id, _ in found.top] == order[:length]
        assert [value for _, value in found.top] == pytest.approx(expected[row, order[:length]].tolist(), abs=1e-5)
        assert found.logprob == pytest.approx(expected[row, 3 + row].item(), abs=1e-5)


def test_scores_do_not_overflow() -> None:
    assert score(torch.tensor([[1e4, 0.0]]), [1], 0)[0].logprob == pytest.approx(-1e4)


def wishes(rng: random.Random) -> SamplingParams:
    """Any mix of parameters that are drawn together."""
    return SamplingParams(
        temperature=rng.choice([0.0, 0.2, 1.0, 3.0]),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.3, 0.0]),
        top_k=rng.choice([None, None, 1, 5, 300]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.5]),
        logit_bias=rng.choice([(), ((3, 4.0), (7, -100.0))]),
        logprobs=rng.random() < 0.5,
        top_logprobs=rng.choice([0, 2, 5]),
    )


@pytest.mark.parametrize("spread", [0.1, 2.0, 9.0])  # the first needs more than the candidates for top_p
def test_rows_that_are_drawn_together_are_those_drawn_alone(spread: float) -> None:
    """Bit by bit: 40 batches of 1 to 9 rows of 700 logits, each row with parameters of its own."""
    rng = random.Random(4)
    for seed in range(40):
        count = rng.randint(1, 9)
        logits = random_logits(count * 700, seed, spread).view(count, 700)
        params = [wishes(rng) for _ in range(count)]
        uniforms = [rng.random() for _ in range(count)]
        ids = [[rng.randrange(700) for _ in range(20)] for _ in range(count)]
        counts = [Counter(row[10:]) for row in ids]
        alone = [sample(*row) for row in zip(logits, params, uniforms, ids, counts, strict=True)]
        changed = [
            adjust(row, wish, seq, set(seq), n) for row, wish, seq, n in zip(logits, params, ids, counts, strict=True)
        ]
        given = torch.stack([row if new is None else new for row, new in zip(logits, changed, strict=True)])
        together = draw_batch(given, params, uniforms)
        assert together.tolist() == [int(token) for token in alone]
