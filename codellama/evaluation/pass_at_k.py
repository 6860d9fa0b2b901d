"""pass@k, how sure it is, and what the paper has: numbers in, numbers out.

It knows nothing of models or files.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

_Z = 1.959963984540054  # 95 % of a normal distribution lie within so many deviations
_RESAMPLES = 2000

MODELS = ("7b", "13b", "34b", "70b")
VARIANTS = ("base", "python", "instruct")
PUBLISHED: dict[tuple[str, str], dict[str, float]] = {
    ("7b", "base"): {"humaneval": 33.5, "mbpp": 41.4},
    ("13b", "base"): {"humaneval": 36.0, "mbpp": 47.0},
    ("34b", "base"): {"humaneval": 48.8, "mbpp": 55.0},
    ("70b", "base"): {"humaneval": 53.0, "mbpp": 62.4},
    ("7b", "instruct"): {"humaneval": 34.8, "mbpp": 44.4},
    ("13b", "instruct"): {"humaneval": 42.7, "mbpp": 49.4},
    ("34b", "instruct"): {"humaneval": 41.5, "mbpp": 57.0},
    ("70b", "instruct"): {"humaneval": 67.8, "mbpp": 62.2},
    ("7b", "python"): {"humaneval": 38.4, "mbpp": 47.6},
    ("13b", "python"): {"humaneval": 43.3, "mbpp": 49.0},
    ("34b", "python"): {"humaneval": 53.7, "mbpp": 56.2},
    ("70b", "python"): {"humaneval": 57.3, "mbpp": 65.6},
}
"""Percent solved by one greedy sample (pass@1), by model and variant. Source: arXiv 2308.12950, table 2."""


@dataclass(frozen=True)
class Estimate:
    """A share from 0 to 1, and the interval that holds it with 95 % confidence, over problems of the same kind."""

    value: float
    low: float
    high: float


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Estimate the chance that at least one of k samples passes, from n samples, without bias.

    It is the share of all choices of k of the n samples that hold a passing one. Integers of any size are exact, so
    nothing is lost where the binomials are large.

    Source: arXiv 2107.03374, section 2.1.
    """
    assert 0 <= passed <= n, f"{passed} of {n} samples"
    assert 1 <= k <= n, f"pass@{k} of {n} samples"
    return (comb(n, k) - comb(n - passed, k)) / comb(n, k)


def estimate(n: int, passed: Sequence[int], k: int) -> Estimate:
    """Estimate pass@k of a benchmark: the mean over its problems, and an interval.

    Args:
        n: samples of each problem.
        passed: for each problem, how many of them passed.
    """
    scores = [pass_at_k(n, count, k) for count in passed]
    value = sum(scores) / len(scores)
    alike = value in (0, 1)  # from which the bootstrap would conclude that there is no doubt
    low, high = wilson(round(sum(scores)), len(scores)) if n == 1 or alike else bootstrap(scores)
    return Estimate(value, low, high)


def wilson(passed: int, total: int) -> tuple[float, float]:
    """Give the 95 % interval of a share of problems that either pass or fail.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the
    American Statistical Association 22 (1927).
    """
    share, weight = passed / total, _Z**2 / total
    middle = (share + weight / 2) / (1 + weight)
    reach = _Z * sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def bootstrap(scores: Sequence[float]) -> tuple[float, float]:
    """Give the 95 % interval of a mean of scores between 0 and 1: percentiles of the means of drawn sets of problems.

    The draws are the same each time.

    Source: B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3.
    """
    chance, total = random.Random(0), len(scores)
    means = sorted(sum(chance.choices(scores, k=total)) / total for _ in range(_RESAMPLES))
    return means[round(0.025 * _RESAMPLES)], means[round(0.975 * _RESAMPLES) - 1]
