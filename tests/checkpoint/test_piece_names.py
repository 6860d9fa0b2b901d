"""CodeGemma's pieces that the model file calls unused: named by tokenizer_config.json, or by a GGUF file's ids."""

import json
from pathlib import Path
from typing import Any

import pytest

from codellama.checkpoint import open_checkpoint
from codellama.checkpoint.convert import convert
from codellama.checkpoint.gguf_header import read_header
from codellama.checkpoint.gguf_vocabulary import build_sentencepiece
from codellama.checkpoint.info import info
from codellama.checkpoint.piece_names import name_pieces
from codellama.errors import CheckpointError
from codellama.tokenizer import Tokenizer
from tests.support import bpe, gemma_words, gguf, tiny

TEXTS = bpe.random_texts(seed=8, count=300)
UNUSED = gemma_words.tokenizer_bytes(gemma_words.UNUSED)
ADDED = {str(4 + at): {"content": piece, "special": True} for at, piece in enumerate(gemma_words.PIECES)}
NAMES = (
    "pad_id", "eos_id", "bos_id", "prefix_id", "middle_id", "suffix_id", "file_separator_id", "turn_start_id",
    "turn_end_id", "implicit_space", "special_ids",
)  # fmt: skip


def folder_with(folder: Path, added: Any, model: bytes = UNUSED) -> Path:
    """A checkpoint in Hugging Face's layout whose tokenizer has two files."""
    tiny.tiny_huggingface(folder)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return folder


def same(words: Tokenizer) -> bool:
    """Does it do what the tokenizer does whose model spells the pieces?"""
    whole = gemma_words.tokenizer()
    texts = (*TEXTS, *gemma_words.PIECES, "a<|fim_suffix|>b")
    assert [getattr(words, name) for name in NAMES] == [getattr(whole, name) for name in NAMES]
    assert [words.token_piece(id) for id in range(whole.n_words)] == list(map(whole.token_piece, range(whole.n_words)))
    return [words.encode(text, False, False) for text in texts] == [whole.encode(text, False, False) for text in texts]


def test_without_names_they_are_words() -> None:
    words = Tokenizer.from_bytes(UNUSED, "the model")
    assert (words.special_ids, words.can_infill) == (frozenset(), False)


def test_names_from_the_file_beside(tmp_path: Path) -> None:
    more = {"0": {"content": "<pad>"}, "5000": {"content": "<elsewhere>"}}
    folder = folder_with(tmp_path / "source", ADDED | more)
    assert same(open_checkpoint(folder).tokenizer())
    assert same(open_checkpoint(folder, folder / "tokenizer.model").tokenizer())
    found = info(folder)
    assert (found.infilling, found.chat) == (True, "turns")
    convert(folder, tmp_path / "target", format="huggingface")
    assert not (tmp_path / "target" / "tokenizer_config.json").exists()
    assert same(open_checkpoint(tmp_path / "target").tokenizer()), "the names travel in the model"


def test_the_file_beside_changes_nothing_else(tmp_path: Path) -> None:
    """It is read only for a model with unused pieces, and what that spells already stays."""
    folder = folder_with(tmp_path / "llama", {"77": {"content": "<|fim_prefix|>"}}, tiny.tokenizer_bytes())
    assert open_checkpoint(folder).tokenizer().model_bytes == tiny.tokenizer_bytes()
    mixed = gemma_words.tokenizer_bytes((*gemma_words.PIECES, "<unused9>"))
    folder = folder_with(tmp_path / "gemma", ADDED, mixed)
    assert open_checkpoint(folder).tokenizer().model_bytes == mixed


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([], "added_tokens_decoder is a list; an object was expected"),
        ({"320": {"content": "<|fim_prefix|>"}}, r"<\|fim_prefix\|> should be piece 320, but there are 320"),
        (
            {"20": {"content": "<|fim_prefix|>"}},
            r"<\|fim_prefix\|> should be piece 20, but that is '<0x..>', not unused",
        ),
        ({"-4": {"content": "<|fim_prefix|>"}}, r"<\|fim_prefix\|> has the id '-4'; a number was expected"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, added: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder_with(tmp_path, added))


