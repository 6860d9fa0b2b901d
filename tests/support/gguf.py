"""GGUF files of our weights and a SentencePiece model, written by the `gguf` package, and headers written by hand."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from torch import Tensor

from codellama.checkpoint.gguf import gguf_name
from codellama.config import ModelArgs
from tests.support import tiny

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

ARGS = ModelArgs(
    dim=96,  # 8 heads of 12; 3 blocks of 32 a row
    n_layers=3,
    n_heads=8,
    n_kv_heads=2,
    vocab_size=tiny.VOCAB,
    multiple_of=72,  # hidden_dim 288: 9 blocks a row, 36 columns for each of 8 ranks
    rope_theta=500_000.0,
)


def vocabulary(model: bytes, user_defined: Sequence[str] = tiny.INFILLING) -> dict[str, Any]:
    """The tokenizer.ggml.* values of a SentencePiece model; its accessors do not say which pieces are user-defined."""
    words = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(words.vocab_size())
    pieces = [words.id_to_piece(id) for id in ids]
    kinds = [
        UNKNOWN if words.is_unknown(id)
        else CONTROL if words.is_control(id)
        else BYTE if words.is_byte(id)
        else USER_DEFINED if pieces[id] in user_defined
        else NORMAL
        for id in ids
    ]  # fmt: skip
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [float(words.get_score(id)) for id in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": words.bos_id(),
        "tokenizer.ggml.eos_token_id": words.eos_id(),
        "tokenizer.ggml.unknown_token_id": words.unk_id(),
    }


def architecture(args: ModelArgs, name: str = "llama") -> dict[str, Any]:
    """The values that llama.cpp's converter writes for an architecture."""
    if name == "gemma":
        return {
            "gemma.context_length": 8192,
            "gemma.embedding_length": args.dim,
            "gemma.block_count": args.n_layers,
            "gemma.feed_forward_length": args.hidden_dim,
            "gemma.attention.head_count": args.n_heads,
            "gemma.attention.head_count_kv": args.kv_heads,
            "gemma.attention.layer_norm_rms_epsilon": args.norm_eps,
            "gemma.attention.key_length": args.head_dim,
            "gemma.attention.value_length": args.head_dim,
        }
    return {
        "llama.context_length": 4096,
        "llama.embedding_length": args.dim,
        "llama.block_count": args.n_layers,
        "llama.feed_forward_length": args.hidden_dim,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": args.norm_eps,
        "llama.rope.dimension_count": args.head_dim,
        "llama.rope.freq_base": args.rope_theta,
        "llama.vocab_size": args.vocab_size,
    }


def write_gguf(
    path: Path,
    args: ModelArgs = tiny.ARGS,
    weights: Mapping[str, Tensor] | None = None,
    tokenizer: bytes | None = None,
    kind: str = "F32",
    values: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    name: str = "llama",
) -> Path:
    """Write a file with matrices of this type, and vectors in float32 as llama.cpp has them.

    Norms of a gemma are stored with the 1 that is added to them, queries and keys with the first rows of all pairs of a
    head before the second ones.

    Args:
        weights: canonical names; random ones if None.
        tokenizer: content of a tokenizer.model; the tiny one if None.
        values: metadata to change or add; None removes.
        tensors: arrays to change or add, under GGUF's names; None removes.
        name: general.architecture.
    """
    weights = tiny.random_weights(args) if weights is None else weights
    tokenizer = tiny.tokenizer_bytes(size=args.vocab_size) if tokenizer is None else tokenizer
    writer = GGUFWriter(path, name)
    for key, value in {**architecture(args, name), **vocabulary(tokenizer), **(values or {})}.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    changes = dict(tensors or {})
    for canonical, tensor in weights.items():
        theirs = gguf_name(canonical)
        if name == "gemma" and tensor.dim() == 1:
            tensor = tensor + 1
        elif name == "gemma" and canonical.endswith(("wq.weight", "wk.weight")):
            heads = tensor.view(-1, args.head_dim, args.dim)
            tensor = torch.cat([heads[:, ::2], heads[:, 1::2]], dim=1).reshape(tensor.shape)
        if theirs not in changes:
            add(writer, theirs, tensor.float().numpy(), "F32" if tensor.dim() == 1 else kind)
    for theirs, array in changes.items():
        if array is not None:
            writer.add_tensor(theirs, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    """Add an array in this type of block."""
    number = GGMLQuantizationType[kind]
    writer.add_tensor(name, quantize(np.ascontiguousarray(array), number), raw_dtype=number)


def whole(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file as the package's own reader and de-quantization give it, in float32."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(np.array(array, dtype=np.float32))
    return tensors


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    """One key and its value of a header."""
    return string(key) + struct.pack("<I", kind) + value


def string(text: str | bytes) -> bytes:
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content)) + content


def info(name: str, dims: Sequence[int], number: int = 0, offset: int = 0) -> bytes:
    """One tensor of a header."""
    shape = struct.pack(f"<{len(dims)}Q", *dims)
    return string(name) + struct.pack("<I", len(dims)) + shape + struct.pack("<IQ", number, offset)


def file_by_hand(
    pairs: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A whole file of these parts."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data
