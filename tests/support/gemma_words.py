"""A small tokenizer of CodeGemma's kind, made by SentencePiece, and a tiny random model of Llama's kind with it."""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import sentencepiece

from codellama.checkpoint import write_meta
from codellama.tokenizer import Tokenizer
from tests.support import tiny

PIECES = (
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_separator|>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
PAD, EOS, BOS, UNK, PREFIX, MIDDLE, SUFFIX, SEPARATOR, TURN, END = range(10)
UNUSED = tuple(f"<unused{number}>" for number in range(len(PIECES)))


@cache
def tokenizer_bytes(pieces: Sequence[str] = PIECES, size: int = tiny.VOCAB) -> bytes:
    """No implicit space; pad 0, eos 1, bos 2, unk 3, these pieces from 4 on, then the bytes."""
    text = ["def f(x):", "    return x + 1", "user", "model", "the quick brown fox", "import os", "한국어 한국어"] * 9
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNK,
        user_defined_symbols=list(pieces),
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer(pieces: Sequence[str] = PIECES) -> Tokenizer:
    """That tokenizer, loaded."""
    return Tokenizer.from_bytes(tokenizer_bytes(pieces), "the test's tokenizer")


def sentencepieces_own() -> sentencepiece.SentencePieceProcessor:
    """SentencePiece's own view of it, which writes a special piece's id for its name in a text."""
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes())


def checkpoint(folder: Path) -> Path:
    """Write a tiny random model with this tokenizer."""
    weights = tiny.random_weights(tiny.ARGS)
    tensors = ((name, [tensor]) for name, tensor in weights.items())
    write_meta(folder, tiny.ARGS, tensors, 1, tokenizer_bytes())
    return folder
