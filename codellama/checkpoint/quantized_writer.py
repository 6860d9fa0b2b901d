"""Write a folder of codes as a stream: quantized.safetensors, tokenizer.model, checklist.chk.

A matrix arrives as pieces of its rows and leaves as codes, so memory holds one piece, and the scales of one matrix. It
knows nothing of where the numbers come from.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from codellama.checkpoint.buffers import memory_of
from codellama.checkpoint.layout import is_matrix, tensor_shapes
from codellama.checkpoint.quantized import FORMAT, VERSION, WEIGHTS, stored_tensors
from codellama.checkpoint.safetensors_header import header_bytes, place_tensors
from codellama.config import BEYOND_PARAMS, ModelArgs
from codellama.errors import CheckpointError
from codellama.linear.int4 import quantize_int4
from codellama.linear.int8 import quantize_int8
from codellama.quantization import Quantization


def write_quantized(
    folder: Path,
    args: ModelArgs,
    tensors: Iterable[tuple[str, Iterable[Tensor]]],
    quantization: Quantization,
    dtypes: Mapping[str, torch.dtype],
    tokenizer: bytes,
) -> None:
    """Quantize full tensors and write them, with a checklist.chk of md5 sums.

    Args:
        folder: made if it does not exist.
        args: the architecture.
        tensors: (canonical name, the full tensor as pieces of rows, in order), in the order of `tensor_shapes`.
        quantization: how matrices are rounded; its groups divide them.
        dtypes: what the embedding and the norms are written in, by canonical name.
        tokenizer: content of tokenizer.model.

    Raises:
        CheckpointError: a number of a matrix is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    params = {key: value for key, value in asdict(args).items() if value is not None and key not in BEYOND_PARAMS}
    metadata = {"format": FORMAT, "version": VERSION, "quantize": str(quantization), "params": json.dumps(params)}
    entries = place_tensors(stored_tensors(args, quantization, dtypes))
    shapes = tensor_shapes(args)
    with (folder / WEIGHTS).open("wb") as file:
        sink = _Sink(file)
        begin = sink.write(header_bytes(entries, metadata))
        for (name, pieces), expected in zip(tensors, shapes, strict=True):
            assert name == expected, f"{name} came where {expected} is due"
            if is_matrix(name):
                _write_codes(sink, name, pieces, quantization)
            else:
                for piece in pieces:
                    sink.write_tensor(piece.to(dtypes[name]))
            last = entries[f"{name}.{_last(quantization)}" if is_matrix(name) else name]
            assert sink.position == begin + last.end, f"{name}: not of the shape {shapes[name]}"
    (folder / "tokenizer.model").write_bytes(tokenizer)
    sums = {WEIGHTS: sink.md5.hexdigest(), "tokenizer.model": hashlib.md5(tokenizer).hexdigest()}
    (folder / "checklist.chk").write_text("".join(f"{md5}  {name}\n" for name, md5 in sums.items()))


def _write_codes(sink: "_Sink", name: str, pieces: Iterable[Tensor], quantization: Quantization) -> None:
    """Write the codes as they come, and the rest, which is small, behind them."""
    kept: list[tuple[Tensor, ...]] = []
    for piece in pieces:
        if not piece.isfinite().all():
            raise CheckpointError(
                f"{name} holds NaN or infinity, which no code stands for: `codellama verify` says more"
            )
        if quantization.group is None:
            codes, *rest = quantize_int8(piece)
        else:
            codes, *rest = quantize_int4(piece, quantization.group)
        sink.write_tensor(codes)
        kept.append(tuple(rest))
    for parts in zip(*kept, strict=True):
        sink.write_tensor(torch.cat(parts))


def _last(quantization: Quantization) -> str:
    return "scales" if quantization.group is None else "zeros"


class _Sink:
    """A file that counts and hashes what passes, so that it is not read again for its md5."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.md5 = hashlib.md5()
        self.position = 0

    def write(self, data: bytes | memoryview) -> int:
        self._file.write(data)
        self.md5.update(data)
        self.position += len(data)
        return len(data)

    def write_tensor(self, tensor: Tensor) -> None:
        tensor = tensor.contiguous()  # its memory is valid as long as it is
        self.write(memory_of(tensor))
