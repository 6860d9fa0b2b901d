"""What every checkpoint holds, whatever its format: canonical tensor names, full shapes, and the axis each is split on.

It knows nothing of files. The canonical names are Meta's. Source: Meta's Llama 2 and Code Llama releases; fairscale's
ParallelEmbedding splits the embedding dimension, not the vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from codellama.config import ModelArgs
from codellama.quantization import Quantization
from codellama.tokenizer import Tokenizer

SHARD_DIM: dict[str, int | None] = {
    "tok_embeddings": 1,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "attention_norm": None,
    "ffn_norm": None,
    "norm": None,
    "output": 0,
}
"""Axis along which ranks, and the files of a Meta checkpoint, split a tensor; None where each holds a copy."""


EMBEDDING = "tok_embeddings.weight"
OUTPUT = "output.weight"


class Checkpoint(Protocol):
    """Read access to weights as full tensors under canonical names, slice by slice.

    Attributes:
        format_name: what a user calls this format: meta, huggingface, gguf, quantized.
        looks_like: what a path of this format holds, for an error message.
        args: the architecture.
        quantization: how the matrices are stored; None where they are plain numbers, or blocks that only `read` knows.
    """

    format_name: ClassVar[str]
    looks_like: ClassVar[str]
    args: ModelArgs
    quantization: Quantization | None

    def __init__(self, path: Path, tokenizer_path: Path | None = None, rope_theta: float | None = None) -> None:
        """Open and check; no weights are read. The arguments are those of `open_checkpoint`."""

    @staticmethod
    def probe(path: Path) -> bool:
        """Say whether a folder or a file holds weights of this format, whole or not; cheap, and raises nothing."""

    @staticmethod
    def files(
        path: Path, tokenizer_path: Path | None = None, rope_theta: float | None = None
    ) -> Iterable[tuple[Path, Callable[[], object]]]:
        """List the files that belong to a checkpoint, each with a function that looks at this file by itself.

        The function raises CheckpointError where the file is wrong. A file that is missing may be listed or not: to
        open the checkpoint is what finds it.
        """

    def names(self) -> Iterable[str]:
        """Canonical names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full tensor."""

    def read(
        self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Copy a tensor, or its part from start to stop along dim, in the file's dtype; any thread may call it.

        Where `out` has this shape and dtype, the part may be put there, and `out` itself is then returned. Numbers that
        are stored as codes are given in float32.
        """

    def codes(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> tuple[Tensor, ...]:
        """Copy what stands for a matrix, or its part, as `put_codes_` of codellama.linear takes it; from any thread.

        Only where `quantization` is not None. Along axis 1, start and stop are where groups begin.
        """

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that belongs to the weights."""


class PlainNumbers:
    """What a checkpoint says of codes when it has none."""

    quantization: Quantization | None = None

    def codes(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> tuple[Tensor, ...]:
        """Fail: nobody may ask where `quantization` is None."""
        raise AssertionError(f"{name} is not stored as codes")


def place_for(shape: Sequence[int], dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Take `out` where it fits, else fresh memory."""
    fits = out is not None and out.shape == torch.Size(shape) and out.dtype == dtype and out.device.type == "cpu"
    return out if out is not None and fits else torch.empty(shape, dtype=dtype, device="cpu")


def is_matrix(name: str) -> bool:
    """Say whether the tensor of this canonical name is one that activations are multiplied by."""
    return shard_dim(name) is not None and name != "tok_embeddings.weight"


def shard_dim(name: str) -> int | None:
    """Axis along which the tensor of this canonical name is split; None for a copy on each rank."""
    return SHARD_DIM[name.split(".")[-2]]


def stored_name(name: str, args: ModelArgs) -> str:
    """Canonical name of the tensor that a weight of a model is read from: a tied output is the embedding."""
    return EMBEDDING if name == OUTPUT and args.tied_output else name


def tensor_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Names and full shapes of every tensor of a checkpoint, in the order of its layers; a tied output is none."""
    kv_dim = args.kv_heads * args.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (args.vocab_size, args.dim)}
    for layer in range(args.n_layers):
        prefix = f"layers.{layer}"
        shapes[f"{prefix}.attention.wq.weight"] = (args.heads_dim, args.dim)
        shapes[f"{prefix}.attention.wk.weight"] = (kv_dim, args.dim)
        shapes[f"{prefix}.attention.wv.weight"] = (kv_dim, args.dim)
        shapes[f"{prefix}.attention.wo.weight"] = (args.dim, args.heads_dim)
        shapes[f"{prefix}.feed_forward.w1.weight"] = (args.hidden_dim, args.dim)
        shapes[f"{prefix}.feed_forward.w2.weight"] = (args.dim, args.hidden_dim)
        shapes[f"{prefix}.feed_forward.w3.weight"] = (args.hidden_dim, args.dim)
        shapes[f"{prefix}.attention_norm.weight"] = (args.dim,)
        shapes[f"{prefix}.ffn_norm.weight"] = (args.dim,)
    shapes["norm.weight"] = (args.dim,)
    if not args.tied_output:
        shapes[OUTPUT] = (args.vocab_size, args.dim)
    return shapes


def rank_span(name: str, args: ModelArgs, rank: int, size: int) -> tuple[int, int, int] | None:
    """Say which part of a full tensor a model-parallel rank holds.

    Where the ranks outnumber the key/value heads, rank r holds a copy of head r · n_kv_heads // size.

    Returns:
        (dim, start, stop), or None for the whole tensor.
    """
    dim = shard_dim(name)
    if dim is None or size == 1:
        return None
    if name.split(".")[-2] in ("wk", "wv") and size > args.kv_heads:
        head = rank * args.kv_heads // size
        return dim, head * args.head_dim, (head + 1) * args.head_dim
    share = tensor_shapes(args)[stored_name(name, args)][dim] // size
    return dim, rank * share, (rank + 1) * share


def rank_inputs(args: ModelArgs, size: int) -> dict[str, int]:
    """Say how many input features a rank holds of each kind of matrix."""
    shapes = tensor_shapes(replace(args, n_layers=1, tied_output=False))
    inputs = {name.split(".")[-2]: shape[1] for name, shape in shapes.items() if len(shape) == 2}
    del inputs["tok_embeddings"]
    return {kind: count // size if SHARD_DIM[kind] == 1 else count for kind, count in inputs.items()}


def row_pieces(checkpoint: Checkpoint, name: str, piece_bytes: int) -> Iterator[Tensor]:
    """Read a tensor as pieces of whole rows, in order; those of a matrix hold whole heads where they can."""
    count = checkpoint.shape(name)[0]
    row = checkpoint.read(name, 0, 0, 1).nbytes
    step = max(1, piece_bytes // row)
    step -= step % checkpoint.args.head_dim if step > checkpoint.args.head_dim else 0
    for start in range(0, count, step):
        yield checkpoint.read(name, 0, start, min(count, start + step))
