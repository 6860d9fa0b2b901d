"""Tokenizer against SentencePiece itself and against an encoder of our own; text cannot forge special ids."""

import random
import re
from pathlib import Path

import pytest
import sentencepiece

from codellama.errors import CheckpointError, PromptError
from codellama.tokenizer import TextDecoder, Tokenizer
from tests.support import bpe, tiny

TEXTS = [text for text in bpe.random_texts(seed=1, count=1200) if not re.search("<(PRE|step)>", text)]
FORGERIES = bpe.random_texts(seed=2, count=300, fragments=(*bpe.SPECIAL, "x", " ", "def", "\n"))


class Case:
    """One tokenizer, with SentencePiece's own view of the same model."""

    def __init__(self, folder: Path, model: bytes, user_defined: tuple[str, ...], special: tuple[str, ...]) -> None:
        path = folder / "tokenizer.model"
        path.write_bytes(model)
        self.tokenizer = Tokenizer(path)
        self.raw = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.bpe = bpe.Bpe(model, user_defined)
        self.special = {self.raw.piece_to_id(piece) for piece in special}
        assert self.raw.unk_id() not in self.special


# As in the release's tokenizer.model, the pieces are normal ones, reached through merges that stand before them.
MERGES: tuple[str, ...] = (
    "▁<",
    "▁<P",
    "RE",
    "RE>",
    "▁<PRE>",
    "▁<S",
    "UF",
    "UF>",
    "▁<SUF>",
    "▁<M",
    "ID",
    "ID>",
    "▁<MID>",
)
MERGES += ("▁<E", "OT", "OT>", "▁<EOT>", "<s", "te", "te" + "p", "<step", "<step>")


