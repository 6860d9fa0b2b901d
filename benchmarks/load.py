"""Loading: seconds and memory, against the time to read the file once, for one process and for two at once.

python -m benchmarks.load
python -m benchmarks.load --gigabytes 2

The file is in the page cache. Each process measures for itself, in this order: reading the whole file into one small
buffer; loading its part of the model in the file's dtype, and by how much that raised its peak memory; reading its part
into fresh memory, as no loader can do without.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fire
import torch
from torch import Tensor

from benchmarks.machine import report
from codellama.checkpoint import load_model, open_checkpoint, tensor_shapes, write_meta
from codellama.config import ModelArgs
from codellama.llama import DEMO
from codellama.model import Transformer
from codellama.parallel import Parallel

BUFFER_BYTES = 2**24


def load(gigabytes: float = 0.2, sizes: int | tuple[int, ...] = (1, 2), repeats: int = 3) -> None:
    """Load a random checkpoint of about this size with so many processes at once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        total = write_random(path, gigabytes)
        rows = []
        for size in [sizes] if isinstance(sizes, int) else sizes:
            best = min((run_processes(path, size) for _ in range(repeats)), key=lambda measured: measured["load_s"])
            rows.append({"processes": size, **best})
    report("load", {"gigabytes": gigabytes, "bytes": total}, rows)


def write_random(path: Path, gigabytes: float) -> int:
    """Write a checkpoint with the demo's tokenizer and random numbers; returns the bytes of its weights."""
    dim = 1024 if gigabytes < 1 else 2048
    words = (DEMO / "tokenizer.model").read_bytes()
    sizes = {"dim": dim, "n_heads": dim // 128, "vocab_size": 4096, "rope_theta": 1e6}
    layer = 2 * sum(
        torch.Size(s).numel() for n, s in tensor_shapes(ModelArgs(**sizes, n_layers=1)).items() if "." in n[:9]
    )
    args = ModelArgs(**sizes, n_layers=max(1, round(gigabytes * 1e9 / layer)))
    piece = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).bfloat16()

    def random_rows(shape: tuple[int, ...]) -> Iterator[Tensor]:
        row = torch.Size(shape[1:]).numel()
        step = max(1, len(piece) // row)
        for start in range(0, shape[0], step):
            count = min(step, shape[0] - start)
            yield piece[: count * row].view(count, *shape[1:])

    write_meta(path, args, ((name, random_rows(shape)) for name, shape in tensor_shapes(args).items()), 1, words)
    return (path / "consolidated.00.pth").stat().st_size


def run_processes(path: Path, size: int) -> dict[str, float]:
    """Let so many processes load at once; returns the slowest's times and the largest's memory."""
    commands = [
        [sys.executable, "-m", "benchmarks.load", "one", str(path), str(rank), str(size)] for rank in range(size)
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), "a process failed"
    measured = [json.loads(output) for output in outputs]
    worst = {key: max(one[key] for one in measured) for key in measured[0]}
    return {
        "read_s": worst["read_s"],
        "fresh_s": worst["fresh_s"],
        "load_s": worst["load_s"],
        "load_by_read": worst["load_s"] / worst["read_s"],
        "load_by_fresh": worst["load_s"] / worst["fresh_s"],
        "weights_MB": worst["weights"] / 1e6,
        "peak_MB": worst["peak"] / 1e6,
        "above_MB": (worst["peak"] - worst["weights"]) / 1e6,
    }


def one(path: str, rank: int, size: int) -> None:
    """Measure one process and print it as JSON."""
    file = max(Path(path).iterdir(), key=lambda file: file.stat().st_size)
    buffer = memoryview(bytearray(BUFFER_BYTES))
    read_whole(file, buffer)
    read_s = read_whole(file, buffer)
    before = memory("VmRSS")
    begin = time.perf_counter()
    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint, Parallel(rank=rank, size=size), torch.device("cpu"), torch.bfloat16)
    load_s = time.perf_counter() - begin
    peak = memory("VmHWM") - before
    weights = held_bytes(model)
    del model
    begin = time.perf_counter()
    with file.open("rb", buffering=0) as source:
        blocks = []
        for _ in range(0, weights, BUFFER_BYTES):
            blocks.append(bytearray(BUFFER_BYTES))
            source.readinto(blocks[-1])
    fresh_s = time.perf_counter() - begin
    print(json.dumps({"read_s": read_s, "fresh_s": fresh_s, "load_s": load_s, "peak": peak, "weights": weights}))


def held_bytes(model: Transformer) -> int:
    """Bytes of all weights: the matrices as they are held, and the parameters beside them."""
    held = {id(layer.matrix): layer.matrix for layers in model.matrices() for layer in layers if layer.matrix}
    inside = {buffer.untyped_storage().data_ptr() for matrix in held.values() for buffer in matrix.buffers()}
    beside = [parameter for parameter in model.parameters() if parameter.untyped_storage().data_ptr() not in inside]
    return sum(matrix.nbytes for matrix in held.values()) + sum(parameter.nbytes for parameter in beside)


def read_whole(file: Path, buffer: memoryview) -> float:
    """Seconds to read a file."""
    begin = time.perf_counter()
    with file.open("rb", buffering=0) as source:
        while source.readinto(buffer):
            pass
    return time.perf_counter() - begin


def memory(key: str) -> int:
    """Bytes of this process, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status does not tell the memory of this process: this benchmark needs Linux")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        fire.Fire(load)
