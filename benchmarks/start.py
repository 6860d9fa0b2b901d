"""From the start of a process to its first token, in fresh interpreters, on the demo checkpoint or any other one.

python -m benchmarks.start
python -m benchmarks.start --repeats 10
python -m benchmarks.start --ckpt_dir CodeLlama-7b
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fire

from benchmarks.machine import report

ROOT = Path(__file__).parents[1]


def start(ckpt_dir: str | None = None, prompt: str = "def fibonacci(n):", repeats: int = 5) -> None:
    """Time each part; the first run, which may read files from the disk, is a row of its own."""
    first = times(ckpt_dir, prompt)
    others = [times(ckpt_dir, prompt) for _ in range(repeats)]
    columns = list(first)
    rows: list[dict[str, Any]] = [
        {"run": "first", **first},
        {"run": "median", **{name: statistics.median(run[name] for run in others) for name in columns}},
        {"run": "best", **{name: min(run[name] for run in others) for name in columns}},
    ]
    arguments = {"ckpt_dir": ckpt_dir or "demo", "repeats": repeats}
    report("start", arguments, rows, {"seconds to the first token, median": rows[1]["total"]})


def times(ckpt_dir: str | None, prompt: str) -> dict[str, float]:
    """Seconds of the parts in one fresh process, and in all."""
    command = [sys.executable, "-m", "benchmarks.first_token", str(time.monotonic()), prompt]
    command += [] if ckpt_dir is None else [ckpt_dir]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    parts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["times"]
    return {**parts, "total": sum(parts.values())}


if __name__ == "__main__":
    fire.Fire(start)
