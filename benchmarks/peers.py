"""The same weights through this package, transformers and llama.cpp, in turn, in one run.

python -m benchmarks.peers
python -m benchmarks.peers --shape 953m --rounds 5 --llama_cpp_python other/bin/python
python -m benchmarks.peers --engines ours,transformers-float32 --prompt 64

Random weights are written once, as Hugging Face has them and, where llama.cpp is to run, as GGUF. Each engine is a
process that stays; in every round each one reads the same new prompt and continues it, and only one of them computes at
a time. What is not installed is named and left out. Ours and transformers must give the same greedy tokens in float32.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import fire
import torch
from torch import Tensor

from benchmarks.machine import (
    RandomCheckpoint,
    bandwidth,
    chosen_words,
    fast_dtypes,
    flops,
    n_weights,
    report,
    reset_peak,
    shape_args,
    tokenizer_bytes,
)
from codellama.checkpoint import open_checkpoint, tensor_shapes, write_huggingface
from codellama.config import ModelArgs
from codellama.device import choose_device, free_memory
from codellama.errors import CodeLlamaError

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One engine with its options: a row of the table.

    Attributes:
        name: what it is called here.
        module: which of `benchmarks.engines` runs it.
        options: what it is told beside the files.
        weight: bytes of a weight in memory, scales included, to see what fits at once.
        many: it decodes several rows together.
    """

    name: str
    module: str
    options: Mapping[str, Any]
    weight: float
    many: bool = False


VARIANTS = (
    Variant("ours", "ours", {"dtype": None, "quantize": None}, 4, many=True),  # 4 where the default is float32
    Variant("ours-float32", "ours", {"dtype": "float32", "quantize": None}, 4),
    Variant("ours-int8", "ours", {"dtype": None, "quantize": "int8"}, 1.1, many=True),
    Variant("ours-int4", "ours", {"dtype": None, "quantize": "int4"}, 0.8, many=True),
    Variant("transformers-bfloat16", "of_transformers", {"dtype": "bfloat16"}, 2),
    Variant("transformers-float32", "of_transformers", {"dtype": "float32"}, 4),
    Variant("llama.cpp-f16", "of_llama_cpp", {"type": "f16"}, 2),
    Variant("llama.cpp-q8_0", "of_llama_cpp", {"type": "q8_0"}, 1.1),
    Variant("llama.cpp-q4_0", "of_llama_cpp", {"type": "q4_0"}, 0.7),
)

SIXTEEN = ("llama.cpp-f16", "transformers-bfloat16", "transformers-float32")
"""What the default dtype is compared with: the best of these."""

RATIOS = (
    ("prefill, ours by the best of the peers' 16 and 32 bits", "prefill", "ours", SIXTEEN),
    ("decode, ours by the best of the peers' 16 and 32 bits", "decode", "ours", SIXTEEN),
    ("decode, int8 by q8_0", "decode", "ours-int8", ("llama.cpp-q8_0",)),
    ("decode, int4 by q4_0", "decode", "ours-int4", ("llama.cpp-q4_0",)),
    ("prefill, int8 by q8_0", "prefill", "ours-int8", ("llama.cpp-q8_0",)),
    ("prefill, int4 by q4_0", "prefill", "ours-int4", ("llama.cpp-q4_0",)),
    ("prefill, int8 by 16 bits", "prefill", "ours-int8", ("ours",)),
    ("prefill, int4 by 16 bits", "prefill", "ours-int4", ("ours",)),
    ("decode, int8 by 16 bits", "decode", "ours-int8", ("ours",)),
    ("decode, int4 by 16 bits", "decode", "ours-int4", ("ours",)),
)
"""What is asked of a run: a title, a figure, whose, and by the best of whom."""