@pytest.fixture(scope="module", params=["tiny", "tiny-step", "demo", "merged"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    step = (*tiny.INFILLING, "<step>")
    if request.param == "tiny":
        return Case(folder, tiny.tokenizer_bytes(), tiny.INFILLING, tiny.INFILLING)
    if request.param == "tiny-step":
        return Case(folder, tiny.tokenizer_bytes(step, tiny.VOCAB), step, step)
    if request.param == "demo":
        return Case(folder, bpe.DEMO.read_bytes(), tiny.INFILLING, tiny.INFILLING)
    bare = tiny.tokenizer_bytes((), 308)
    raw = sentencepiece.SentencePieceProcessor(model_proto=bare)
    fresh = [piece for piece in MERGES if raw.piece_to_id(piece) == raw.unk_id()]
    return Case(folder, bpe.with_pieces(bare, fresh, bpe.NORMAL), (), step)


def test_attributes_of_the_demo_tokenizer() -> None:
    tokenizer = Tokenizer(bpe.DEMO)
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (4096, 1, 2, -1)
    ids = (tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id, tokenizer.step_id)
    assert ids == (3, 4, 5, 6, None)
    assert [tokenizer.token_piece(id) for id in (0, 1, 2, 3, 7, 262, 263)] == [
        "<unk>", "<s>", "</s>", "▁<PRE>", "<0x00>", "<0xFF>", "▁▁",
    ]  # fmt: skip


def test_missing_pieces_are_none(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(tmp_path, pieces=(), size=300)
    ids = (tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id, tokenizer.step_id)
    assert ids == (None, None, None, None, None)
    assert tokenizer.n_words == 300


def test_step_piece_is_found(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(tmp_path, pieces=(*tiny.INFILLING, "<step>"))
    assert tokenizer.step_id is not None
    assert tokenizer.token_piece(tokenizer.step_id) == "<step>"


def test_our_own_encoder_agrees_with_sentencepiece(case: Case) -> None:
    for text in (*TEXTS[:300], *FORGERIES, "a\u2581<PRE>\u2581b"):
        assert case.bpe.encode(text) == case.raw.encode(text), repr(text)


def test_encode_is_bpe(case: Case) -> None:
    assert len(TEXTS) >= 1000
    for text in TEXTS:
        expected = case.bpe.encode(text)
        assert case.special.isdisjoint(expected), repr(text)
        assert case.tokenizer.encode(text, bos=False, eos=False) == expected, repr(text)


def test_encode_infilling_is_bpe_without_the_implicit_space(case: Case) -> None:
    for text in TEXTS:
        assert case.tokenizer.encode_infilling(text) == case.bpe.encode(text, dummy_prefix=False), repr(text)


def test_encode_infilling_is_what_an_anchor_gives(case: Case) -> None:
    for text in TEXTS[:300]:
        assert case.tokenizer.encode_infilling(text) == bpe.encode_without_space(case.raw, text), repr(text)


def test_bos_and_eos(case: Case) -> None:
    ids = case.raw.encode("x = 1")
    assert case.tokenizer.encode("x = 1", bos=True, eos=False) == [1, *ids]
    assert case.tokenizer.encode("x = 1", bos=False, eos=True) == [*ids, 2]
    assert case.tokenizer.encode("", bos=True, eos=True) == [1, 2]
    assert case.tokenizer.encode_infilling("") == []


def test_special_ids_never_come_from_text(case: Case) -> None:
    forged = 0
    for text in FORGERIES:
        forged += not case.special.isdisjoint(case.raw.encode(text))
        ids = case.tokenizer.encode(text, bos=False, eos=False)
        assert case.special.isdisjoint(ids), repr(text)
        assert case.tokenizer.decode(ids) == text
        continued = case.tokenizer.encode_infilling(text)
        assert case.special.isdisjoint(continued), repr(text)
        assert case.tokenizer.decode_infilling(continued) == text
    assert forged > 100, "the texts would forge ids in SentencePiece"


@pytest.mark.parametrize("text", ["\u2581<PRE>", "a\u2581<EOT>", "<s></s><unk><pad>", "<0x0A><0x41>"])
def test_spelled_structure_is_text(case: Case, text: str) -> None:
    ids = case.tokenizer.encode(text, bos=False, eos=False)
    assert case.special.isdisjoint(ids)
    assert {0, 1, 2}.isdisjoint(ids)
    assert case.tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_only_the_special_piece_is_spelled_out(case: Case) -> None:
    before, after = "import os", "return x"
    forged = next(id for id in case.raw.encode(f"{before} <PRE>{after}") if id in case.special)
    expected = case.raw.encode(f"{before} <PRE>{after}")
    at = expected.index(forged)
    ids = case.tokenizer.encode(f"{before} <PRE>{after}", bos=False, eos=False)
    assert ids[:at] == expected[:at]
    assert ids[at + 1 - len(expected) :] == expected[at + 1 :]
    assert case.tokenizer.decode_infilling(ids[at : at + 1 + len(ids) - len(expected)]) == " <PRE>"


def test_decode_reads_back_what_encode_wrote(case: Case) -> None:
    for text in TEXTS:
        assert case.tokenizer.decode(case.tokenizer.encode(text, bos=True, eos=True)) == text, repr(text)
        assert case.tokenizer.decode_infilling(case.tokenizer.encode_infilling(text)) == text, repr(text)


def test_decode_is_sentencepieces(case: Case) -> None:
    rng = random.Random(3)
    for text in TEXTS[:300]:
        ids = case.raw.encode(text)
        assert case.tokenizer.decode(ids) == case.raw.decode(ids)
    space = case.raw.piece_to_id("<0x20>")
    for _ in range(3000):
        ids = random_ids(rng, case.tokenizer.n_words)
        if ids[:1] in ([0], [space]):
            continue  # the next test's
        ids = [1] * rng.randrange(2) + ids
        ours, theirs = case.tokenizer.decode(ids), case.raw.decode(ids)
        # For one unfinished sequence we write one U+FFFD as Unicode recommends, SentencePiece one for every byte.
        assert re.sub("\ufffd+", "\ufffd", ours) == re.sub("\ufffd+", "\ufffd", theirs), ids


@pytest.mark.parametrize("first", ["<0x20>", "<unk>"])
def test_decode_drops_the_implicit_space_alone(first: str) -> None:
    """Only a space that a piece spells is implicit: not one that came as a byte, nor that of unk's surface."""
    raw = sentencepiece.SentencePieceProcessor(model_file=str(bpe.DEMO))
    ids = [raw.piece_to_id(piece) for piece in (first, "x")]
    assert raw.decode(ids).startswith(" ")
    assert Tokenizer(bpe.DEMO).decode(ids) == raw.decode(ids)


def special_ids(tokenizer: Tokenizer) -> set[int | None]:
    return {
        tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id, tokenizer.step_id
    }  # fmt: skip


def test_text_decoder_streams_what_decode_infilling_gives(case: Case) -> None:
    rng = random.Random(4)
    for _ in range(2000):
        ids = random_ids(rng, case.tokenizer.n_words)
        decoder = TextDecoder(case.tokenizer)
        pushed: list[str] = []
        at = 0
        while at < len(ids):
            count = rng.choice((1, 1, 1, 2, 3))
            pushed.append(decoder.push(ids[at : at + count]))
            at += count
        shown = [id for id in ids if id not in special_ids(case.tokenizer)]
        assert "".join([*pushed, decoder.finish()]) == case.tokenizer.decode_infilling(shown), ids


def test_text_decoder_is_prompt_and_never_takes_back(case: Case) -> None:
    """After each id, all complete characters are out: what is held is one unfinished sequence."""
    for text in ("déjà", "日本", "😀😀"):
        out = ""
        content = text.encode()
        decoder = TextDecoder(case.tokenizer)
        for end, byte in enumerate(content, start=1):
            out += decoder.push([case.raw.piece_to_id(f"<0x{byte:02X}>")])
            assert out == content[:end].decode(errors="ignore")
        assert decoder.finish() == ""


def test_text_decoder_holds_back_an_unfinished_character() -> None:
    tokenizer = Tokenizer(bpe.DEMO)
    decoder = TextDecoder(tokenizer)
    assert decoder.push([7 + 0xF0, 7 + 0x9F]) == ""
    assert decoder.push([7 + 0x98]) == ""
    assert decoder.push([7 + 0x80]) == "😀"
    assert decoder.push([7 + 0xE2, 7 + 0x98]) == ""
    assert decoder.finish() == "\ufffd"


def test_no_file_and_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer at"):
        Tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(CheckpointError, match="no tokenizer at"):
        Tokenizer(tmp_path)
    for content in (b"<!DOCTYPE html><html>login</html>", b"\x00" * 64, bpe.DEMO.read_bytes()[:1000]):
        path = tmp_path / "bad.model"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"bad\.model \({len(content)} bytes\) is not a SentencePiece model"):
            Tokenizer(str(path))


def test_an_empty_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.touch()
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        Tokenizer(path)


@pytest.mark.parametrize("text", [None, b"bytes", 7, ["x = 1"]])
def test_text_is_a_string(tokenizer: Tokenizer, text: object) -> None:
    with pytest.raises(TypeError, match="a string was expected"):
        tokenizer.encode(text, bos=True, eos=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a string was expected"):
        tokenizer.encode_infilling(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["ab\ud800", "ab\udfffc"])
def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(PromptError, match="lone surrogate at character 2"):
        tokenizer.encode(text, bos=True, eos=False)
    with pytest.raises(PromptError, match="lone surrogate at character 2"):
        tokenizer.encode_infilling(text)


def random_ids(rng: random.Random, n_words: int) -> list[int]:
    """Few ids, bytes among them, valid as UTF-8 or not."""
    ranges = ((0, n_words), (3, n_words), (3, 270), (3, 270))
    return [rng.randrange(*rng.choice(ranges)) for _ in range(rng.randrange(9))]


def test_a_damaged_piece_is_a_damaged_model() -> None:
    content = bpe.DEMO.read_bytes()
    at = content.index("▁return".encode()) + 3
    with pytest.raises(CheckpointError, match=r"damaged \(\d+ bytes\) is not a SentencePiece model"):
        Tokenizer.from_bytes(content[:at] + b"\xff" + content[at + 1 :], "damaged")
