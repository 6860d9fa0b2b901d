"""A second SentencePiece-BPE encoder, written from the description of the algorithm, and texts to try it on.

It takes the vocabulary from SentencePiece's accessors and none of its encoder. Every step looks at all pairs: slow, and
easy to check.
"""

import random
import struct
from collections.abc import Collection, Sequence
from pathlib import Path

import sentencepiece

DEMO = Path(__file__).parents[2] / "codellama" / "demo" / "tokenizer.model"
NORMAL, USER_DEFINED = 1, 4  # SentencePiece.Type in sentencepiece_model.proto
SPACE = "▁"
ANCHOR = "☺"


class Bpe:
    """Merges the adjacent pair with the best score until none is left; the leftmost one on ties."""

    def __init__(self, model: bytes, user_defined: Collection[str]) -> None:
        words = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._bytes = {words.id_to_piece(id): id for id in range(words.vocab_size()) if words.is_byte(id)}
        reserved = {id for id in range(words.vocab_size()) if words.is_control(id)} | {words.unk_id()}
        reserved |= set(self._bytes.values())
        self._ids = {words.id_to_piece(id): id for id in range(words.vocab_size()) if id not in reserved}
        self._scores = {piece: words.get_score(id) for piece, id in self._ids.items()}
        self._whole = sorted(user_defined, key=len, reverse=True)
        assert set(self._whole) <= self._ids.keys()

    def encode(self, text: str, dummy_prefix: bool = True) -> list[int]:
        if not text:
            return []
        written = (SPACE if dummy_prefix else "") + text.replace(" ", SPACE)
        parts = self._split(written)
        while True:
            best = None
            for at in range(len(parts) - 1):
                (left, left_whole), (right, right_whole) = parts[at], parts[at + 1]
                score = self._scores.get(left + right)
                if score is None or left_whole or right_whole:
                    continue
                if best is None or score > best[0]:
                    best = score, at
            if best is None:
                return [id for part, _ in parts for id in self._find(part)]
            at = best[1]
            parts[at : at + 2] = [(parts[at][0] + parts[at + 1][0], False)]

    def _split(self, text: str) -> list[tuple[str, bool]]:
        """Cut into characters, and user-defined pieces as a whole: the longest that begins here."""
        parts = []
        at = 0
        while at < len(text):
            piece = next((piece for piece in self._whole if text.startswith(piece, at)), None)
            parts.append((piece or text[at], piece is not None))
            at += len(piece or text[at])
        return parts

    def _find(self, part: str) -> list[int]:
        if part in self._ids:
            return [self._ids[part]]
        return [self._bytes[f"<0x{byte:02X}>"] for byte in part.encode()]