def test_a_piece_with_another_id_is_refused(tmp_path: Path) -> None:
    model = gemma_words.tokenizer_bytes((gemma_words.PIECES[0], *gemma_words.UNUSED[1:]))
    with pytest.raises(CheckpointError, match=r"should be piece 5, but piece 4 is spelled so"):
        open_checkpoint(folder_with(tmp_path, {"5": {"content": gemma_words.PIECES[0]}}, model))


@pytest.mark.parametrize("size", [1, 3, 40, 5000])
def test_a_damaged_model_is_refused(size: int) -> None:
    with pytest.raises(CheckpointError, match="the SentencePiece model is damaged"):
        name_pieces(UNUSED[:-size] if size < 5000 else b"\x0b" * size, {"<|fim_prefix|>": 4}, "it")


@pytest.mark.parametrize("words", ["prefix middle suffix fsep eot", "fim_pre fim_mid fim_suf fim_sep eot"])
def test_names_from_a_gguf_file(tmp_path: Path, words: str) -> None:
    """They say the ids of five pieces; the sixth, which begins a turn, must be spelled."""
    pieces = (*gemma_words.UNUSED[:4], gemma_words.PIECES[4], gemma_words.UNUSED[5])
    values = gguf.vocabulary(gemma_words.tokenizer_bytes(pieces), pieces)
    values |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.padding_token_id": 0}
    values |= {f"tokenizer.ggml.{word}_token_id": id for word, id in zip(words.split(), (4, 5, 6, 7, 9), strict=True)}
    header = read_header(gguf.write_gguf(tmp_path / "vocabulary.gguf", values=values))
    assert same(Tokenizer.from_bytes(build_sentencepiece(header), "the copy"))


def test_a_gguf_file_that_spells_them(tmp_path: Path) -> None:
    """As llama.cpp's converter writes it: the pieces are control pieces there, which no text encodes to either."""
    values = gguf.vocabulary(gemma_words.tokenizer_bytes(), gemma_words.PIECES)
    kinds = list(values["tokenizer.ggml.token_type"])
    kinds[4:10] = [gguf.CONTROL] * 6
    values |= {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.add_space_prefix": False}
    header = read_header(gguf.write_gguf(tmp_path / "vocabulary.gguf", values=values))
    words = Tokenizer.from_bytes(build_sentencepiece(header), "the copy")
    assert [getattr(words, name) for name in NAMES] == [getattr(gemma_words.tokenizer(), name) for name in NAMES]
    for text in (*TEXTS, *gemma_words.PIECES):
        ids = words.encode(text, bos=False, eos=False)
        assert words.special_ids.isdisjoint(ids)
        assert words.decode(ids) == text


@pytest.mark.parametrize("padding", [1, 3, 40, 5000, None])
def test_padding_is_a_piece_of_its_own(tmp_path: Path, padding: int | None) -> None:
    """Not eos, unk, a byte or an id outside of the vocabulary; then it is found by SentencePiece's name for it."""
    values = gguf.vocabulary(gemma_words.tokenizer_bytes(), gemma_words.PIECES)
    values |= {"tokenizer.ggml.padding_token_id": padding}
    header = read_header(gguf.write_gguf(tmp_path / "vocabulary.gguf", values=values))
    assert Tokenizer.from_bytes(build_sentencepiece(header), "the copy").pad_id == 0


def test_code_llamas_ids_in_a_gguf_file_change_nothing(tmp_path: Path) -> None:
    """Its converter writes the same keys for <PRE> and its kin; those pieces have their names."""
    keys = zip(("prefix", "suffix", "middle", "eot"), (3, 4, 5, 6), strict=True)
    values = {f"tokenizer.ggml.{key}_token_id": id for key, id in keys} | {"tokenizer.ggml.fim_sep_token_id": 10**6}
    plain = build_sentencepiece(read_header(gguf.write_gguf(tmp_path / "plain.gguf")))
    assert build_sentencepiece(read_header(gguf.write_gguf(tmp_path / "ids.gguf", values=values))) == plain
