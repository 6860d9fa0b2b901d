"""The order of a head's rows: files that keep them as two halves, and the adjacent pairs of the canonical tensors.

A rotary position turns pairs of a head's queries and keys. Meta's releases, and GGUF files of architecture llama, keep
the two of a pair next to each other. Hugging Face's files, and GGUF files of architecture gemma, keep the first of each
pair before the second of each. It knows nothing of files. Source: transformers' modeling_llama.py, and its
convert_llama_weights_to_hf.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Span = tuple[int, int]


def needs_pairs(name: str) -> bool:
    """Say whether the rows of this canonical tensor have such an order: queries and keys, which are rotated."""
    return name.endswith((".attention.wq.weight", ".attention.wk.weight"))


def read_pairs(read: Callable[[list[Span]], Tensor], spans: Sequence[Span], head_dim: int) -> Tensor:
    """Read a part of a matrix whose heads are stored as two halves.

    A row stands elsewhere in the same head, so whole heads are read and cut afterwards.

    Args:
        read: gives rows and columns from the first to before the last, as they are stored.
        spans: of the rows and of the columns that are wanted.
        head_dim: rows of a head.

    Returns:
        The rows in the order of adjacent pairs; a copy that holds nothing else.
    """
    (first, last), columns = spans
    begin = first - first % head_dim
    rows = interleave_halves(read([(begin, last + -last % head_dim), columns]), head_dim)
    part = rows[first - begin : last - begin]
    return part if part.shape == rows.shape else part.clone()


def interleave_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Copy rows of whole heads from two halves to adjacent pairs: row i of half j becomes row 2i + j of its head.

    Args:
        rows: [heads · head_dim, columns], as in Hugging Face's files.
        head_dim: rows of a head.

    Returns:
        The same shape, as in Meta's files.
    """
    return _swap(rows, 2, head_dim // 2)


def split_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Copy rows of whole heads from adjacent pairs to two halves; the inverse of `interleave_halves`."""
    return _swap(rows, head_dim // 2, 2)


def _swap(rows: Tensor, outer: int, inner: int) -> Tensor:
    copy = torch.empty(rows.shape, dtype=rows.dtype)
    heads, columns = rows.shape[0] // (outer * inner), rows.shape[1]
    groups = rows.view(heads, outer, inner, columns)
    copy.view(heads, inner, outer, columns).copy_(groups.transpose(1, 2))
    return copy
