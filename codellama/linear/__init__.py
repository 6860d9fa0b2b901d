"""Ways to hold a weight matrix: in full numbers, packed float16, int8, int4. One file for each.

They know nothing of ranks, layers or files.
"""

import torch

from codellama.linear.dense import Dense, PackedHalf
from codellama.linear.int4 import Int4
from codellama.linear.int8 import Int8
from codellama.linear.matrix import Matrix
from codellama.quantization import Quantization

__all__ = ["Dense", "Int4", "Int8", "Matrix", "PackedHalf", "make_matrix"]


def make_matrix(
    out_features: int,
    in_features: int,
    held: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
) -> Matrix:
    """Make an empty matrix.

    Args:
        out_features: rows.
        in_features: columns.
        held: dtype of the numbers where they are not quantized; as `device.compute_dtype` pairs it with the next.
        compute: dtype of activations.
        device: where it lies.
        quantization: how the numbers are rounded; None is not.
    """
    if quantization is not None and quantization.group is not None:
        return Int4(out_features, in_features, compute, device, quantization.group)
    if quantization is not None:
        return Int8(out_features, in_features, compute, device)
    if held != compute:
        return PackedHalf(out_features, in_features, compute)
    return Dense(out_features, in_features, compute, device)
