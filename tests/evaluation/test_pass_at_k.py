"""pass@k against all choices of samples; intervals against what they promise."""

import random
from fractions import Fraction
from itertools import combinations
from math import prod

import pytest

from codellama.evaluation.pass_at_k import MODELS, PUBLISHED, VARIANTS, bootstrap, estimate, pass_at_k, wilson


def test_pass_at_k_is_the_share_of_all_choices() -> None:
    for n in range(1, 9):
        for passed in range(n + 1):
            for k in range(1, n + 1):
                choices = list(combinations([True] * passed + [False] * (n - passed), k))
                assert pass_at_k(n, passed, k) == float(Fraction(sum(map(any, choices)), len(choices)))


@pytest.mark.parametrize(("n", "passed", "k"), [(200, 1, 1), (200, 7, 100), (2000, 3, 100), (100_000, 2, 1)])
def test_large_numbers_lose_nothing(n: int, passed: int, k: int) -> None:
    """Against the product of the paper's own code, in exact fractions."""
    none_passes = prod((1 - Fraction(k, i) for i in range(n - passed + 1, n + 1)), start=Fraction(1))
    assert pass_at_k(n, passed, k) == float(1 - none_passes)


def test_it_has_no_bias() -> None:
    """Mean over many draws of 10 samples: the chance that one of 3 passes. (1 - (1 - c/n)^k is 0.04 too low here.)"""
    chance, draws = random.Random(1), 20_000
    mean = sum(pass_at_k(10, sum(chance.random() < 0.2 for _ in range(10)), 3) for _ in range(draws)) / draws
    assert mean == pytest.approx(1 - 0.8**3, abs=0.006)


def test_wilson() -> None:
    """10 of 50 and 0 of 20, worked out with a table's 1.96."""
    assert wilson(10, 50) == pytest.approx((0.1124, 0.3304), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    low, high = wilson(20, 20)
    assert (low, high) == pytest.approx((1 - 0.1611, 1.0), abs=1e-4)
    assert high <= 1


def test_wilson_holds_the_share_as_often_as_it_says() -> None:
    chance, held = random.Random(2), 0
    for _ in range(4000):
        low, high = wilson(sum(chance.random() < 0.3 for _ in range(164)), 164)
        held += low <= 0.3 <= high
    assert held / 4000 == pytest.approx(0.95, abs=0.012)


def test_bootstrap_is_as_wide_as_the_normal_interval_of_many_problems() -> None:
    chance = random.Random(3)
    scores = [chance.random() for _ in range(500)]
    mean = sum(scores) / 500
    deviation = (sum((score - mean) ** 2 for score in scores) / 500) ** 0.5
    low, high = bootstrap(scores)
    assert (high - low) / 2 == pytest.approx(1.96 * deviation / 500**0.5, rel=0.05)
    assert (low + high) / 2 == pytest.approx(mean, abs=0.003)
    assert bootstrap(scores) == (low, high)


def test_estimate() -> None:
    one = estimate(1, [1, 0, 1, 1], 1)
    assert one.value == 0.75
    assert (one.low, one.high) == wilson(3, 4)
    many = estimate(4, [0, 1, 4], 2)
    assert many.value == pytest.approx((0 + 0.5 + 1) / 3)
    assert 0 <= many.low < many.value < many.high <= 1
    none = estimate(10, [0] * 20, 5)
    assert (none.value, none.low, none.high) == (0, *wilson(0, 20))


def test_every_published_model_has_its_figures() -> None:
    assert set(PUBLISHED) == {(model, variant) for model in MODELS for variant in VARIANTS}
    assert all(0 < figure < 100 for figures in PUBLISHED.values() for figure in figures.values())
    assert {frozenset(figures) for figures in PUBLISHED.values()} == {frozenset({"humaneval", "mbpp"})}
