"""What every benchmark needs: a random model of any shape, the machine's own speed, and the closing line of JSON."""

import json
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from codellama.config import ModelArgs
from codellama.model import Transformer

SHAPES = {
    "tiny": {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 8192},
    "small": {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 32016},
    "207m": {"dim": 1024, "n_layers": 12, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 32016},
    "953m": {"dim": 2048, "n_layers": 16, "n_heads": 16, "vocab_size": 32016},
    "7b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32016},
}


def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> Transformer:
    """Make a model of a known shape with random weights, in place."""
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; one of {', '.join(SHAPES)} was expected")
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**SHAPES[shape], rope_theta=1e6)).to(dtype).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    return model.requires_grad_(False).eval()


def weight_bytes(model: Transformer) -> int:
    """Bytes that one decode step reads: all weights but the embedding, of which it reads a row."""
    return sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("tok_embeddings"))


def bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes per second that the machine reads, measured by summing a tensor of 1 GB."""
    data = torch.ones(size, dtype=torch.float32, device=device)
    return data.nbytes / best_seconds(data.sum, device, 5)


def flops(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """Floating-point operations per second of a large matrix product."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, device, 5)


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


def report(name: str, arguments: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table, then everything as one line of JSON."""
    columns = list(rows[0])
    print("  ".join(f"{column:>14}" for column in columns))
    for row in rows:
        print("  ".join(f"{_short(row[column]):>14}" for column in columns))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = {
        "benchmark": name,
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({**machine, "arguments": arguments, "rows": rows}))


def _cpu() -> str:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return str(capabilities.get("cpu_name", platform.processor()))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
