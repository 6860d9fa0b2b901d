"""What puts a generator together: open the checkpoint, agree, check the budget, load, and make cache and engine.

Arguments in, a Generator's parts out, the same on all ranks. It knows nothing of calls, of texts, or of a server.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from codellama.cache import KVCache
from codellama.checkpoint import choose_quantization, load_model, open_checkpoint
from codellama.config import RuntimeArgs
from codellama.device import choose_device, choose_dtype, compute_dtype, free_memory, use_device
from codellama.errors import RankError
from codellama.generation.engine import Engine
from codellama.generation.graphs import choose_decode, decode_shapes, make_graphs
from codellama.generation.prompt import PromptMaker
from codellama.generation.runner import Runner
from codellama.generation.scheduler import Scheduler
from codellama.memory import plan_budget
from codellama.model import Transformer
from codellama.parallel import Parallel, join
from codellama.quantization import Quantization
from codellama.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEMO = Path(__file__).parent / "demo"
"""The bundled demo checkpoint: a small model of our own training, not Meta's weights. See its MODEL_CARD.md."""


@dataclass(frozen=True)
class Parts:
    """What a generator consists of on this rank; the fields are described where `codellama.Llama` has them."""

    model: Transformer
    tokenizer: Tokenizer
    runtime: RuntimeArgs
    parallel: Parallel
    engine: Engine
    prompts: PromptMaker


def assemble(
    ckpt_dir: str | Path | None,
    tokenizer_path: str | Path | None,
    runtime: RuntimeArgs,
    model_parallel_size: int | None,
    device: str | int | torch.device | None,
    dtype: str | torch.dtype | None,
    seed: int | None,
    rope_theta: float | None,
    checkpoint_format: str | None,
    progress: bool | None,
    quantize: str | None = None,
    on_lost: Callable[[RankError], None] | None = None,
) -> Parts:
    """Load a checkpoint and make all that generates with it; the arguments are those of `Llama.build` and `join`.

    Raises:
        CheckpointError: the files are not what they should be.
        ParallelSizeError: the model does not split over that many ranks.
        QuantizationError: quantize is unknown, its groups do not divide the matrices, or the weights have other codes.
        MemoryBudgetError: weights, cache and workspace do not fit.
        RankError: another rank is gone.
    """
    asked = Quantization.parse(quantize)
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    use_device(place)
    parallel = join(model_parallel_size, place, on_lost)
    dense = asked is None and kind == compute_dtype(kind, place)
    decode = choose_decode(runtime.decode, place, parallel, dense)
    first = parallel.world_rank == 0
    if ckpt_dir is None and first:
        logger.info("no ckpt_dir given: using the bundled demo checkpoint, a small model that is not Meta's")
    path = DEMO if ckpt_dir is None else ckpt_dir
    checkpoint = parallel.agree(
        lambda: open_checkpoint(path, tokenizer_path, rope_theta, checkpoint_format=checkpoint_format)
    )
    quantization = parallel.agree(lambda: choose_quantization(checkpoint, asked))

    def check() -> str:
        parallel.check_divides(checkpoint.args)
        itemsize = compute_dtype(kind, place).itemsize
        graphs = len(decode_shapes(runtime.max_batch_size, runtime.max_seq_len)) if decode == "graph" else 0
        budget = plan_budget(checkpoint.args, runtime, parallel.size, itemsize, kind.itemsize, quantization, graphs)
        free = free_memory(place)
        budget.check(free)
        return budget.describe(free)

    line = parallel.agree(check)
    if first:
        held = str(quantization or kind).removeprefix("torch.")
        logger.info("%s, %s on %d rank(s); %s", held, place, parallel.size, line)
    show = first and sys.stderr.isatty() if progress is None else progress
    model = parallel.agree(lambda: load_model(checkpoint, parallel, place, kind, show, quantization))
    words = checkpoint.tokenizer()
    return parallel.agree(lambda: equip(model, words, runtime, parallel, seed))


def equip(
    model: Transformer, tokenizer: Tokenizer, runtime: RuntimeArgs, parallel: Parallel, seed: int | None
) -> Parts:
    """Make cache, engine and prompt maker for a loaded model."""
    weight = model.norm.weight
    cache = KVCache.allocate(
        model.args,
        rows=runtime.max_batch_size,
        max_seq_len=runtime.max_seq_len,
        dtype=weight.dtype if runtime.cache_dtype is None else torch.int8,
        device=weight.device,
        model_parallel_size=parallel.size,
    )
    graphs = make_graphs(model, cache, runtime.decode, parallel)
    engine = Engine(Runner(model, cache, weight.device, graphs), Scheduler(runtime), parallel)
    prompts = PromptMaker(tokenizer, model.args.vocab_size, runtime.max_seq_len, seed)
    return Parts(model, tokenizer, runtime, parallel, engine, prompts)
