"""Will it fit? What weights, cache and workspace need on each rank, against what the device has free.

It knows nothing of how memory is allocated; sizes follow from the architecture alone.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from codellama.config import ModelArgs, RuntimeArgs
from codellama.errors import MemoryBudgetError

_CGROUP = "/sys/fs/cgroup"


@dataclass(frozen=True)
class Budget:
    """Bytes that one rank needs.

    Attributes:
        weights: this rank's parameters.
        position: cache for one position of all rows.
        cache: all rows at max_seq_len.
        chunk_token: intermediate results for one token of a prefill chunk, roughly.
        logits: one row of the vocabulary for each cache row, twice.
        workspace: a chunk's intermediate results and the logits.
    """

    weights: int
    position: int
    cache: int
    chunk_token: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """All that one rank needs."""
        return self.weights + self.cache + self.workspace

    def check(self, free: int | None, runtime: RuntimeArgs) -> None:
        """Refuse what cannot fit, before anything is allocated.

        Raises:
            MemoryBudgetError: with the largest max_seq_len that fits.
        """
        if free is None or self.total <= free:
            return
        room = free - self.weights - self.logits
        longest = (room - runtime.chunk_size * self.chunk_token) // self.position
        if longest < runtime.chunk_size:  # then the chunk is as short as the row
            longest = room // (self.position + self.chunk_token)
        if longest > 0:
            advice = f"max_seq_len up to {longest} fits with max_batch_size {runtime.max_batch_size}"
        else:
            advice = "even without a cache it does not fit: spread it over more ranks, or use a smaller dtype"
        raise MemoryBudgetError(f"{self.describe(free)}: {advice}")

    def describe(self, free: int | None) -> str:
        """One line: what is needed against what is free."""
        available = "free memory unknown" if free is None else f"{format_bytes(free)} free"
        return (
            f"memory per rank: weights {format_bytes(self.weights)} + cache {format_bytes(self.cache)} + workspace "
            f"{format_bytes(self.workspace)} = {format_bytes(self.total)}, {available}"
        )


def plan_budget(args: ModelArgs, runtime: RuntimeArgs, size: int, itemsize: int) -> Budget:
    """Add up what a rank needs.

    Args:
        args: the architecture.
        runtime: rows, their length, and the chunk.
        size: model-parallel size.
        itemsize: bytes of one weight, and of one number in the cache.
    """
    kv_dim = max(1, args.kv_heads // size) * args.head_dim
    split = 2 * args.vocab_size * args.dim // size
    split += args.n_layers * (2 * args.dim * args.dim + 3 * args.dim * args.hidden_dim) // size
    copied = args.n_layers * 2 * args.dim * kv_dim + (2 * args.n_layers + 1) * args.dim
    position = 2 * args.n_layers * kv_dim * itemsize * runtime.max_batch_size
    chunk = min(runtime.chunk_size, runtime.max_seq_len)
    # Residual, norm in float32, queries, keys, values and attention's result, two halves of the feed-forward layer.
    width = args.dim * (2 * itemsize + 8) + (3 * args.dim + 2 * args.hidden_dim) // size * itemsize
    logits = 2 * 4 * args.vocab_size * runtime.max_batch_size
    return Budget(
        weights=(split + copied) * itemsize,
        position=position,
        cache=position * runtime.max_seq_len,
        chunk_token=width,
        logits=logits,
        workspace=chunk * width + logits,
    )


def free_host_memory() -> int | None:
    """Bytes that this process may still take, shared evenly with the other ranks of this host; None if unknown.

    The smaller of what the kernel reports as available and what the container's limit leaves.
    """
    candidates = []
    meminfo = _read("/proc/meminfo")
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            candidates.append(int(line.split()[1]) * 1024)
    limit, used = _read(f"{_CGROUP}/memory.max").strip(), _read(f"{_CGROUP}/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        cached = sum(
            int(line.split()[1]) for line in _read(f"{_CGROUP}/memory.stat").splitlines() if line[:5] == "file "
        )
        candidates.append(int(limit) - int(used) + cached)  # the kernel drops cached files when memory is asked for
    if not candidates:
        return None
    return min(candidates) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def format_bytes(count: int) -> str:
    """Write a number of bytes as people read it, in powers of 1,000."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""  # another operating system, or no cgroup: unknown is an answer
