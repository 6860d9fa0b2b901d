"""From a checkpoint of any format to a folder of another: Meta's layout in any number of files, Hugging Face's, codes.

Tensors pass through memory one after another, in pieces of rows. It knows nothing of how a format is read or written.
"""

import sys
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Never

import torch
from torch import Tensor
from tqdm import tqdm

from codellama.checkpoint import open_checkpoint
from codellama.checkpoint.huggingface_writer import write_huggingface
from codellama.checkpoint.layout import Checkpoint, is_matrix, rank_inputs, row_pieces, shard_dim
from codellama.checkpoint.meta_writer import check_shards, write_meta
from codellama.checkpoint.quantized_writer import write_quantized
from codellama.checkpoint.staging import staged_folder
from codellama.device import choose_dtype
from codellama.errors import CheckpointError, QuantizationError
from codellama.quantization import Quantization

PIECE_BYTES = 32 * 2**20
"""Tensors on their way to Meta's layout, or to codes, are read in pieces of about this size; others whole."""

WRITTEN = ("meta", "huggingface", "quantized")
"""Formats that can be written."""

_OVERHEAD = 2**20
"""What descriptions and directories of files take, generously."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    format: str | None = None,
    model_parallel_size: int = 1,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    tokenizer_path: str | Path | None = None,
    rope_theta: float | None = None,
    checkpoint_format: str | None = None,
    progress: bool = False,
) -> None:
    """Write a checkpoint of any format as a folder in another one.

    The folder appears under its name when it is complete. If anything fails, nothing is left.

    Args:
        source: the checkpoint to read, as for `open_checkpoint`.
        target: the folder to make; it must not exist.
        format: meta, huggingface or quantized; None is quantized where `quantize` is given, else meta.
        model_parallel_size: number of consolidated files, in Meta's layout.
        dtype: bfloat16, float16 or float32; None keeps that of the source. With `quantize` it is that of the embedding
            and the norms.
        quantize: int8, int4, int4-g64 or int4-g128: round the matrices, to a format that is loaded in this size.
        tokenizer_path: None means the tokenizer beside the source's weights, or inside them.
        rope_theta: base of the rotary frequencies, where the source does not say it.
        checkpoint_format: of the source, as for `open_checkpoint`.
        progress: show a bar on stderr when it takes longer than a second.

    Raises:
        CheckpointError: the source is not whole, the target exists or does not fit on the disk, or a number of the
            source is too large for dtype.
        ParallelSizeError: model_parallel_size does not divide the model.
        QuantizationError: quantize is unknown, its groups do not divide the matrices, or the source is quantized.
        ValueError: a format or dtype that cannot be written, or not with the other arguments.
    """
    source, target = Path(source), Path(target)
    quantization = Quantization.parse(quantize)
    if format is None:
        format = "meta" if quantization is None else "quantized"
    if format not in WRITTEN:
        raise ValueError(f"format is {format!r}; one of {', '.join(WRITTEN)} was expected")
    if format != "meta" and model_parallel_size != 1:
        raise ValueError(f"model_parallel_size is {model_parallel_size}; only Meta's layout has a file for each rank")
    if (format == "quantized") != (quantization is not None):
        raise ValueError(
            f"format is {format!r} and quantize is {quantize!r}; codes are a format of their own: pass quantize alone"
        )
    kind = None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{target} is inside of {source}, which is only read: name a folder outside of it")
    checkpoint = open_checkpoint(source, tokenizer_path, rope_theta, checkpoint_format=checkpoint_format)
    if format == "meta":
        check_shards(checkpoint.args, model_parallel_size)
    if format == "huggingface" and kind is None:
        kind = _common_dtype(checkpoint)
    if quantization is not None:
        _check_quantization(checkpoint, source, quantization)
    sizes = _written_bytes(checkpoint, kind, model_parallel_size, quantization)
    tokenizer = checkpoint.tokenizer().model_bytes
    with (
        staged_folder(target, sum(sizes.values()) + len(tokenizer) + model_parallel_size * _OVERHEAD) as folder,
        tqdm(
            total=sum(sizes.values()), unit="B", unit_scale=True, desc="converting", delay=1, disable=not progress
        ) as bar,
    ):
        if quantization is not None:
            plain = [name for name in sizes if not is_matrix(name)]
            dtypes = {name: kind or checkpoint.read(name, 0, 0, 1).dtype for name in plain}
            tensors = _tensors(checkpoint, sizes, dtypes, PIECE_BYTES, bar)
            write_quantized(folder, checkpoint.args, tensors, quantization, dtypes, tokenizer)
        elif kind is None or format == "meta":
            tensors = _tensors(checkpoint, sizes, {} if kind is None else dict.fromkeys(sizes, kind), PIECE_BYTES, bar)
            write_meta(folder, checkpoint.args, tensors, model_parallel_size, tokenizer)
        else:
            tensors = _tensors(checkpoint, sizes, dict.fromkeys(sizes, kind), sys.maxsize, bar)
            whole = ((name, next(iter(piece))) for name, piece in tensors)
            write_huggingface(folder, checkpoint.args, whole, tokenizer, kind)


def _tensors(
    checkpoint: Checkpoint,
    sizes: dict[str, int],
    dtypes: dict[str, torch.dtype],
    piece_bytes: int,
    bar: "tqdm[Never]",
) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Read the tensors in pieces, those that `dtypes` names converted; the bar grows by what is written of each."""
    for name, size in sizes.items():
        pieces = row_pieces(checkpoint, name, piece_bytes)
        yield name, ((_cast(name, piece, dtypes[name]) for piece in pieces) if name in dtypes else pieces)
        bar.update(size)


def _cast(name: str, piece: Tensor, dtype: torch.dtype) -> Tensor:
    cast = piece.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(piece.dtype).max
    if narrower and not torch.equal(cast.isfinite(), piece.isfinite()):
        raise CheckpointError(
            f"{name} holds {piece.abs().max().item():g}, too large for {dtype}, which ends at "
            f"{torch.finfo(dtype).max:g}: choose another dtype"
        )
    return cast


def _common_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Find the dtype that holds every tensor's numbers exactly; Hugging Face's config.json names one for all."""
    return reduce(torch.promote_types, (checkpoint.read(name, 0, 0, 1).dtype for name in checkpoint.names()))


def _check_quantization(checkpoint: Checkpoint, source: Path, quantization: Quantization) -> None:
    if checkpoint.quantization is not None:
        raise QuantizationError(
            f"{source} is quantized already, as {checkpoint.quantization}, and rounding twice costs twice: convert the "
            f"original weights, or copy the folder"
        )
    if beyond := checkpoint.args.beyond_params:
        listed = ", ".join(f"{name} {value}" for name, value in beyond.items())
        raise QuantizationError(
            f"a file of codes describes Llama only, and has no words for {listed}: quantize at load"
        )
    quantization.check(rank_inputs(checkpoint.args, 1))


def _written_bytes(
    checkpoint: Checkpoint, dtype: torch.dtype | None, copies: int, quantization: Quantization | None
) -> dict[str, int]:
    """Bytes that each tensor takes in all files together; a tensor that is not split is in each of them."""
    sizes = {}
    for name in checkpoint.names():
        if quantization is not None and is_matrix(name):
            rows, columns = checkpoint.shape(name)
            sizes[name] = quantization.nbytes(rows, columns)
            continue
        itemsize = (dtype or checkpoint.read(name, 0, 0, 1).dtype).itemsize
        count = torch.Size(checkpoint.shape(name)).numel()
        sizes[name] = itemsize * count * (copies if shard_dim(name) is None else 1)
    return sizes
