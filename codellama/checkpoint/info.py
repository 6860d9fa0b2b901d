"""What a checkpoint is, without loading it: format, files, architecture, what its tokenizer allows, memory it needs.

It knows nothing of how well a model does what its tokenizer allows: no file says what it was trained for.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from codellama.checkpoint import open_checkpoint
from codellama.checkpoint.report import format_table
from codellama.config import ModelArgs, RuntimeArgs
from codellama.device import choose_dtype
from codellama.errors import ParallelSizeError
from codellama.memory import Budget, format_bytes, plan_budget
from codellama.parallel import Parallel
from codellama.tokenizer import Tokenizer

SIZES = (1, 2, 4, 8)
"""Numbers of ranks for which memory is told, where they divide the model."""


@dataclass(frozen=True)
class Info:
    """A checkpoint in numbers.

    Attributes:
        format: meta, huggingface or gguf.
        files: names and bytes of its files.
        parameters: numbers in all tensors.
        dtypes: what the tensors are stored as, or read as.
        args: the architecture.
        infilling: whether the tokenizer has the four pieces of infilling.
        chat: the chat format that the tokenizer calls for: steps (70B Instruct), turns (CodeGemma) or instruct.
        runtime, dtype: what `budgets` is for.
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
            ("runs as", f"{self.dtype}, {self.runtime.max_batch_size} rows of {self.runtime.max_seq_len} tokens"),
            *budgets,
        ]
        return format_table(rows)


def info(
    path: str | Path,
    max_seq_len: int = 2048,
    max_batch_size: int = 4,
    dtype: str | torch.dtype | None = None,
    *,
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
        checkpoint_format: as for `open_checkpoint`.
        tokenizer_path: None means the one beside the weights, or inside them.
        rope_theta: base of the rotary frequencies, where the weights' own description has none.

    Raises:
        CheckpointError: it cannot be opened; `verify` says more.
    """
    kind = choose_dtype(dtype, torch.device("cpu"))
    runtime = RuntimeArgs(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    checkpoint = open_checkpoint(path, tokenizer_path, rope_theta, checkpoint_format=checkpoint_format)
    args, words = checkpoint.args, checkpoint.tokenizer()
    listed = checkpoint.files(Path(path), None if tokenizer_path is None else Path(tokenizer_path), rope_theta)
    dtypes = {str(checkpoint.read(name, 0, 0, 1).dtype).removeprefix("torch.") for name in checkpoint.names()}
    return Info(
        format=checkpoint.format_name,
        files={file.name: file.stat().st_size for file, _ in listed if file.is_file()},
        parameters=sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names()),
        dtypes=tuple(sorted(dtypes)),
        args=args,
        infilling=words.can_infill,
        chat=_chat_format(words),
        runtime=runtime,
        dtype=str(kind).removeprefix("torch."),
        budgets={size: plan_budget(args, runtime, size, kind.itemsize) for size in SIZES if _divides(args, size)},
    )


def _chat_format(words: Tokenizer) -> str:
    if words.step_id is not None:
        return "steps"
    return "instruct" if None in (words.turn_start_id, words.turn_end_id) else "turns"


def _memory(budget: Budget) -> str:
    parts = {"weights": budget.weights, "cache": budget.cache, "workspace": budget.workspace}
    summed = " + ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    return f"{summed} = {format_bytes(budget.total)} on each"


def _divides(args: ModelArgs, size: int) -> bool:
    try:
        Parallel(size=size).check_divides(args)
    except ParallelSizeError:
        return False
    return True
