"""Draws a page of results: tokens per second against peers, against rows, against the length of the context.

python -m benchmarks.plots --page benchmarks/results/cpu-avx2.md
python -m benchmarks.plots --page benchmarks/results/cpu-avx2.md --folder pictures --kind png

It reads the lines of JSON in the page; the same lines give the same bytes. It needs matplotlib (extra `bench`), which
no other benchmark does.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from benchmarks.pages import ROOT, read_lines

# Colours of Okabe and Ito, which people with any colour vision can tell apart; shapes differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D")
OF_ENGINE = {"ours": "#0072B2", "transformers": "#E69F00", "llama.cpp": "#009E73"}
STYLE = {
    "svg.hashsalt": "codellama",
    "svg.fonttype": "none",  # text as text: small, and sharp at any size
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}
Line = Mapping[str, Any]


def draw(page: Path, folder: Path, kind: str = "svg") -> list[Path]:
    """Draw what the lines of a page allow; returns the files."""
    lines = [line for line in read_lines(page) if "failed" not in line]
    figures = {"peers": peers, "rows": rows, "context": context}
    written = []
    with mpl.rc_context(STYLE):
        for name, figure_of in figures.items():
            figure = figure_of(lines)
            if figure is not None:
                path = folder / f"{page.stem}-{name}.{kind}"
                metadata = {"Date": None, "Creator": None} if kind == "svg" else {}
                figure.savefig(path, format=kind, metadata=metadata, dpi=100)
                written.append(path)
    return written


def peers(lines: Iterable[Line]) -> Figure | None:
    """Bars of the last comparison: the median of each engine, and a dot for its best run."""
    found = [line for line in lines if line["benchmark"] == "peers"]
    if not found:
        return None
    line, table = found[-1], found[-1]["rows"]
    figure = Figure(figsize=(8, 0.6 + 0.33 * len(table)))
    said = line["arguments"]
    titles = {
        "prefill": f"prefill, {said['prompt']} tokens",
        "decode": f"decode, 1 row, {said['new_tokens']} tokens",
    }
    for axes, (figure_name, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        at = range(len(table), 0, -1)
        values = [row[figure_name] for row in table]
        colours = [colour for row in table for name, colour in OF_ENGINE.items() if row["engine"].startswith(name)]
        axes.barh(at, values, color=colours, height=0.7)
        best = [row[f"{figure_name}_best"] for row in table]
        axes.plot(best, at, "o", color="black", markersize=3)
        for place, value, end in zip(at, values, best, strict=True):
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            axes.annotate(text, (end, place), xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_xlim(right=1.2 * max(best))
        axes.set_yticks(at, [row["engine"] for row in table])
        axes.set_title(title)
        axes.set_xlabel("tokens/s; bar: median, dot: best")
        axes.grid(axis="x", alpha=0.3)
    return figure


def rows(lines: Iterable[Line]) -> Figure | None:
    """Tokens per second against the rows that decode together, one line for each kind of weights."""
    found = list(of_decode(lines, "batch"))
    if not found:
        return None
    figure = Figure(figsize=(5, 3.4))
    axes = figure.subplots()
    for style, (label, table) in enumerate(found):
        curve(axes, [row["batch"] for row in table], [row["tokens_per_s"] for row in table], label, style)
    axes.set_title("decode by rows")
    axes.set_xlabel("rows that decode together")
    axes.set_ylabel("tokens/s, all rows")
    finish(axes, [row["batch"] for row in found[0][1]])
    return figure


def context(lines: Sequence[Line]) -> Figure | None:
    """Milliseconds of a decode step against its context, and prefill's tokens per second against the prompt."""
    steps = list(of_decode(lines, "context"))
    prompts = [line for line in lines if line["benchmark"] == "prefill" and len(line["rows"]) > 1]
    if not steps or not prompts:
        return None
    figure = Figure(figsize=(8, 3.4))
    left, right = figure.subplots(1, 2)
    for style, (label, table) in enumerate(steps):
        curve(left, [row["context"] for row in table], [row["ms_per_step"] for row in table], label, style)
    for style, line in enumerate(prompts):
        table = line["rows"]
        label = line["arguments"]["quantize"] or table[0]["dtype"]
        curve(right, [row["prompt"] for row in table], [row["tokens_per_s"] for row in table], label, style)
    left.set_title("decode, 1 row")
    left.set_xlabel("tokens in the context")
    left.set_ylabel("ms per token")
    finish(left, [row["context"] for row in steps[0][1]])
    right.set_title("prefill")
    right.set_xlabel("tokens in the prompt")
    right.set_ylabel("tokens/s")
    finish(right, [row["prompt"] for row in prompts[0]["rows"]])
    return figure


def of_decode(lines: Iterable[Line], axis: str) -> Iterator[tuple[str, Sequence[Line]]]:
    """Label and rows of the decode runs in which this column alone takes several values."""
    other = {"batch": "context", "context": "batch"}[axis]
    for line in lines:
        if line["benchmark"] == "decode":
            several, one = ({row[column] for row in line["rows"]} for column in (axis, other))
            if len(several) > 1 and len(one) == 1:
                yield line["arguments"]["quantize"] or line["arguments"]["dtype"], line["rows"]


def curve(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, style: int) -> None:
    """Draw one line with the marks of its style."""
    axes.plot(x, y, color=COLOURS[style % 4], marker=MARKERS[style % 4], markersize=5, label=label)


def finish(axes: Axes, ticks: Sequence[float]) -> None:
    """Double the horizontal axis from tick to tick, start the vertical one at zero, and name the lines."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.1 * max(max(line.get_ydata()) for line in axes.get_lines()))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def plots(page: str, folder: str | None = None, kind: str = "svg") -> None:
    """Draw a page of results into a folder, docs/images if none is given."""
    for path in draw(Path(page), Path(folder) if folder else ROOT / "docs/images", kind):
        print(path)


if __name__ == "__main__":
    fire.Fire(plots)
