"""All figures of a GPU: its tests, its benchmarks, and a page of results. `make gpu` runs it.

python -m benchmarks.gpu
python -m benchmarks.gpu --only decode,int8,int4
python -m benchmarks.gpu --device cpu --shape tiny --prefill 64 --long 128 --output page.md --tests False

Without a GPU it says so and ends with status 1. The last line above runs the whole list on a CPU, to see that it works.
The page is `benchmarks/results/gpu-NAME.md`. A benchmark that fails, for lack of memory for instance, is named there,
and the others run all the same.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import torch

from benchmarks.machine import can_quantize, chosen_words
from benchmarks.pages import ROOT, Run, merged, read_lines, run_all, write_page


def runs(device: str, shape: str, dtype: str, prefill: int, long: int, new_tokens: int) -> dict[str, list[Run]]:
    """Everything there is, by the word that --only takes."""
    place: dict[str, Any] = {"device": device, "shape": shape}
    decode = {**place, "dtype": dtype, "new_tokens": new_tokens}
    contexts = sorted({128, max(1, prefill // 4), prefill})
    known = {
        "decode": [
            Run("Decode by rows", "decode", {**decode, "batches": [1, 8, 64], "contexts": 128, "rounds": 3}, 1200),
        ],
        "context": [
            Run("Decode by context", "decode", {**decode, "batches": [1], "contexts": contexts, "rounds": 2}, 1200),
        ],
        "prefill": [
            Run("Prefill by length", "prefill", {**place, "dtypes": dtype, "prompts": [128, 512, prefill]}, 1200),
        ],
        "long": [
            Run("A long prompt", "prefill", {**place, "dtypes": dtype, "prompts": [long], "repeats": 1}, 1800),
        ],
    }
    if can_quantize():
        for kind in ("int8", "int4"):
            title = f"Decode by rows, {kind}"
            flags = {**decode, "batches": [1, 8, 64], "contexts": 128, "rounds": 3, "quantize": kind}
            known[kind] = [Run(title, "decode", flags, 1200)]
    engines = ["ours", "ours-float32", "transformers-bfloat16", "transformers-float32"]
    engines += ["ours-int8", "ours-int4"] if can_quantize() else []
    asked = {**place, "engines": engines, "prompt": min(512, prefill), "new_tokens": new_tokens}
    known["peers"] = [Run("Peers", "peers", asked, 3600)]
    known["start"] = [Run("Start", "start")]
    return known


def gpu(
    device: str = "cuda",
    shape: str = "7b",
    dtype: str = "bfloat16",
    prefill: int = 8192,
    long: int = 100_000,
    new_tokens: int = 128,
    only: str | Sequence[str] | None = None,
    output: str | None = None,
    tests: bool = True,
) -> None:
    """Test, measure, and write the page; ends with status 1 where something failed."""
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU that PyTorch can use: nothing was tested or measured")
    known = runs(device, shape, dtype, prefill, long, new_tokens)
    wanted = chosen_words("only", only, known)
    name = "cpu, a dry run" if device == "cpu" else torch.cuda.get_device_name(device)
    page = Path(output) if output else ROOT / "benchmarks/results" / f"gpu-{file_name(name)}.md"
    facts = describe(device)
    tested = True
    if tests:
        tested, facts["tests"] = run_tests()
    found = run_all(run for word in wanted for run in known[word])
    write_page(page, name, merged(read_lines(page) if page.exists() else [], found), facts)
    print(f"\nwritten: {page}")
    failed = [line["title"] for line in found if "failed" in line] + ([] if tested else ["tests"])
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def file_name(name: str) -> str:
    """A device's name in a file's: lower case, letters and digits, hyphens between."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: str) -> dict[str, str]:
    """What the page says of the device beside what each benchmark says of itself."""
    if device == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "memory": f"{properties.total_memory / 1e9:.1f} GB",
        "compute capability": f"{properties.major}.{properties.minor}",
        "CUDA of PyTorch": str(torch.version.cuda),
    }
    if shutil.which("nvidia-smi") is None:
        return facts
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        driver, _, power = done.stdout.splitlines()[0].partition(", ")
        facts |= {"driver": driver, "power limit": power}
    return facts


def run_tests() -> tuple[bool, str]:
    """Run the tests that need a GPU; returns whether they passed, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    lines = done.stdout.strip().splitlines()
    return done.returncode == 0, lines[-1].strip("= ") if lines else f"pytest ended with status {done.returncode}"


if __name__ == "__main__":
    fire.Fire(gpu)
