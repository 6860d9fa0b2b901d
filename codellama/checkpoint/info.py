"""What a checkpoint is, without loading it: format, files, architecture, what its tokenizer allows, memory it needs.

It knows nothing of how well a model does what its tokenizer allows: no file says what it was trained for.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from codellama.checkpoint import choose_quantization, open_checkpoint
from codellama.checkpoint.layout import is_matrix, rank_inputs
from codellama.checkpoint.report import format_table
from codellama.config import ModelArgs, RuntimeArgs
from codellama.device import choose_dtype, compute_dtype
from codellama.errors import ParallelSizeError, QuantizationError
from codellama.memory import Budget, format_bytes, plan_budget
from codellama.parallel import Parallel
from codellama.quantization import Quantization
from codellama.tokenizer import Tokenizer

SIZES = (1, 2, 4, 8)
"""Numbers of ranks for which memory is told, where they divide the model."""


@dataclass(frozen=True)
class Info:
    """A checkpoint in numbers.

    Attributes:
        format: meta, huggingface, gguf or quantized.
        files: names and bytes of its files.
        parameters: numbers in all tensors.
        dtypes: what the tensors are stored as, or read as; matrices that are codes by the name of their quantization.
        args: the architecture.
        infilling: whether the tokenizer has the four pieces of infilling.
        chat: the chat format that the tokenizer calls for: steps (70B Instruct), turns (CodeGemma) or instruct.
        runtime, dtype, quantization: what `budgets` is for.
        budgets: what each rank needs, by number of ranks.
    """

    format: str
    files: dict[str, int]
    parameters: int
    dtypes: tuple[str, ...]
    args: ModelArgs
    infilling: bool
    chat: str
    runtime: RuntimeArgs
    dtype: str
    quantization: Quantization | None
    budgets: dict[int, Budget]

    def describe(self) -> str:
        """Write everything as a table."""
        sizes = {**asdict(self.args), "head_dim": self.args.head_dim, "hidden_dim": self.args.hidden_dim}
        budgets = [(f"{size} rank{'s' * (size > 1)}", _memory(budget)) for size, budget in self.budgets.items()]
        rows = [
            ("format", self.format),
            ("files", ", ".join(f"{name} {format_bytes(size)}" for name, size in self.files.items())),
            ("on disk", format_bytes(sum(self.files.values()))),
            ("parameters", f"{self.parameters:,}"),
            ("stored as", ", ".join(self.dtypes)),
            *((name, str(value)) for name, value in sizes.items() if value is not None),
            ("infilling", "yes, if the model was trained for it" if self.infilling else "no: the pieces are missing"),
            ("chat format", self.chat),
            ("runs as", f"{self._held()}, {self.runtime.max_batch_size} rows of {self.runtime.max_seq_len} tokens"),
            *budgets,
        ]
        return format_table(rows)

    def _held(self) -> str:
        return self.dtype if self.quantization is None else f"{self.quantization}, the rest {self.dtype}"


def info(
    path: str | Path,
    max_seq_len: int = 2048,
    max_batch_size: int = 4,
    dtype: str | torch.dtype | None = None,
    *,
    quantize: str | None = None,
    checkpoint_format: str | None = None,
    tokenizer_path: str | Path | None = None,
    rope_theta: float | None = None,
) -> Info:
    """Open a checkpoint and describe it.

    Args:
        path: the folder, or the file where the format is one file.
        max_seq_len: tokens of a row of the cache, for the memory.
        max_batch_size: rows of the cache, for the memory.
        dtype: what it will run as; None means the one that would be chosen for the CPU of this machine.
        quantize: what it will be rounded to as it is loaded; codes are loaded as they are.
        checkpoint_format: as for `open_checkpoint`.
        tokenizer_path: None means the one beside the weights, or inside them.
        rope_theta: base of the rotary frequencies, where the weights' own description has none.

    Raises:
        CheckpointError: it cannot be opened; `verify` says more.
        QuantizationError: quantize is unknown, or the weights have other codes.
    """
    asked, cpu = Quantization.parse(quantize), torch.device("cpu")
    kind = choose_dtype(dtype, cpu)
    itemsize = compute_dtype(kind, cpu).itemsize
    runtime = RuntimeArgs(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    checkpoint = open_checkpoint(path, tokenizer_path, rope_theta, checkpoint_format=checkpoint_format)
    args, words, stored = checkpoint.args, checkpoint.tokenizer(), checkpoint.quantization
    quantization = choose_quantization(checkpoint, asked)
    listed = checkpoint.files(Path(path), None if tokenizer_path is None else Path(tokenizer_path), rope_theta)
    plain = [name for name in checkpoint.names() if stored is None or not is_matrix(name)]
    dtypes = {str(checkpoint.read(name, 0, 0, 1).dtype).removeprefix("torch.") for name in plain}
    return Info(
        format=checkpoint.format_name,
        files={file.name: file.stat().st_size for file, _ in listed if file.is_file()},
        parameters=sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names()),
        dtypes=tuple(sorted(dtypes | ({str(stored)} if stored else set()))),
        args=args,
        infilling=words.can_infill,
        chat=_chat_format(words),
        runtime=runtime,
        dtype=str(kind).removeprefix("torch."),
        quantization=quantization,
        budgets={
            size: plan_budget(args, runtime, size, itemsize, kind.itemsize, quantization)
            for size in SIZES
            if _divides(args, size, quantization)
        },
    )


def _chat_format(words: Tokenizer) -> str:
    if words.step_id is not None:
        return "steps"
    return "instruct" if None in (words.turn_start_id, words.turn_end_id) else "turns"


def _memory(budget: Budget) -> str:
    parts = {"weights": budget.weights, "cache": budget.cache, "workspace": budget.workspace}
    summed = " + ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    return f"{summed} = {format_bytes(budget.total)} on each"


def _divides(args: ModelArgs, size: int, quantization: Quantization | None) -> bool:
    try:
        Parallel(size=size).check_divides(args)
        if quantization is not None:
            quantization.check(rank_inputs(args, size))
    except (ParallelSizeError, QuantizationError):
        return False
    return True
