"""Will it fit? What weights, cache and workspace need on each rank, against what the device has free.

It knows nothing of how memory is allocated; sizes follow from the architecture alone.
"""

import os
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path

from codellama.config import ModelArgs, RuntimeArgs
from codellama.errors import MemoryBudgetError
from codellama.quantization import Quantization

_CGROUP = "/sys/fs/cgroup"


QUERY_TILE = 1024
"""Tokens of a chunk that attend at once to what comes before it."""

READ_BYTES = 4 * 2**20
"""Bound of the keys and values that are converted at once, whatever the length of the cache."""

UNPACKED_BYTES = 96 * 2**20
"""Bound of what is unpacked of a quantized matrix at once, with all that it is made of."""

GRAPH_NODE_BYTES = 24 * 2**10
"""Bound of what a GPU keeps for each kernel of a CUDA graph; not measured by us yet: tests/gpu/test_graphs.py does."""

_LAYER_NODES, _END_NODES, _TILE_NODES = 56, 40, 12  # kernels of a decode step: a layer, around them, a tile unpacked

LOGITS_BYTES = 16 * 2**20
"""Bound of the logits that exist at once where a prompt is scored, with all that is made of them."""


@dataclass(frozen=True)
class Budget:
    """Bytes that one rank needs.

    Attributes:
        args: the architecture.
        runtime: rows, their length, and the chunk.
        size: model-parallel size.
        itemsize: bytes of one number in the cache and of one activation.
        held: bytes of one weight that is not quantized; None is as many.
        quantization: how the matrices are held.
        graphs: decode steps that are recorded as CUDA graphs, one for each shape.
    """

    args: ModelArgs
    runtime: RuntimeArgs
    size: int
    itemsize: int
    held: int | None = None
    quantization: Quantization | None = None
    graphs: int = 0

    @property
    def weights(self) -> int:
        """This rank's parameters."""
        args, size = self.args, self.size
        held = self.held or self.itemsize
        dim, hidden = args.dim, args.hidden_dim // size

        def matrix(rows: int, columns: int) -> int:
            return self.quantization.nbytes(rows, columns) if self.quantization else rows * columns * held

        layer = matrix(self._heads_dim + 2 * self._kv_dim, dim) + matrix(dim, self._heads_dim)
        layer += matrix(2 * hidden, dim) + matrix(dim, hidden)
        ends = args.vocab_size * dim // size * held
        if not args.tied_output or size > 1 or self.quantization or held != self.itemsize:  # else one matrix is both
            ends += matrix(args.vocab_size // size, dim)
        return args.n_layers * layer + ends + (2 * args.n_layers + 1) * dim * self.itemsize

    @property
    def cache(self) -> int:
        """All rows at max_seq_len."""
        head = self.args.head_dim * self.itemsize if self.runtime.cache_dtype is None else self.args.head_dim + 4
        position = 2 * self.args.n_layers * (self._kv_dim // self.args.head_dim) * head
        return position * self.runtime.max_batch_size * self.runtime.max_seq_len

    @property
    def workspace(self) -> int:
        """What a step needs beside them: the larger of prefilling a chunk, scoring it, and decoding all rows."""
        args, runtime = self.args, self.runtime
        chunk = min(runtime.chunk_size, runtime.max_seq_len)
        prefill = chunk * self._token_bytes()
        if chunk < runtime.max_seq_len:
            prefill = max(prefill, chunk * self._attention_bytes() + self._merge_bytes(chunk))
        per_logits = logits_bytes(args.vocab_size, self.itemsize)
        score = 2 * chunk * args.dim * self.itemsize + min(LOGITS_BYTES, chunk * per_logits)
        rows = runtime.max_batch_size
        weights = (
            20 * args.n_heads // self.size
        )  # of one position in decoding: scores, softmax, and where its values are
        decode = rows * (self._token_bytes() + runtime.max_seq_len * weights + per_logits)
        decode += min(READ_BYTES, rows * runtime.max_seq_len * 2 * 4 * self._kv_dim)  # converted
        if runtime.cache_dtype is not None:  # a GPU converts one head of all rows at once
            decode += rows * runtime.max_seq_len * 2 * 4 * args.head_dim
            prefill += READ_BYTES
        widest = max(args.vocab_size // self.size, 2 * args.hidden_dim // self.size)  # outputs of one matrix
        unpacked = min(UNPACKED_BYTES, 6 * self.itemsize * widest * args.dim) if self.quantization else 0
        sampling = 6 * 8 * rows * args.vocab_size  # in float64
        recorded = self._graph_bytes + unpacked + decode if self.graphs else 0
        return unpacked + max(prefill, score, decode + sampling) + recorded

    @property
    def total(self) -> int:
        """All that one rank needs."""
        return self.weights + self.cache + self.workspace

    def check(self, free: int | None) -> None:
        """Refuse what cannot fit, before anything is allocated.

        Raises:
            MemoryBudgetError: with the largest max_seq_len that fits.
        """
        if free is None or self.total <= free:
            return
        longest = bisect_left(
            range(1, self.runtime.max_seq_len),
            True,
            key=lambda length: replace(self, runtime=replace(self.runtime, max_seq_len=length)).total > free,
        )
        smaller = [
            name for name in ("int8", "int4") if replace(self, quantization=Quantization.parse(name)).total <= free
        ]
        if longest > 0:
            advice = f"max_seq_len up to {longest} fits with max_batch_size {self.runtime.max_batch_size}"
        else:
            advice = "even without a cache it does not fit: spread it over more ranks, or use a smaller dtype"
        if smaller and self.quantization is None:
            advice += f", and quantize={smaller[0]!r} fits as it is"
        if self.graphs and replace(self, graphs=0).total <= free:
            advice += ", and so does decode='eager', without CUDA graphs"
        raise MemoryBudgetError(f"{self.describe(free)}: {advice}")

    def describe(self, free: int | None) -> str:
        """One line: what is needed against what is free."""
        available = "free memory unknown" if free is None else f"{format_bytes(free)} free"
        return (
            f"memory per rank: weights {format_bytes(self.weights)} + cache {format_bytes(self.cache)} + workspace "
            f"{format_bytes(self.workspace)} = {format_bytes(self.total)}, {available}"
        )

    @property
    def _heads_dim(self) -> int:
        return self.args.heads_dim // self.size

    @property
    def _graph_bytes(self) -> int:
        """What is kept of the recorded steps beside the memory in which they run, which they share."""
        nodes = self.args.n_layers * _LAYER_NODES + _END_NODES
        if self.quantization:
            unpacked = replace(self, quantization=None, held=None).weights
            nodes += _TILE_NODES * (unpacked // (UNPACKED_BYTES // 6) + 4 * self.args.n_layers + 1)
        return self.graphs * nodes * GRAPH_NODE_BYTES + self.runtime.max_batch_size * 4 * self.args.vocab_size

    @property
    def _kv_dim(self) -> int:
        return max(1, self.args.kv_heads // self.size) * self.args.head_dim

    def _merge_bytes(self, chunk: int) -> int:
        """Attention of a chunk to what comes before it: queries, two parts of the result, and their merge."""
        return min(chunk, QUERY_TILE) * self._heads_dim * (3 * self.itemsize + 3 * 4)

    def _attention_bytes(self) -> int:
        """One token of a chunk while it attends: the stream and its norm, its turns, projections, the result."""
        width = self.args.dim + self._heads_dim + self._kv_dim
        codes = 0 if self.runtime.cache_dtype is None else 16 * self._kv_dim  # float32 copies, written and read
        return 12 * self.args.head_dim + 2 * width * self.itemsize + codes

    def _token_bytes(self) -> int:
        """Intermediate results for one token of a chunk: the largest of what a block holds at once."""
        dim, item = self.args.dim, self.itemsize
        hidden = self.args.hidden_dim // self.size
        stream = 12 * self.args.head_dim + 2 * dim * item  # with the turns, and the norm
        return max(stream + dim * (item + 8), self._attention_bytes(), stream + 3 * hidden * item)


def plan_budget(
    args: ModelArgs,
    runtime: RuntimeArgs,
    size: int,
    itemsize: int,
    held: int | None = None,
    quantization: Quantization | None = None,
    graphs: int = 0,
) -> Budget:
    """Add up what a rank needs; see Budget for the arguments."""
    return Budget(args, runtime, size, itemsize, held, quantization, graphs)


def logits_bytes(vocab_size: int, itemsize: int) -> int:
    """Bytes for one position's logits: as they are computed and joined, in float32, their check, their softmax."""
    return vocab_size * (2 * itemsize + 4 + 1 + 4)


def logits_tile(vocab_size: int, itemsize: int) -> int:
    """Positions whose logits exist at once; the same on every rank."""
    return max(1, LOGITS_BYTES // logits_bytes(vocab_size, itemsize))


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