class Engine:
    """A process of one variant. It is missing where what it needs is not installed."""

    def __init__(self, variant: Variant, options: Mapping[str, Any], python: str, threads: int) -> None:
        """Start it and wait until it is ready.

        Raises:
            RuntimeError: it ended before it was.
        """
        self.variant = variant
        command = [python, "-m", f"benchmarks.engines.{variant.module}", json.dumps({**options, **variant.options})]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            ready = self._read()
        except BaseException:
            self.close()
            raise
        self.missing: str | None = ready.get("missing")
        self.weight_bytes: int = ready.get("weight_bytes", 0)
        if self.missing is not None:
            self.close()

    def ask(self, prompt: Sequence[int], new_tokens: int, rows: int = 1) -> dict[str, Any]:
        """Let it continue a prompt."""
        assert self._process.stdin is not None
        print(
            json.dumps({"prompt": list(prompt), "new_tokens": new_tokens, "rows": rows}),
            file=self._process.stdin,
            flush=True,
        )
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.variant.name} ended with status {self._process.wait()}; its words stand above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> "Engine":
        """Give itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.close()


class Tensors(Mapping[str, Tensor]):
    """A checkpoint's tensors, read one by one, under canonical names."""

    def __init__(self, checkpoint: Any) -> None:
        """Look at this checkpoint."""
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> Tensor:
        """Read one."""
        tensor: Tensor = self._checkpoint.read(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """All names."""
        return iter(self._checkpoint.names())

    def __len__(self) -> int:
        """How many there are."""
        return len(list(self._checkpoint.names()))


def peers(
    shape: str = "small",
    engines: str | Sequence[str] | None = None,
    device: str | None = None,
    prompt: int = 512,
    new_tokens: int = 32,
    rows: int = 8,
    rounds: int = 3,
    llama_cpp_python: str = sys.executable,
    folder: str | None = None,
) -> None:
    """Measure; llama_cpp_python is a Python with llama-cpp-python, folder keeps the weights for another run."""
    place, args, threads = choose_device(device), shape_args(shape), torch.get_num_threads()
    chosen = choose(engines, place)
    speeds = measured_speeds(place)
    print(", ".join(f"{name} {speed / 1e9:.4g} G/s" for name, speed in speeds.items()), flush=True)
    with contextlib.ExitStack() as stack:
        path = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        needs_gguf = any(variant.module == "of_llama_cpp" for variant in chosen)
        options = {
            **write(path, args, needs_gguf),
            "device": str(place), "max_seq_len": prompt + new_tokens + 1, "rows": rows, "threads": threads,
        }  # fmt: skip

        def start(variant: Variant) -> Engine:
            python = llama_cpp_python if variant.module == "of_llama_cpp" else sys.executable
            return Engine(variant, options, python, threads)

        measured, missing = measure(chosen, start, fits(chosen, args, place), args, prompt, new_tokens, rows, rounds)
    speeds = {name: max(speed, speeds[name]) for name, speed in measured_speeds(place).items()}  # before and after
    exact = [run["tokens"][0][0] for run in measured.get("ours-float32", ())]
    table = [
        {**row(name, runs, args, prompt, new_tokens, rows, speeds), "same_first": same_first(runs, exact)}
        for name, runs in measured.items()
    ]
    arguments = {
        "shape": shape, "device": str(place), "prompt": prompt, "new_tokens": new_tokens, "rows": rows,
        "rounds": rounds, "missing": missing, "measured_G_per_s": {name: x / 1e9 for name, x in speeds.items()},
        "equal_in_float32": equal_in_float32(measured),
    }  # fmt: skip
    for name, why in missing.items():
        print(f"{name}: {why}")
    report("peers", arguments, table, ratios(table))


def measured_speeds(device: torch.device) -> dict[str, float]:
    """Bytes per second that the machine reads, and operations per second by dtype."""
    speeds = {"bandwidth": bandwidth(device)}
    speeds |= {str(dtype).removeprefix("torch."): flops(dtype, device) for dtype in fast_dtypes(device)}
    reset_peak(device)  # a GPU's memory is given back to the engines
    return speeds


def choose(names: str | Sequence[str] | None, device: torch.device) -> list[Variant]:
    """Find variants by name; None is all that run on this device.

    Raises:
        ValueError: there is none of that name.
    """
    known = {variant.name: variant for variant in VARIANTS}
    if names is None:
        return [v for v in VARIANTS if device.type == "cpu" or v.module != "of_llama_cpp"]
    return [known[name] for name in chosen_words("engines", names, known)]


def write(path: Path, args: ModelArgs, needs_gguf: bool) -> dict[str, Any]:
    """Write the weights in each format, unless they are there; returns where they are."""
    source = RandomCheckpoint(args, torch.bfloat16, torch.device("cpu"))
    huggingface, gguf = path / "huggingface", path / "model.gguf"
    words = tokenizer_bytes(args.vocab_size)
    if not huggingface.exists():
        write_huggingface(huggingface, args, Tensors(source).items(), words, torch.bfloat16)
    if open_checkpoint(huggingface).args.dim != args.dim:
        raise ValueError(f"{huggingface} holds another shape: name another folder")
    if needs_gguf and not gguf.exists():
        from tests.support.gguf import write_gguf

        write_gguf(gguf, args, Tensors(source), words, "F16")
    total = sum(torch.Size(shape).numel() for shape in tensor_shapes(args).values())
    return {"huggingface": str(huggingface), "gguf": str(gguf), "of_file": n_weights(args) / total}


def fits(variants: Sequence[Variant], args: ModelArgs, device: torch.device) -> bool:
    """Say whether all processes fit into memory at once, with half a gigabyte for each beside its weights."""
    total = sum(torch.Size(shape).numel() for shape in tensor_shapes(args).values())
    free = free_memory(device)
    return free is None or sum(variant.weight * total + 5e8 for variant in variants) < 0.8 * free


def measure(
    variants: Sequence[Variant],
    start: Any,
    together: bool,
    args: ModelArgs,
    prompt: int,
    new_tokens: int,
    rows: int,
    rounds: int,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Run all rounds; where the processes do not fit together, each one starts anew in every round.

    Returns:
        Of each variant the answers of all rounds; and what is missing, with the reason.
    """
    measured: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    running: dict[str, Engine] = {}
    generator = torch.Generator().manual_seed(0)

    def ids() -> list[int]:
        return torch.randint(args.vocab_size, (prompt,), generator=generator).tolist()

    warm = ids()
    with contextlib.ExitStack() as stack:
        for _ in range(rounds):
            question = ids()
            many = ids()
            for variant in variants:
                name = variant.name
                if name in missing:
                    continue
                engine = running.get(name)
                if engine is None:
                    engine = stack.enter_context(start(variant))
                    if engine.missing is not None:
                        missing[name] = engine.missing
                        continue
                    engine.ask(warm, 2)
                answer = engine.ask(question, new_tokens + 1)
                if variant.many and rows > 1:
                    answer["many_s"] = engine.ask(many, new_tokens + 1, rows)["rest_s"]
                measured.setdefault(name, []).append({**answer, "weight_bytes": engine.weight_bytes})
                if together:
                    running[name] = engine
                else:
                    engine.close()
    return measured, missing


def equal_in_float32(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool | None:
    """True where ours and transformers gave the same tokens in every round in float32; None where one is missing.

    Raises:
        CodeLlamaError: they differ, so that one of them has run another model.
    """
    names = ("ours-float32", "transformers-float32")
    if not set(names) <= measured.keys():
        return None
    ours, theirs = ([answer["tokens"] for answer in measured[name]] for name in names)
    if ours != theirs:
        raise CodeLlamaError(f"in float32 ours gave {ours}, and transformers {theirs}: equal tokens were expected")
    return True


def same_first(runs: Sequence[Mapping[str, Any]], exact: Sequence[int]) -> float | None:
    """Share of the rounds whose first token is that of ours in float32: random weights have near ties, but few."""
    if not exact:
        return None
    return sum(run["tokens"][0][0] == token for run, token in zip(runs, exact, strict=True)) / len(exact)


def row(
    name: str,
    runs: Sequence[Mapping[str, Any]],
    args: ModelArgs,
    prompt: int,
    new_tokens: int,
    rows: int,
    speeds: Mapping[str, float],
) -> dict[str, Any]:
    """Make a row of the table: tokens per second, median and best, and shares of what the machine can do."""
    prefill = [prompt / run["first_s"] for run in runs]
    decode = [new_tokens / run["rest_s"] for run in runs]
    many = [rows * new_tokens / run["many_s"] for run in runs if "many_s" in run]
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    fastest = max(speed for name, speed in speeds.items() if name != "bandwidth")
    return {
        "engine": name,
        "weights_GB": runs[0]["weight_bytes"] / 1e9,
        "prefill": statistics.median(prefill),
        "prefill_best": max(prefill),
        "of_product": 2 * n_weights(args) * max(prefill) / fastest,
        "decode": statistics.median(decode),
        "decode_best": max(decode),
        "of_bandwidth": runs[0]["weight_bytes"] * max(decode) / speeds["bandwidth"],
        "rows": statistics.median(many) if many else None,
        "rows_best": max(many) if many else None,
        "peak_GB": max(peaks) / 1e9 if peaks else None,
    }


def ratios(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compare what was measured: of medians, and of the best runs."""
    rows = {row["engine"]: row for row in table}
    found: dict[str, float] = {}
    for title, figure, name, others in RATIOS:
        peers = [rows[other] for other in others if other in rows]
        if name in rows and peers:
            for column, addition in ((figure, ""), (f"{figure}_best", " (best runs)")):
                found[title + addition] = rows[name][column] / max(peer[column] for peer in peers)
    for name, row in rows.items():
        if row["rows"] is not None:
            found[f"decode, {name}: all rows by one"] = row["rows"] / row["decode"]
    return found


if __name__ == "__main__":
    fire.Fire(peers)