def encode_without_space(words: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Encode with SentencePiece itself, without the implicit space: behind an anchor that merges with nothing."""
    anchor = words.encode(ANCHOR)
    ids = words.encode(ANCHOR + text)
    assert ids[: len(anchor)] == anchor
    return ids[len(anchor) :]


def with_pieces(model: bytes, pieces: Sequence[str], kind: int, score: float = -1e6) -> bytes:
    """Append pieces to a serialised model: repeated protobuf fields may stand anywhere, and later ids follow."""
    for rank, piece in enumerate(pieces):
        spelled = piece.encode()
        entry = b"\x0a" + bytes([len(spelled)]) + spelled + b"\x15" + struct.pack("<f", score - rank)
        entry += b"\x18" + bytes([kind])
        model += b"\x0a" + bytes([len(entry)]) + entry
    return model


def model_with_ids(wanted: dict[int, str], size: int, user_defined: Collection[str] = ()) -> bytes:
    """A SentencePiece-BPE model with byte fallback in which chosen pieces stand at chosen ids.

    Each is reached by merging its characters from the left; the other ids hold those beginnings, and fillers that no
    text contains. Ids 0 to 2 are unk, bos and eos, 3 to 258 the bytes, as in Llama's vocabulary.
    """
    taken = {0: "<unk>", 1: "<s>", 2: "</s>", **{3 + byte: f"<0x{byte:02X}>" for byte in range(256)}}
    fixed = {id: piece for id, piece in wanted.items() if id not in taken}
    assert all(taken[id] == piece for id, piece in wanted.items() if id in taken)
    beginnings = {piece[:n] for piece in fixed.values() for n in range(1, len(piece)) if piece not in user_defined}
    letters = {letter for piece in fixed.values() for letter in piece}
    free = iter(id for id in range(259, size) if id not in fixed)
    placed = {next(free): piece for piece in sorted((beginnings | letters) - set(fixed.values()))}
    filled = {id: f"\ue000{id}" for id in free}
    model = b""
    for id, piece in sorted({**taken, **fixed, **placed, **filled}.items()):
        kind = {0: 2, 1: 3, 2: 3}.get(id, 6 if id < 259 else USER_DEFINED if piece in user_defined else NORMAL)
        spelled = piece.encode()
        # The longer a beginning, the better its score: what is begun is finished first.
        score = -1e6 if piece in filled.values() else -100.0 + len(piece)
        entry = b"\x0a" + bytes([len(spelled)]) + spelled + b"\x15" + struct.pack("<f", score)
        entry += b"\x18" + bytes([kind])
        model += b"\x0a" + bytes([len(entry)]) + entry
    trainer = b"\x18\x02" + b"\x98\x02\x01"  # model_type BPE, byte_fallback
    normalizer = b"\x0a\x08identity" + b"\x20\x00"  # remove_extra_whitespaces false
    return model + b"\x12" + bytes([len(trainer)]) + trainer + b"\x1a" + bytes([len(normalizer)]) + normalizer


_FRAGMENTS = (
    "def f(x):\n", "    return x + 1\n", "for i in range(10):", "import numpy as np", "self.assertEqual(a, b)",
    "'''doc'''", "print(f\"{x!r:>10}\")", "#!/usr/bin/env python\r\n", "int main(void) {\r\n\treturn 0;\r\n}",
    "a = {'b': [1, 2.5e-3]}", "the quick brown fox", "\t", "\t\t", " ", "  ", "    ", " " * 13, "\n", "\r\n", "\r",
    "\n\n\n", "\x00", "\x7f", "\x0b\x0c", "0", "1234567890", "3.14159", "0xDEADBEEF", "naïve café", "Straße",
    "日本語のコード", "中文", "한국어", "русский", "עברית", "عربى", "हिन्दी", "e\u0301", "\u200b\u200d\ufeff",
    "\u00a0", "\u3000", "\u2028", "😀", "👩\u200d👧", "🇩🇪🏴", "𝔘𝔫𝔦", "☺", "\U0010ffff", "\ufffd",
    "<s>", "</s>", "<unk>", "<0x41>", "<PRE", "PRE>", "<", ">", "<step", "[INST]", "<<SYS>>", "▂", "_",
)  # fmt: skip
SPECIAL = (" <PRE>", "a <SUF>b", " <MID>", "x <EOT>", "  <PRE>", " <PRE> <PRE>", "<step>", "a<step>", " <step> ")


def random_texts(seed: int, count: int, fragments: Sequence[str] = _FRAGMENTS) -> list[str]:
    """Texts of a few fragments and random characters; none holds U+2581, which reads back as a space."""
    rng = random.Random(seed)
    texts = ["", " ", "  ", "\n", *fragments]
    while len(texts) < count:
        parts = []
        for _ in range(rng.randrange(1, 5)):
            kind = rng.random()
            if kind < 0.7:
                parts.append(rng.choice(fragments))
            elif kind < 0.85:
                parts.append("".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(1, 12))))
            else:
                parts.append("".join(chr(_scalar(rng)) for _ in range(rng.randrange(1, 4))))
        texts.append("".join(parts))
    return texts


def _scalar(rng: random.Random) -> int:
    """A code point that is neither a surrogate nor U+2581."""
    while True:
        point = rng.randrange(rng.choice((0x250, 0x3000, 0x110000)))
        if not 0xD800 <= point < 0xE000 and point != 0x2581:
            return point
