"""SentencePiece with the special ids of Code Llama and CodeGemma, and exact decoding, whole or token by token.

It knows nothing of prompt formats: which ids surround a text is written in `prompts/`. Text never encodes to the id of
a special piece; such ids come from the attributes below alone, so that no text can forge a prompt's structure.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from codellama.errors import CheckpointError, PromptError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""normalizer_spec {add_dummy_prefix: false} in protobuf: appended to a model it overrides that one field, since a
repeated message is merged. Source: sentencepiece_model.proto, and protobuf's encoding rules ("last one wins")."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
PREFIX, SUFFIX, MIDDLE, FILE_SEPARATOR = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_separator|>"
TURN_START, TURN_END = "<start_of_turn>", "<end_of_turn>"
GEMMA_PIECES = (PREFIX, SUFFIX, MIDDLE, FILE_SEPARATOR, TURN_START, TURN_END)
"""CodeGemma's special pieces, as its vocabulary spells them."""


class Tokenizer:
    """Text to ids and back.

    Attributes:
        n_words: size of the vocabulary.
        bos_id: begin of sequence; eos_id: end of sequence; pad_id: padding, -1 where there is no such piece.
        prefix_id, suffix_id, middle_id: the infilling pieces, Code Llama's or else CodeGemma's.
        eot_id: ends a middle of Code Llama's; file_separator_id: stands between files, in CodeGemma's vocabulary.
        step_id: end of a message in the 70B chat format.
        turn_start_id, turn_end_id: around a message in CodeGemma's chat format.
        special_ids: all of these pieces that there are. Where the tokenizer lacks one, it is None.
        implicit_space: whether a text is encoded with a space before it, as the model file says.
        model_bytes: content of the `tokenizer.model`.
    """

    def __init__(self, model_path: str | Path) -> None:
        """Load a `tokenizer.model`.

        Raises:
            CheckpointError: no such file, or not a SentencePiece model.
        """
        path = Path(model_path)
        if not path.is_file():
            raise CheckpointError(f"no tokenizer at {path}: pass tokenizer_path, the release's tokenizer.model")
        self._load(path.read_bytes(), str(path))

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> "Tokenizer":
        """Load what a `tokenizer.model` holds; `where` is what an error message calls it.

        Raises:
            CheckpointError: not a SentencePiece model.
        """
        tokenizer = cls.__new__(cls)
        tokenizer._load(content, where)
        return tokenizer

    def _load(self, content: bytes, where: str) -> None:
        self.model_bytes = content
        try:
            self._read_pieces(content)
        except (RuntimeError, UnicodeDecodeError, AssertionError) as error:  # damaged, or made so
            raise CheckpointError(f"{where} ({len(content)} bytes) is not a SentencePiece model") from error

    def _read_pieces(self, content: bytes) -> None:
        self._spaced = sentencepiece.SentencePieceProcessor(model_proto=content)
        self._plain = sentencepiece.SentencePieceProcessor(model_proto=content + _NO_DUMMY_PREFIX)
        self.n_words: int = self._spaced.vocab_size()
        self.bos_id: int = self._spaced.bos_id()
        self.eos_id: int = self._spaced.eos_id()
        self.pad_id: int = self._spaced.pad_id()
        # SentencePiece has no accessor for it. What it cuts "a" into spells the text that it cuts, and shows the space.
        cut = [words.encode("a", out_type=str) for words in (self._spaced, self._plain)]
        self.implicit_space: bool = cut[0] != cut[1]
        llama = ("<PRE>", "<SUF>", "<MID>", "<EOT>")
        found = {piece: self._find(_SPACE + piece) for piece in llama}
        found |= {piece: self._find(piece) for piece in ("<step>", *GEMMA_PIECES)}
        # One family's, never a mixture: a vocabulary that spells both is Code Llama's with words added.
        ours = llama if any(found[piece] is not None for piece in llama) else (PREFIX, SUFFIX, MIDDLE)
        self.prefix_id, self.suffix_id, self.middle_id = (found[piece] for piece in ours[:3])
        self.eot_id, self.step_id = found["<EOT>"], found["<step>"]
        self.file_separator_id = found[FILE_SEPARATOR] if ours is not llama else None
        self.turn_start_id, self.turn_end_id = found[TURN_START], found[TURN_END]
        self.special_ids = frozenset(id for id in found.values() if id is not None)
        self._spelled = {id: self._spell(id) for id in self.special_ids}
        self._bytes = [self._piece_bytes(id) for id in range(self.n_words)]
        self._shown = [b"" if id in self._spelled else content for id, content in enumerate(self._bytes)]

    @property
    def can_infill(self) -> bool:
        """True where it has the four pieces of infilling: three, and what ends a middle or separates files."""
        fourth = self.eot_id if self.file_separator_id is None else self.file_separator_id
        return None not in (self.prefix_id, self.suffix_id, self.middle_id, fourth)

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Encode a text as SentencePiece does, with the implicit space if there is one; special pieces are spelled."""
        ids = self._spell_out(self._spaced.encode(_checked(s)))
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_infilling(self, s: str) -> list[int]:
        """Encode a text that continues another one: without the implicit leading space."""
        return self._spell_out(self._plain.encode(_checked(s)))

    def decode(self, t: Sequence[int]) -> str:
        """Decode ids that begin a text: the implicit leading space, if there is one, is dropped."""
        text = self.decode_infilling(t)
        if not self.implicit_space:
            return text
        first = next((id for id in t if self._bytes[id]), None)
        implicit = first is not None and self.token_piece(first).startswith(_SPACE)
        return text.removeprefix(" ") if implicit else text

    def decode_infilling(self, t: Sequence[int]) -> str:
        """Decode ids that continue a text, byte for byte; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary, such as pad_id.
        """
        for id in t:
            if not 0 <= id < self.n_words:
                raise ValueError(f"id {id} cannot be decoded; the vocabulary has ids 0 to {self.n_words - 1}")
        return b"".join(self._bytes[id] for id in t).decode("utf-8", errors="replace")

    def token_piece(self, t: int) -> str:
        """Return the piece as the vocabulary spells it."""
        piece: str = self._spaced.id_to_piece(t)
        return piece

    def token_bytes(self, t: int) -> bytes:
        """Return what a token adds to a text; nothing for special pieces."""
        return self._shown[t]

    def _find(self, piece: str) -> int | None:
        id: int = self._spaced.piece_to_id(piece)
        return id if self._spaced.id_to_piece(id) == piece else None  # an unknown piece reads as the unk id

    def _spell(self, id: int) -> list[int]:
        """Spell a special piece in ordinary ones: all but its last character, then that."""
        text: str = self._spaced.id_to_piece(id).replace(_SPACE, " ")
        ids: list[int] = self._plain.encode(text[:-1]) + self._plain.encode(text[-1])
        assert id not in ids, "a special piece is not made of itself"
        return ids

    def _spell_out(self, ids: list[int]) -> list[int]:
        if self._spelled.keys().isdisjoint(ids):
            return ids
        return [part for id in ids for part in self._spelled.get(id, [id])]

    def _piece_bytes(self, id: int) -> bytes:
        """Return what an id adds to the text; nothing for control pieces, whatever comes before for all others."""
        if self._spaced.is_control(id):
            return b""
        if self._spaced.is_unknown(id):
            return " \N{DOUBLE QUESTION MARK} ".encode()  # SentencePiece's default surface of unk
        piece: str = self._spaced.id_to_piece(id)
        if self._spaced.is_byte(id):
            match = _BYTE_PIECE.fullmatch(piece)
            assert match is not None, f"byte piece {piece!r}"
            return bytes([int(match[1], 16)])
        return piece.replace(_SPACE, " ").encode()


class TextDecoder:
    """Decode generated ids one by one; what it returns concatenates to exactly what decoding them at once gives.

    Special pieces that a model generates are structure and add no text, as control pieces do.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begin a text that continues another one, as a generation continues its prompt."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def pending(self) -> bool:
        """True while an unfinished UTF-8 sequence is held back."""
        return bool(self._utf8.getstate()[0])

    def push(self, ids: Iterable[int]) -> str:
        """Add ids and return the text that is now certain: an unfinished UTF-8 sequence is held back."""
        return self._utf8.decode(b"".join(self._tokenizer.token_bytes(id) for id in ids))

    def finish(self) -> str:
        """Return what was held back; unfinished sequences become U+FFFD."""
        return self._utf8.decode(b"", final=True)


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}; a string was expected")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"text holds a lone surrogate at character {error.start}; it is not valid Unicode") from error
    return text
