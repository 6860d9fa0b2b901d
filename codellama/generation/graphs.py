"""Decode steps of fixed shapes: one token for each row, recorded once for each shape, and replayed from then on.

A step reads and writes the same memory each time it runs, and nothing in it depends on numbers of the host, so a CUDA
graph can hold it. What a recorder makes of a step is its own: a graph, or the step itself. Nothing here knows of
requests or of sampling, and prompts are not read here.

Shapes: R rows from the first of the cache on, S positions of them, V vocabulary.
"""

import logging
import time
from collections.abc import Callable
from itertools import pairwise
from types import FunctionType

import torch
from torch import Tensor

from codellama.cache import KVCache
from codellama.config import Decode
from codellama.errors import ParallelSizeError
from codellama.generation.batch import LAST_DRAWN, Batch
from codellama.linear import Dense
from codellama.model import Transformer
from codellama.parallel import Parallel

logger = logging.getLogger(__name__)

Step = Callable[[], object]
Recorder = Callable[[Step], Step]
"""Takes a step that may be run at once, as often as it likes, and returns what runs it from then on."""

MOST_SHAPES = 64
"""Shapes that are recorded at most: each takes time when a generator is built, and memory (`memory.GRAPH_NODE_BYTES`).
"""

_SHORTEST = 512  # positions that one row of a 7B model reads in a fiftieth of the time of the weights
_MANY = 8  # rows from which positions that are read in vain cost more than another graph
_SPREAD = 4  # rows that are computed for one that is wanted, at most
_WARM_UPS = 2  # the first run makes handles and workspaces, which must not be part of a graph


