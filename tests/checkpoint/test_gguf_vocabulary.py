"""The tokenizer inside a GGUF file, against the SentencePiece file it was made from; vocabularies that are wrong."""

import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from codellama.checkpoint.gguf_header import Header
from codellama.checkpoint.gguf_vocabulary import build_sentencepiece
from codellama.errors import CheckpointError
from codellama.tokenizer import Tokenizer
from tests.support import bpe, gguf, tiny

TEXTS = bpe.random_texts(seed=3, count=1000, fragments=(*bpe._FRAGMENTS, *bpe.SPECIAL))
BARE = tiny.tokenizer_bytes((), 300)
MODELS = {
    "tiny": (tiny.tokenizer_bytes(), tiny.INFILLING),
    "demo": (bpe.DEMO.read_bytes(), tiny.INFILLING),
    "step": (tiny.tokenizer_bytes((*tiny.INFILLING, "<step>")), (*tiny.INFILLING, "<step>")),
    "bare": (BARE, ()),
}
UNK, BOS, EOS = range(3)


def header(folder: Path, values: dict[str, Any]) -> Header:
    """The header of a file with this vocabulary and no more."""
    from codellama.checkpoint.gguf_header import read_header

    return read_header(gguf.write_gguf(folder / "vocabulary.gguf", values=values))


def changed(folder: Path, **changes: Any) -> Header:
    """The tiny vocabulary with these values changed; None removes."""
    return header(folder, {f"tokenizer.ggml.{key}": value for key, value in changes.items()})


def part(key: str) -> list[Any]:
    values: list[Any] = list(gguf.vocabulary(tiny.tokenizer_bytes())[f"tokenizer.ggml.{key}"])
    return values


def replaced(key: str, id: int, value: Any) -> dict[str, Any]:
    values = part(key)
    values[id] = value
    return {key: values}


@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_tokenizer_that_it_was_made_from(tmp_path: Path, model: str) -> None:
    content, user_defined = MODELS[model]
    original = Tokenizer.from_bytes(content, "the original")
    built = Tokenizer.from_bytes(
        build_sentencepiece(header(tmp_path, gguf.vocabulary(content, user_defined))), "the copy"
    )
    ids = range(original.n_words)
    assert [built.token_piece(id) for id in ids] == [original.token_piece(id) for id in ids]
    names = ("n_words", "bos_id", "eos_id", "pad_id", "prefix_id", "suffix_id", "middle_id", "eot_id", "step_id")
    assert [getattr(built, name) for name in names] == [getattr(original, name) for name in names]
    for text in TEXTS:
        encoded = original.encode(text, bos=True, eos=True)
        assert built.encode(text, bos=True, eos=True) == encoded, text
        assert built.encode_infilling(text) == original.encode_infilling(text), text
        assert built.decode(encoded) == original.decode(encoded), text
        assert built.decode_infilling(encoded) == original.decode_infilling(encoded), text
    assert [built.decode_infilling([id]) for id in ids] == [original.decode_infilling([id]) for id in ids]


def test_what_it_builds_is_a_tokenizer_model(tmp_path: Path) -> None:
    content = build_sentencepiece(changed(tmp_path))
    words = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert words.encode("def f(x): naïve") == Tokenizer.from_bytes(content, "").encode("def f(x): naïve", False, False)
    assert (words.unk_id(), words.bos_id(), words.eos_id(), words.pad_id()) == (UNK, BOS, EOS, -1)


def test_without_the_implicit_space(tmp_path: Path) -> None:
    built = Tokenizer.from_bytes(build_sentencepiece(changed(tmp_path, add_space_prefix=False)), "")
    original = Tokenizer.from_bytes(tiny.tokenizer_bytes(), "")
    assert built.encode("def f", False, False) == original.encode_infilling("def f")
    assert built.encode("def f", False, False) != original.encode("def f", False, False)


