"""Pages of results: runs benchmarks one after the other and writes what they found, as `benchmarks/results/*.md`.

python -m benchmarks.pages --lines lines.txt --page benchmarks/results/cpu-avx2.md

As a program it makes a page from text that holds benchmarks' lines of JSON, such as their output. It knows nothing of
what is measured: a list of runs, or lines, in; a page out. A page holds its own lines, so that it can be read again,
and a section "Notes" that is written by hand and kept.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fire

from benchmarks.machine import short

ROOT = Path(__file__).parents[1]
NOTES = "## Notes\n"
HIDDEN = ("llama_cpp_python", "folder")
"""Flags whose values are paths of one machine: a page shows PATH instead."""
MACHINE = ("hardware", "threads", "torch", "python")


@dataclass(frozen=True)
class Run:
    """One benchmark to run.

    Attributes:
        title: the heading of its section; lines of the same title take each other's place.
        module: a module of `benchmarks`.
        flags: what it is given.
        seconds: when to give it up.
    """

    title: str
    module: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 3600

    def words(self, python: str = sys.executable) -> list[str]:
        """The command."""
        flags = [word for name, value in self.flags.items() for word in (f"--{name}", flag(value))]
        return [python, "-m", f"benchmarks.{self.module}", *flags]

    def shown(self) -> str:
        """The command as a page has it."""
        flags = {name: "PATH" if name in HIDDEN else value for name, value in self.flags.items()}
        return " ".join(Run(self.title, self.module, flags).words("python"))


def flag(value: Any) -> str:
    """A value as a word of a command line."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def run_all(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Run benchmarks in order, showing what they print; one that fails leaves a line that says so.

    Returns:
        A line for each run: what it reported, its title and its command.
    """
    lines = []
    for run in runs:
        print(f"\n{run.title}: {' '.join(run.words('python'))}", flush=True)
        lines.append({**one(run), "title": run.title, "command": run.shown()})
    return lines


def one(run: Run) -> dict[str, Any]:
    """Run one benchmark and take its last line."""
    failed = {"benchmark": run.module}
    try:
        done = subprocess.run(run.words(), cwd=ROOT, capture_output=True, text=True, timeout=run.seconds, check=False)
    except subprocess.TimeoutExpired:
        return {**failed, "failed": f"it took longer than {run.seconds:.0f} s"}
    sys.stderr.write(done.stderr)
    print(done.stdout, end="", flush=True)
    lines = [line for line in done.stdout.splitlines() if is_line(line)]
    if done.returncode or not lines:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return {**failed, "failed": words[-1]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def is_line(text: str) -> bool:
    """Say whether this is a benchmark's line of JSON."""
    return text.startswith('{"benchmark"')


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Take the lines of JSON out of a page, or out of what benchmarks printed."""
    return [json.loads(text) for text in path.read_text().splitlines() if is_line(text)]


def merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """New lines in the place of the old ones of the same title, or behind them."""
    lines = {title_of(line): dict(line) for line in old}
    lines.update({title_of(line): dict(line) for line in new})
    return list(lines.values())


def title_of(line: Mapping[str, Any]) -> str:
    """What a section is called."""
    return str(line.get("title", line["benchmark"]))


def write_page(path: Path, name: str, lines: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write a page from lines; the notes of an older page are kept.

    Args:
        name: of the machine, for the heading.
        facts: what else is to be said of the machine.
    """
    notes = path.read_text().partition(NOTES)[2] if path.exists() else ""
    good = [line for line in lines if "failed" not in line]
    parts = [f"# Results: {name}\n", "Written by a program from the lines of JSON at the end; notes are kept.\n"]
    for key in MACHINE:
        found = sorted({str(line[key]) for line in good})
        parts.append(f"* {key}: {'; '.join(found)}")
    parts += [f"* {key}: {value}" for key, value in facts.items()]
    parts.append("")
    parts += [section(line) for line in lines]
    parts.append("## Lines of JSON\n\n```text")
    parts += [json.dumps(line) for line in lines]
    parts.append("```\n")
    parts.append(NOTES + (notes or "\nNone yet.\n"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts))


def section(line: Mapping[str, Any]) -> str:
    """One benchmark: its command, its table, and what follows from it."""
    parts = [f"## {title_of(line)}\n"]
    if "command" in line:
        parts.append(f"```sh\n{line['command']}\n```\n")
    if "failed" in line:
        return "\n".join([*parts, f"It failed: {line['failed']}\n"])
    said = {name: value for name, value in line["arguments"].items() if value is not None and value != {}}
    parts.append(f"Commit {line['commit']}; {', '.join(f'{name} {said_of(value)}' for name, value in said.items())}.\n")
    columns = list(line["rows"][0])
    parts.append(f"| {' | '.join(columns)} |\n|:--|{'--:|' * (len(columns) - 1)}")
    parts += [f"| {' | '.join(short(row[column]) for column in columns)} |" for row in line["rows"]]
    parts.append("")
    parts += [f"* {title}: **{short(value)}**" for title, value in line.get("findings", {}).items()]
    return "\n".join(parts).rstrip() + "\n"


def said_of(value: Any) -> str:
    """An argument in a sentence."""
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {said_of(inner)}" for name, inner in value.items()) + ")"
    return short(value)


def pages(lines: str, page: str) -> None:
    """Put lines of JSON into a page, which is made where there is none; sections of the same title are replaced."""
    path = Path(page)
    found = read_lines(Path(lines))
    if not found:
        raise ValueError(f"{lines} holds no line of JSON of a benchmark")
    write_page(path, path.stem, merged(read_lines(path) if path.exists() else [], found), {})


if __name__ == "__main__":
    fire.Fire(pages)
