"""Tiny models with random weights, in which all dimensions differ, so that a swapped axis cannot pass."""

import io
import math
from functools import cache
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from codellama.checkpoint import tensor_shapes, write_huggingface, write_meta
from codellama.checkpoint.layout import shard_dim
from codellama.config import ModelArgs
from codellama.model import Transformer
from codellama.tokenizer import Tokenizer

VOCAB = 320
ARGS = ModelArgs(
    dim=48,  # 8 heads of 6
    n_layers=3,
    n_heads=8,
    n_kv_heads=2,
    vocab_size=VOCAB,
    multiple_of=40,  # hidden_dim 160
    rope_theta=10_000.0,
)

GEMMAS = {
    name: ModelArgs(
        dim=dim,  # never n_heads · head_dim
        n_layers=2,
        n_heads=4,
        n_kv_heads=n_kv_heads,
        vocab_size=VOCAB,
        multiple_of=hidden_dim,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        head_dim=head_dim,
        activation="gelu_tanh",
        norm_offset=1,
        embedding_scale=math.sqrt(dim),
        tied_output=True,
    )
    for name, dim, n_kv_heads, head_dim, hidden_dim in (
        ("one of four", 64, 1, 32, 192),
        ("four of four", 80, 4, 12, 256),
    )
}
"""Tiny models with all that CodeGemma differs in, by their key/value heads."""

INFILLING = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")


def random_weights(args: ModelArgs, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Full tensors under canonical names; wide enough that greedy tokens are not ties, norms away from 1.

    Where the output is the embedding, what the layers add is larger, or each token would be followed by itself.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(args).items():
        values = torch.randn(shape, generator=generator)
        if shard_dim(name) is None:
            weights[name] = (1 - args.norm_offset + 0.1 * values).to(dtype)
        else:
            size = 6.0 if args.tied_output and name.endswith(("wo.weight", "w2.weight")) else 1.5
            weights[name] = (values * size * shape[-1] ** -0.5).to(dtype)
    return weights


def whole_model(args: ModelArgs, weights: dict[str, Tensor]) -> Transformer:
    """The model on one rank, in the weights' dtype."""
    model = Transformer(args)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False).eval()


@cache
def tokenizer_bytes(pieces: tuple[str, ...] = INFILLING, size: int = VOCAB) -> bytes:
    """A small tokenizer with byte fallback and these user-defined pieces."""
    text = ["def f(x):", "    return x + 1", "for i in range(10):", "print(i)", "the quick brown fox", "import os"] * 9
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=list(pieces),
        minloglevel=2,
    )
    return model.getvalue()


def tiny_tokenizer(folder: Path, pieces: tuple[str, ...] = INFILLING, size: int = VOCAB) -> Tokenizer:
    """Write such a tokenizer to a folder and load it."""
    path = folder / "tokenizer.model"
    path.write_bytes(tokenizer_bytes(pieces, size))
    return Tokenizer(path)


def tiny_checkpoint(
    folder: Path,
    n_shards: int = 1,
    args: ModelArgs = ARGS,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    pieces: tuple[str, ...] = INFILLING,
) -> Path:
    """Write a folder in Meta's layout."""
    weights = random_weights(args, seed, dtype)
    tensors = ((name, [tensor]) for name, tensor in weights.items())
    write_meta(folder, args, tensors, n_shards, tokenizer_bytes(pieces, args.vocab_size))
    return folder


def tiny_huggingface(
    folder: Path, args: ModelArgs = ARGS, seed: int = 0, dtype: torch.dtype = torch.float32, max_file_bytes: float = 5e9
) -> Path:
    """Write a folder in Hugging Face's layout, in this dtype."""
    weights = random_weights(args, seed, dtype)
    tokenizer = tokenizer_bytes(size=args.vocab_size)
    write_huggingface(folder, args, weights.items(), tokenizer, dtype, max_file_bytes)
    return folder