@pytest.mark.parametrize("kind", [gguf.USER_DEFINED, gguf.CONTROL])
def test_infilling_pieces_as_llama_cpp_writes_them(tmp_path: Path, kind: int) -> None:
    """Its converter makes an added token a control piece, or a user-defined one in which ▁ is a space."""
    pieces, kinds = part("tokens"), part("token_type")
    for id in (3, 4, 5, 6):
        kinds[id] = kind
        if kind == gguf.USER_DEFINED:
            pieces[id] = pieces[id].replace("▁", " ")
    built = Tokenizer.from_bytes(build_sentencepiece(changed(tmp_path, tokens=pieces, token_type=kinds)), "")
    assert (built.prefix_id, built.suffix_id, built.middle_id, built.eot_id) == (3, 4, 5, 6)
    for text in (" <PRE>", "a <SUF>b", "  <MID> <EOT>"):
        ids = built.encode(text, False, False)
        assert {3, 4, 5, 6}.isdisjoint(ids)
        assert built.decode(ids) == text


def test_two_spellings_of_a_user_defined_piece_stay_two(tmp_path: Path) -> None:
    pieces = part("tokens")
    at = pieces.index("▁▁") if "▁▁" in pieces else pieces.index("▁")
    pieces[3] = pieces[at].replace("▁", " ")
    content = build_sentencepiece(changed(tmp_path, tokens=pieces))
    built = Tokenizer.from_bytes(content, "")
    assert (built.token_piece(3), built.token_piece(at)) == (pieces[3], pieces[at])


def test_the_unknown_id_may_be_missing(tmp_path: Path) -> None:
    content = build_sentencepiece(changed(tmp_path, unknown_token_id=None))
    assert content == build_sentencepiece(changed(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, r"tokens, scores and token_type of the vocabulary have none, 320, 320 entries"),
        ({"scores": [0.0] * 319}, r"have 320, 319, 320 entries"),
        ({"token_type": None}, r"have 320, 320, none entries"),
        ({"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens is an array of 2 values; an array of strings was expected"),
        ({"scores": [0] * 320}, r"scores must be float32 and no NaN, and token_type integers"),
        ({"token_type": [1.0] * 320}, r"scores must be float32 and no NaN, and token_type integers"),
        (replaced("scores", 300, float("nan")), r"scores must be float32 and no NaN"),
        (replaced("token_type", 300, 7), r"token_type has \[7\]; 1 to 6 were expected"),
        (replaced("token_type", 300, 2), r"has 2 unknown pieces and 256 byte pieces; 1 and 0 or 256 were expected"),
        (replaced("token_type", UNK, 1), r"has 0 unknown pieces"),
        (replaced("token_type", 50, 1), r"has 1 unknown pieces and 255 byte pieces"),
        (replaced("tokens", 300, "▁"), r"piece \d+, '\\u2581', is empty, holds NUL or is there twice"),
        (replaced("tokens", 300, ""), r"piece 300, '', is empty, holds NUL or is there twice"),
        (replaced("tokens", 300, "a\0b"), r"piece 300, 'a\\x00b', is empty, holds NUL or is there twice"),
        (replaced("tokens", 300, b"\xff"), r"piece 300, b'\\xff', is not UTF-8"),
        ({"bos_token_id": None}, r"tokenizer\.ggml\.bos_token_id is missing; an id from 0 to 319 was expected"),
        ({"eos_token_id": 320}, r"eos_token_id is 320; an id from 0 to 319 was expected"),
        ({"eos_token_id": 300}, r"eos_token_id is 300, the piece .* of type 1; one of type 3 was expected"),
        ({"unknown_token_id": 1}, r"unknown_token_id is 1, the piece '<s>' of type 3; one of type 2 was expected"),
        ({"bos_token_id": "<s>"}, r"bos_token_id is '<s>'; an integer was expected"),
        ({"add_space_prefix": 1}, r"add_space_prefix is 1; a boolean was expected"),
    ],
)
def test_wrong_vocabularies(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"vocabulary\.gguf.*{message}"):
        build_sentencepiece(changed(tmp_path, **changes))


def test_a_byte_piece_of_another_spelling_is_no_sentencepiece_model(tmp_path: Path) -> None:
    pieces = part("tokens")
    pieces[pieces.index("<0x41>")] = "<0xZZ>"
    content = build_sentencepiece(changed(tmp_path, tokens=pieces))
    with pytest.raises(CheckpointError, match=re.escape("is not a SentencePiece model")):
        Tokenizer.from_bytes(content, "this")
