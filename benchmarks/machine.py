"""What every benchmark needs: a random model of any shape, the machine's own speed, and the closing line of JSON."""

import inspect
import json
import platform
import re
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codellama.assembly import DEMO
from codellama.checkpoint import load_model, tensor_shapes
from codellama.checkpoint.layout import PlainNumbers
from codellama.config import ModelArgs
from codellama.model import Transformer
from codellama.parallel import Parallel
from codellama.tokenizer import Tokenizer

SHAPES = {
    "tiny": {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 8192},
    "small": {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 32016},
    "207m": {"dim": 1024, "n_layers": 12, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 32016},
    "953m": {"dim": 2048, "n_layers": 16, "n_heads": 16, "vocab_size": 32016},
    "7b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32016},
}


class RandomCheckpoint(PlainNumbers):
    """Random weights that are read like files: each tensor is made when it is asked for, the same each time."""

    def __init__(self, args: ModelArgs, dtype: torch.dtype, device: torch.device) -> None:
        """Make the weights of this architecture in this dtype, on this device."""
        self.args, self._dtype, self._device = args, dtype, device
        self._shapes = tensor_shapes(args)

    def names(self) -> Iterable[str]:
        """Canonical names of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full tensor."""
        return self._shapes[name]

    def read(
        self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Make a tensor, or its part from start to stop along dim; in `out` where that is a whole one like it."""
        shape = self._shapes[name]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        if out is not None and (out.shape, out.dtype, out.device) == (tensor.shape, tensor.dtype, tensor.device):
            tensor = out
        tensor.normal_(float(len(shape) == 1), 0.02, generator=generator)
        part = (0, shape[0]) if dim is None else (start, shape[dim] if stop is None else stop)
        if part == (0, shape[dim or 0]):
            return tensor
        return tensor.narrow(dim or 0, part[0], part[1] - part[0]).clone()


def tokenizer_bytes(vocab_size: int) -> bytes:
    """The demo's tokenizer, with further pieces up to this size."""
    content = (DEMO / "tokenizer.model").read_bytes()
    for id in range(Tokenizer(DEMO / "tokenizer.model").n_words, vocab_size):
        text = f"<{id}>".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1e6)  # the text, and its score
        content += b"\x0a" + bytes([len(piece)]) + piece  # one more piece, at the end of the list
    return content


def shape_args(shape: str) -> ModelArgs:
    """Look a shape up.

    Raises:
        ValueError: there is none of this name.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; one of {', '.join(SHAPES)} was expected")
    return ModelArgs(**SHAPES[shape], rope_theta=1e6)


def random_model(shape: str, dtype: torch.dtype, device: torch.device, quantize: str | None = None) -> Transformer:
    """Make a model of a known shape with random weights, through the loader as any other model."""
    return load(RandomCheckpoint(shape_args(shape), dtype, device), dtype, device, quantize)


def load(checkpoint: Any, dtype: torch.dtype, device: torch.device, quantize: str | None) -> Transformer:
    """Load a checkpoint on one rank.

    Raises:
        ValueError: quantize is given, and the loader cannot quantize, or not so.
    """
    if quantize is None:
        return load_model(checkpoint, Parallel(), device, dtype)
    if not can_quantize():
        raise ValueError(f"quantize is {quantize!r}, and the loader of this version does not quantize")
    from codellama.quantization import Quantization

    return load_model(checkpoint, Parallel(), device, dtype, quantization=Quantization.parse(quantize))


def can_quantize() -> bool:
    """Say whether the loader knows how."""
    return "quantization" in inspect.signature(load_model).parameters


def n_weights(args: ModelArgs) -> int:
    """Weights that take part in a product for each token: all but the embedding, of which a row is read."""
    shapes = tensor_shapes(args)
    del shapes["tok_embeddings.weight"]
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def weight_bytes(model: Transformer) -> int:
    """Bytes that one decode step reads: all weights but the embedding, of which it reads a row.

    A module that holds a matrix in its own way says itself how many these are; parameters may be views of it.
    """
    modules = [module for name, module in model.named_modules() if name != "tok_embeddings"]
    matrices = [module for module in modules if hasattr(module, "nbytes")]
    counted = {buffer.untyped_storage().data_ptr() for matrix in matrices for buffer in matrix.buffers()}
    others = [
        parameter
        for name, parameter in model.named_parameters()
        if not name.startswith("tok_embeddings") and not parameter.is_meta
    ]
    rest = [parameter.nbytes for parameter in others if parameter.untyped_storage().data_ptr() not in counted]
    return sum(matrix.nbytes for matrix in matrices) + sum(rest)


def cache_bytes(args: ModelArgs, length: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of so many positions, all layers together."""
    return 2 * args.n_layers * args.kv_heads * args.head_dim * length * dtype.itemsize


