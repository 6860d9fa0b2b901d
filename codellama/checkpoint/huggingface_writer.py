"""Write a folder in Hugging Face's layout, tensor by tensor, for models that are larger than memory.

It knows nothing of where the tensors come from, nor of temporary names: it writes plainly into the folder.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from codellama.checkpoint.buffers import memory_of
from codellama.checkpoint.head_rows import needs_pairs, split_pairs
from codellama.checkpoint.huggingface import INDEX, WEIGHTS, huggingface_name
from codellama.checkpoint.huggingface_config import config_from_args
from codellama.checkpoint.layout import tensor_shapes
from codellama.checkpoint.safetensors_header import DTYPES, header_bytes, place_tensors
from codellama.config import ModelArgs
from codellama.tokenizer import Tokenizer


def write_huggingface(
    folder: Path,
    args: ModelArgs,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: bytes,
    dtype: torch.dtype,
    max_file_bytes: float = 5e9,
    max_position_embeddings: int | None = None,
) -> None:
    """Write full tensors as a folder in Hugging Face's layout, holding about one of them in memory.

    Where all fits into one file it is model.safetensors, else several files and an index.

    Args:
        folder: made if it does not exist.
        args: the architecture, as it goes to config.json.
        tensors: (canonical name, full tensor), each once, in any order.
        tokenizer: content of tokenizer.model.
        dtype: what the tensors are converted to: bfloat16, float16 or float32.
        max_file_bytes: a file holds at most so many bytes of data, but at least one tensor.
        max_position_embeddings: the trained context, in tokens; advice to programs that ask for a limit. None means
            that of the published models: 16,384 of Code Llama, 8,192 of CodeGemma.

    Raises:
        CheckpointError: no config.json of the layout's describes the architecture.
        ValueError: a dtype that is none of the three.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}; {', '.join(map(str, DTYPES.values()))} can be written")
    words = Tokenizer.from_bytes(tokenizer, "the tokenizer")
    name_of_dtype = str(dtype).removeprefix("torch.")
    config = config_from_args(args, name_of_dtype, words.bos_id, words.eos_id, max_position_embeddings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    _write_json(folder / "config.json", config)

    parts = _divide(tensor_shapes(args), dtype, max_file_bytes)
    numbered = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    files = [WEIGHTS] if len(parts) == 1 else numbered
    weight_map, places, total = {}, {}, 0
    for file, part in zip(files, parts, strict=True):
        entries = place_tensors((huggingface_name(name), shape, dtype) for name, shape in part.items())
        header = header_bytes(entries)
        (folder / file).write_bytes(header)
        for name, (theirs, entry) in zip(part, entries.items(), strict=True):
            weight_map[theirs] = file
            places[name] = file, len(header) + entry.begin, entry.shape
            total += entry.end - entry.begin
    if len(parts) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    for name, tensor in tensors:
        assert name in places, f"{name} was given twice, or belongs to another model"
        file, position, shape = places.pop(name)
        assert tensor.shape == shape, f"{name}: {tuple(tensor.shape)} for {shape}"
        tensor = tensor.to(device="cpu", dtype=dtype)
        if needs_pairs(name):
            tensor = split_pairs(tensor, args.head_dim)
        with (folder / file).open("r+b") as open_file:
            open_file.seek(position)
            _write_tensor(open_file, tensor)
    assert not places, f"{len(places)} tensors were not given, {next(iter(places))} among them"


def _divide(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, max_file_bytes: float
) -> list[dict[str, tuple[int, ...]]]:
    """Fill one file after the other, in the order of the layers."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if parts[-1] and filled + size > max_file_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = shape
        filled += size
    return parts


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    file.write(memory_of(tensor.contiguous()))


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
