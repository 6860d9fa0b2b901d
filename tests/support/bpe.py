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