def prefill_work(args: ModelArgs, length: int) -> float:
    """Floating-point operations of a prompt: each weight once for each token, and attention to what is before it."""
    return 2.0 * length * n_weights(args) + 2.0 * length * length * args.n_layers * args.n_heads * args.head_dim


def bandwidth(device: torch.device) -> float:
    """Bytes per second: of reading 1 GB on a CPU, as weights are; of copying 4 GB on a GPU, both directions counted."""
    if device.type == "cuda":
        data = torch.ones(2**30, dtype=torch.float32, device=device)
        target = torch.empty_like(data)
        return 2 * data.nbytes / best_seconds(lambda: target.copy_(data), device, 10)
    data = torch.ones(2**28, dtype=torch.float32, device=device)
    return data.nbytes / best_seconds(data.sum, device, 5)


def flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, device, 5)


def fast_dtypes(device: torch.device) -> list[torch.dtype]:
    """Dtypes in which the machine multiplies large matrices fast: float32, and bfloat16 where the hardware has it."""
    native = device.type == "cuda" or "bf16" in cpu_features()
    return [torch.float32, *([torch.bfloat16] if native else [])]


def best_seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Shortest of several runs, after one to warm up."""
    function()
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory this process has held: on a GPU what torch allocated there, else resident memory; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return None if found is None else int(found[1]) * 1024


def reset_peak(device: torch.device) -> None:
    """Count the most memory from here on, so that what measured the machine is not in it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def hardware() -> str:
    """Name of the GPU, or of the CPU with the features that decide which kernel is fast."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_capabilities().get('cpu_name', platform.processor())}, {', '.join(cpu_features())}"


def cpu_features() -> list[str]:
    """What this CPU computes fast: its widest vectors, 16-bit products, 8-bit products, matrix tiles."""
    found = _capabilities()
    width = next((name for name in ("avx512_f", "avx2", "sve", "neon") if found.get(name)), platform.machine())
    wanted = {"avx512_bf16": "bf16", "bf16": "bf16", "avx512_vnni": "vnni", "avx_vnni": "vnni", "amx_bf16": "amx"}
    return [width.removesuffix("_f"), *dict.fromkeys(short for name, short in wanted.items() if found.get(name))]


def chosen_words(flag: str, words: str | Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """Words of a flag, separated by commas, each of which must be known; None is all of them.

    Raises:
        ValueError: one is not.
    """
    known = list(known)
    wanted = known if words is None else words.split(",") if isinstance(words, str) else list(words)
    for word in wanted:
        if word not in known:
            raise ValueError(f"{flag} has {word!r}; {', '.join(known)} were expected")
    return wanted


def report(
    name: str, arguments: Mapping[str, Any], rows: list[dict[str, Any]], findings: Mapping[str, Any] | None = None
) -> None:
    """Print the rows as a table and what follows from them, then everything as one line of JSON."""
    print(table(rows))
    for title, finding in (findings or {}).items():
        print(f"{title}: {short(finding)}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = {
        "benchmark": name,
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
    }
    line = {**machine, "arguments": dict(arguments), "rows": rows}
    print(json.dumps(line if findings is None else {**line, "findings": dict(findings)}), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Columns of the first row, aligned."""
    lines = [[*rows[0]], *([short(row[column]) for column in rows[0]] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def short(value: Any) -> str:
    """A value as a cell of a table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _capabilities() -> Mapping[str, Any]:
    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return capabilities
