"""What an evaluation found, as a table and as JSON.

It knows nothing of how it was found.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from codellama.evaluation.journal import Key
from codellama.evaluation.pass_at_k import PUBLISHED, Estimate, estimate
from codellama.evaluation.settings import Settings


@dataclass(frozen=True)
class Summary:
    """The scores of a run.

    Attributes:
        settings: what was asked for.
        n_problems: how many problems there were.
        passed: for each problem, how many of its samples passed; None where some were not executed.
        reasons: how often programs ended in which way.
        n_cut: samples that were cut off at the end of max_gen_len or of the context.
    """

    settings: Settings
    n_problems: int
    passed: list[int] | None
    reasons: dict[str, int]
    n_cut: int

    @property
    def estimates(self) -> dict[int, Estimate]:
        """pass@k, by k; empty where programs were not executed."""
        if self.passed is None:
            return {}
        return {k: estimate(self.settings.n, self.passed, k) for k in self.settings.ks}

    def published(self, k: int) -> float | None:
        """Say what share the paper has for the model that the settings name, where it has one for such samples."""
        if self.settings.model is None or self.settings.variant is None or k != 1 or not self.settings.is_greedy:
            return None
        percent = PUBLISHED[self.settings.model, self.settings.variant].get(self.settings.task)
        return None if percent is None else percent / 100

    def describe(self) -> dict[str, Any]:
        """List everything, for a program to read."""
        return {
            "task": self.settings.task,
            "problems": self.n_problems,
            "samples_per_problem": self.settings.n,
            "temperature": self.settings.temperature,
            "pass_at_k": {
                str(k): {"value": e.value, "low": e.low, "high": e.high, "published": self.published(k)}
                for k, e in self.estimates.items()
            },
            "passed_per_problem": self.passed,
            "reasons": self.reasons,
            "cut": self.n_cut,
        }

    def format(self) -> str:
        """Write it for a person."""
        settings, n_samples = self.settings, self.n_problems * self.settings.n
        drawn = "greedy" if settings.is_greedy else f"temperature {settings.temperature:g}, top_p {settings.top_p:g}"
        lines = [f"{settings.task}: {_count(self.n_problems, 'problem')}, {_count(settings.n, 'sample')} each, {drawn}"]
        if self.passed is None:
            lines += [
                "not executed: --allow_code_execution runs the generated programs, in a sandbox, and gives the score"
            ]
        else:
            named = settings.model is not None
            paper = f"paper, {settings.model} {settings.variant}" if named else ""
            lines.append(f"{'':10}{'this run':>9}   {'95 % interval':>14}   {paper}".rstrip())
            for k, e in self.estimates.items():
                published = self.published(k)
                theirs = "" if not named else "-" if published is None else _percent(published)
                interval = f"{100 * e.low:.1f} to {100 * e.high:.1f}"
                lines.append(
                    f"{f'pass@{k}':10}{_percent(e.value):>9}   {interval:>14}   {theirs:>{len(paper)}}".rstrip()
                )
            lines.append(", ".join(f"{count} {reason}" for reason, count in self.reasons.items()))
        if self.n_cut:
            lines.append(
                f"{self.n_cut} of {_count(n_samples, 'sample')} reached max_gen_len ({settings.max_gen_len}) or the "
                f"end of the context ({settings.max_seq_len})"
            )
        return "\n".join(lines)


def summarize(
    settings: Settings,
    ids: Sequence[str | int],
    samples: dict[Key, dict[str, Any]],
    results: dict[Key, dict[str, Any]],
) -> Summary:
    """Count what a run has; samples and results of other problems, or beyond n, do not count."""
    wanted = [[(id, index) for index in range(settings.n)] for id in ids]
    keys = [key for row in wanted for key in row]
    whole = all(key in results for key in keys)
    return Summary(
        settings,
        len(ids),
        [sum(results[key]["passed"] for key in row) for row in wanted] if whole else None,
        dict(Counter(results[key]["reason"] for key in keys if key in results).most_common()),
        sum(samples[key]["finish_reason"] == "length" for key in keys),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
