"""All figures of a CPU: runs the benchmarks, writes the page of this kind of machine, and draws its plots.

python -m benchmarks.cpu
python -m benchmarks.cpu --llama_cpp_python other/bin/python --only peers,rows
python -m benchmarks.cpu --shape tiny --output page.md --plots False

The page is `benchmarks/results/cpu-…md`, named by what the CPU can do. With --only, the other sections stay as they
are.
"""

from collections.abc import Sequence
from pathlib import Path

import fire

from benchmarks.machine import can_quantize, chosen_words, cpu_features
from benchmarks.pages import ROOT, Run, merged, read_lines, run_all, write_page


def runs(
    shape: str, small: str, long: int, longest: int, rounds: int, llama_cpp_python: str | None
) -> dict[str, list[Run]]:
    """Everything there is, by the word that --only takes.

    Args:
        shape: of the model that is compared with others.
        small: of the model whose speed is shown against rows and context, which takes many runs.
        long: the longest context of that one; three shorter ones go before it.
        longest: the longest prompt, of a tiny model.
    """
    peer = {} if llama_cpp_python is None else {"llama_cpp_python": llama_cpp_python}
    kinds = [None, *(["int8", "int4"] if can_quantize() else [])]
    contexts = [max(1, long // parts) for parts in (64, 16, 4, 1)]

    def of_each(title: str, module: str, **flags: object) -> list[Run]:
        return [
            Run(title + (f", {kind}" if kind else ""), module, {**flags, **({"quantize": kind} if kind else {})})
            for kind in kinds
        ]

    return {
        "peers": [Run("Peers", "peers", {"shape": shape, "rounds": rounds, **peer})],
        "rows": of_each("Decode by rows", "decode", shape=small, batches=[1, 2, 4, 8, 16], rounds=rounds),
        "context": of_each("Decode by context", "decode", shape=small, batches=[1], contexts=contexts, rounds=rounds),
        "prefill": of_each("Prefill by length", "prefill", shape=small, prompts=contexts, repeats=min(2, rounds)),
        "long": [Run("Long prompts", "parts", {"prompts": [*contexts[-2:], longest], "rounds": 1})],
        "start": [Run("Start", "start")],
    }


def cpu(
    shape: str = "953m",
    small: str = "207m",
    long: int = 8192,
    longest: int = 100_000,
    rounds: int = 5,
    only: str | Sequence[str] | None = None,
    llama_cpp_python: str | None = None,
    output: str | None = None,
    plots: bool = True,
) -> None:
    """Measure, write the page, draw the plots; ends with status 1 where a benchmark failed."""
    known = runs(shape, small, long, longest, rounds, llama_cpp_python)
    wanted = chosen_words("only", only, known)
    name = "-".join(["cpu", *cpu_features()])
    page = Path(output) if output else ROOT / "benchmarks/results" / f"{name}.md"
    found = run_all(run for word in wanted for run in known[word])
    write_page(page, name, merged(read_lines(page) if page.exists() else [], found), {})
    print(f"\nwritten: {page}")
    if plots:
        from benchmarks.plots import draw

        draw(page, ROOT / "docs/images")
    if failed := [line["title"] for line in found if "failed" in line]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    fire.Fire(cpu)