def decode_shapes(rows: int, length: int) -> list[tuple[int, int]]:
    """List the shapes (R, S) that serve every step of so many rows of such a length, the largest first.

    R doubles. S doubles too, with a step between from `_MANY` rows on, where the cache is most of what a step reads: at
    most a third of it is read in vain there, and half with fewer rows, where the weights are most. Where that makes
    more than MOST_SHAPES, the steps between go first, then the shortest.

    Args:
        rows: of the cache.
        length: positions of a row.
    """
    sizes = [*_powers(1, rows), rows]
    shortest, fine = min(_SHORTEST, length), True
    while True:
        coarse = [*_powers(shortest, length), length]
        between = [(low + low // 2) for low, high in pairwise(coarse) if low + low // 2 < high]
        shapes = [(size, stop) for size in sizes for stop in (*coarse, *(between if fine and size >= _MANY else ()))]
        if len(shapes) <= MOST_SHAPES or (not fine and len(coarse) == 1):
            return sorted(shapes, reverse=True)
        shortest, fine = shortest if fine else min(2 * shortest, length), False


def _powers(first: int, below: int) -> list[int]:
    found = []
    while first < below:
        found.append(first)
        first *= 2
    return found


def choose_decode(decode: Decode | None, device: torch.device, parallel: Parallel, dense: bool) -> Decode:
    """Take the way to decode that is asked for; None is eager, since graphs have not run on a GPU yet.

    Args:
        decode: None is eager.
        device: where the model is.
        parallel: this rank's place.
        dense: the matrices are held in the dtype in which they are multiplied.

    Raises:
        ValueError: graphs without a GPU, or a CPU's own kernels, which torch.compile does not know.
        ParallelSizeError: ranks that talk in a way that cannot be part of a graph, or of compiled code.
    """
    if decode == "graph" and device.type != "cuda":
        raise ValueError(f"decode is 'graph', but {device} has no CUDA graphs; 'eager' or 'compile' was expected")
    if decode == "compile" and device.type == "cpu" and not dense:
        raise ValueError(
            "decode is 'compile', but a CPU's products of packed weights cannot be compiled; 'eager' was expected, or "
            "neither quantize nor dtype float16"
        )
    if decode == "compile" and parallel.size > 1:
        raise ParallelSizeError(f"decode is 'compile' on {parallel.size} ranks; on several, 'eager' or 'graph' works")
    if decode == "graph" and not parallel.capturable:
        raise ParallelSizeError(
            f"decode is 'graph', but the {parallel.size} ranks talk through gloo, which no graph can hold: "
            f"decode='eager' works, and 'graph' where PyTorch has NCCL"
        )
    return decode or "eager"


class DecodeGraphs:
    """The recorded steps of one model and its cache.

    The memory of weights and cache is part of what is recorded: numbers may change in place, tensors may not be
    exchanged, and hooks of modules run only while a step is recorded.

    Attributes:
        captures: how often a step was recorded.
    """

    def __init__(self, model: Transformer, cache: KVCache, record: Recorder, compiled: bool = False) -> None:
        """Make the buffers; nothing is recorded yet.

        Args:
            model: the model.
            cache: all its rows.
            record: makes a step that is replayed of one that is computed.
            compiled: let torch.compile make one program of a step, before it is recorded.
        """
        rows, _, length, _ = cache.keys[0].shape
        device = cache.keys[0].device
        self.captures = 0
        self._model = model
        self._cache = cache
        self._record = record
        self._compiled = compiled
        self._shapes = decode_shapes(rows, length)
        self._steps: dict[tuple[int, int], Step] = {}
        self._inputs = torch.zeros(2, rows, 1, dtype=torch.int64, device=device)  # ids, positions
        self._logits = torch.zeros(rows, 1, model.args.vocab_size, device=device)

    def prepare(self) -> None:
        """Record every shape, the largest first, so that smaller ones find room in the memory that it took.

        All ranks do so together: a step holds their collectives.
        """
        for shape in self._shapes:
            self._capture(shape)

    def run(self, batch: Batch, drawn: Tensor) -> Tensor | None:
        """Run a batch of one token for each row.

        Args:
            batch: copies between rows have been done.
            drawn: the id that was drawn last in each row of the cache, int64 `[rows]`.

        Returns:
            float32 `[B, V]`, which the next step overwrites; None for a batch that has no shape here.
        """
        shape = self._find(batch)
        if shape is None:
            return None
        if shape not in self._steps:
            self._capture(shape)
        rows = self._inputs.shape[1]
        before, behind = batch.start, rows - batch.start - len(batch.tokens)
        ids = [0] * before + [row[0] if row else 0 for row in batch.tokens] + [0] * behind
        positions = [-1] * before + list(batch.positions) + [-1] * behind
        # Pinned memory is given to nobody else before the copy is done, so nothing has to wait for it.
        given = torch.tensor([ids, positions], pin_memory=self._inputs.device.type == "cuda")
        self._inputs.copy_(given[..., None], non_blocking=True)
        if LAST_DRAWN in ids:
            own = self._inputs[0, :, 0]
            own.copy_(torch.where(own == LAST_DRAWN, drawn, own))
        self._steps[shape]()
        return self._logits[before : before + len(batch.tokens), 0]

    def free(self) -> None:
        """Let go of what was recorded, before what it reads is freed; nothing can run afterwards."""
        self._steps.clear()
        self._shapes = []
        self._inputs, self._logits = (torch.empty(0, dtype=kept.dtype) for kept in (self._inputs, self._logits))

    def _find(self, batch: Batch) -> tuple[int, int] | None:
        """The smallest shape that holds a batch; None if it has none, or one that is mostly empty."""
        if batch.width != 1 or any(len(row) != wanted for row, wanted in zip(batch.tokens, batch.wanted, strict=True)):
            return None
        stop = batch.start + len(batch.tokens)
        fitting = [(rows, length) for rows, length in self._shapes if rows >= stop and length >= batch.length]
        smallest = min(fitting, default=None)
        return smallest if smallest is not None and smallest[0] <= _SPREAD * len(batch.tokens) else None

    @torch.inference_mode()
    def _capture(self, shape: tuple[int, int]) -> None:
        rows, length = shape
        ids, positions = self._inputs[0, :rows], self._inputs[1, :rows]
        view, logits = self._cache.rows(0, rows).first(length), self._logits[:rows]
        score = compile_step() if self._compiled else score_tokens

        def step() -> None:
            logits.copy_(score(self._model, ids, positions, view))

        self._inputs[0].zero_()
        self._inputs[1].fill_(-1)  # a recorder runs the step, which must write nothing then
        self._steps[shape] = self._record(step)
        self.captures += 1


def score_tokens(model: Transformer, ids: Tensor, positions: Tensor, view: KVCache) -> Tensor:
    """Write one token of each row to the cache and score what follows it: `[R, 1]` each, float32 `[R, 1, V]`."""
    return model.logits(model(ids, positions, view, on_device=True))


def compile_step() -> Callable[[Transformer, Tensor, Tensor, KVCache], Tensor]:
    """Compile `score_tokens` for one shape, apart from any other, when it first runs."""
    # torch.compile counts what it made of one code object, and refuses the ninth: each shape has its own.
    own = FunctionType(score_tokens.__code__.replace(), globals(), score_tokens.__name__)
    compiled: Callable[[Transformer, Tensor, Tensor, KVCache], Tensor]
    compiled = torch.compile(own, fullgraph=True, dynamic=False)
    return compiled


def run_plainly(step: Step) -> Step:
    """Record nothing: the step is computed each time. It runs once, as it does for any recorder."""
    step()
    return step


class CudaRecorder:
    """Makes CUDA graphs that share one pool of memory. They replay on the stream that is current then.

    cuBLAS keeps a workspace for each stream. Nothing else runs on the stream on which graphs are recorded, so that it
    is made there, in their pool, and is safe as long as they are.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the pool, and a stream to record on."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        forget_workspaces()  # streams are given out again, with what another owner left there

    def __call__(self, step: Step) -> Step:
        """Run a step until nothing of it is new, then record it.

        Other threads may use CUDA meanwhile (NCCL's watchdog does), so only this one must do nothing that a graph
        cannot hold.
        """
        with torch.cuda.device(self._device):
            for _ in range(_WARM_UPS):
                step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()  # it has waited for all that was to run before
        return graph.replay


def forget_workspaces() -> None:
    """Let cuBLAS give back what it keeps for each stream; what graphs use stays in their pool as long as they live."""
    torch._C._cuda_clearCublasWorkspaces()


def make_graphs(model: Transformer, cache: KVCache, decode: Decode | None, parallel: Parallel) -> DecodeGraphs | None:
    """Make and record the steps of a model, as `choose_decode` chooses; None where each step is computed anew.

    Graphs are recorded now, so that no step waits for it later. What is compiled takes too long for that: each shape
    is, on its first use.
    """
    device = cache.keys[0].device
    held = (layer.matrix for layers in model.matrices() for layer in layers)
    decode = choose_decode(
        decode, device, parallel, all(matrix is None or isinstance(matrix, Dense) for matrix in held)
    )
    if decode == "eager":
        return None
    record = CudaRecorder(device) if device.type == "cuda" else run_plainly
    graphs = DecodeGraphs(model, cache, record, compiled=decode == "compile")
    if decode == "graph":
        start = time.perf_counter()
        with parallel.lockstep():  # the others wait in a collective where this rank fails
            graphs.prepare()
        if parallel.world_rank == 0:
            logger.info("recorded %d decode steps in %.1f s", graphs.captures, time.perf_counter() - start)
    return graphs
