"""From a checkpoint of any format to a folder of another: Meta's layout with any number of files, or Hugging Face's.

Tensors pass through memory one after another, in pieces of rows. It knows nothing of how a format is read or written.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Never

import torch
from torch import Tensor
from tqdm import tqdm

from codellama.checkpoint import open_checkpoint
from codellama.checkpoint.layout import Checkpoint, shard_dim
from codellama.checkpoint.meta_writer import check_shards, write_meta
from codellama.checkpoint.staging import staged_folder
from codellama.device import choose_dtype
from codellama.errors import CheckpointError

PIECE_BYTES = 32 * 2**20
"""Tensors are read in pieces of at most about this size."""

WRITTEN = ("meta",)
"""Formats that can be written."""

_OVERHEAD = 2**20
"""What descriptions and directories of files take, generously."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    format: str,
    model_parallel_size: int = 1,
    dtype: str | torch.dtype | None = None,
    tokenizer_path: str | Path | None = None,
    rope_theta: float | None = None,
    progress: bool = False,
) -> None:
    """Write a checkpoint of any format as a folder in another one.

    The folder appears under its name when it is complete. If anything fails, nothing is left.

    Args:
        source: the checkpoint to read, as for `open_checkpoint`.
        target: the folder to make; it must not exist.
        format: meta or huggingface.
        model_parallel_size: number of consolidated files, in Meta's layout.
        dtype: bfloat16, float16 or float32; None keeps that of the source.
        tokenizer_path: None means the tokenizer beside the source's weights, or inside them.
        rope_theta: base of the rotary frequencies, where the source does not say it.
        progress: show a bar on stderr when it takes longer than a second.

    Raises:
        CheckpointError: the source is not whole, the target exists or does not fit on the disk, or a number of the
            source is too large for dtype.
        ParallelSizeError: model_parallel_size does not divide the model.
        ValueError: a format or dtype that cannot be written.
    """
    source, target = Path(source), Path(target)
    if format not in WRITTEN:
        raise ValueError(f"format is {format!r}; one of {', '.join(WRITTEN)} was expected")
    kind = None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{target} is inside of {source}, which is only read: name a folder outside of it")
    checkpoint = open_checkpoint(source, tokenizer_path, rope_theta)
    check_shards(checkpoint.args, model_parallel_size)
    sizes = _written_bytes(checkpoint, kind, model_parallel_size)
    tokenizer = checkpoint.tokenizer().model_bytes
    with (
        staged_folder(target, sum(sizes.values()) + len(tokenizer) + model_parallel_size * _OVERHEAD) as folder,
        tqdm(
            total=sum(sizes.values()), unit="B", unit_scale=True, desc="converting", delay=1, disable=not progress
        ) as bar,
    ):
        tensors = _tensors(checkpoint, sizes, bar)
        write_meta(folder, checkpoint.args, tensors, model_parallel_size, tokenizer, kind)


def row_pieces(checkpoint: Checkpoint, name: str, piece_bytes: int) -> Iterator[Tensor]:
    """Read a tensor as pieces of whole rows, in order; those of a matrix hold whole heads where they can."""
    count = checkpoint.shape(name)[0]
    row = checkpoint.read(name, 0, 0, 1).nbytes
    step = max(1, piece_bytes // row)
    step -= step % checkpoint.args.head_dim if step > checkpoint.args.head_dim else 0
    for start in range(0, count, step):
        yield checkpoint.read(name, 0, start, min(count, start + step))


def _tensors(
    checkpoint: Checkpoint, sizes: dict[str, int], bar: "tqdm[Never]"
) -> Iterator[tuple[str, Iterable[Tensor]]]:
    for name, size in sizes.items():
        yield name, row_pieces(checkpoint, name, PIECE_BYTES)
        bar.update(size)


def _written_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None, copies: int) -> dict[str, int]:
    """Bytes that each tensor takes in all files together; a tensor that is not split is in each of them."""
    sizes = {}
    for name in checkpoint.names():
        itemsize = (dtype or checkpoint.read(name, 0, 0, 1).dtype).itemsize
        count = torch.Size(checkpoint.shape(name)).numel()
        sizes[name] = itemsize * count * (copies if shard_dim(name) is None else 1)
    return sizes
