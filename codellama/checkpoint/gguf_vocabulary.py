"""The vocabulary inside a GGUF file as a SentencePiece model, which it came from, so that there is one Tokenizer.

It knows nothing of weights. A SentencePiece model is a protobuf message, of which a few fields are enough; they are
written by hand here. Sources: sentencepiece_model.proto; protobuf's encoding rules; tokenizer.ggml.* in ggml's
docs/gguf.md. llama.cpp normalises nothing, writes spaces as U+2581, puts one before the text unless add_space_prefix is
false, merges by score, and falls back to bytes: the same as this model.
"""

import array
import struct
from collections.abc import Sequence

from codellama.checkpoint.gguf_header import Header
from codellama.errors import CheckpointError, shown

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Kinds of pieces; GGUF's token_type has SentencePiece's numbers."""
_BPE = 2  # TrainerSpec.ModelType
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}".encode()


def build_sentencepiece(header: Header) -> bytes:
    """Return the vocabulary of a GGUF file as the content of a `tokenizer.model`.

    Raises:
        CheckpointError: there is none, it is of another kind, or its parts do not belong together.
    """
    where = header.path
    kind = header.text("tokenizer.ggml.model")
    if kind != "llama":
        found = (
            "no vocabulary" if kind is None else f"a vocabulary of the kind {shown(kind)}, not llama (SentencePiece)"
        )
        raise CheckpointError(f"{where} holds {found}: pass tokenizer_path, the tokenizer.model of these weights")
    pieces = header.find("tokenizer.ggml.tokens", list)
    scores = header.find("tokenizer.ggml.scores", array.array)
    kinds = header.find("tokenizer.ggml.token_type", array.array)
    if pieces is None or scores is None or kinds is None or not len(pieces) == len(scores) == len(kinds):
        lengths = ", ".join("none" if part is None else str(len(part)) for part in (pieces, scores, kinds))
        raise CheckpointError(f"{where}: tokens, scores and token_type of the vocabulary have {lengths} entries")
    if scores.typecode != "f" or kinds.typecode in "fd" or any(score != score for score in scores):
        raise CheckpointError(f"{where}: scores must be float32 and no NaN, and token_type integers")
    types = [int(kind) for kind in kinds]
    _check_types(where, pieces, types)
    ids = {name: _special(header, name, types) for name in ("unknown", "bos", "eos")}
    for name, wanted in (("unknown", _UNKNOWN), ("bos", _CONTROL), ("eos", _CONTROL)):
        if types[ids[name]] != wanted:
            piece = shown(pieces[ids[name]].decode())
            raise CheckpointError(
                f"{where}: {name}_token_id is {ids[name]}, the piece {piece} of type {types[ids[name]]}; "
                f"one of type {wanted} was expected"
            )
    add_space = header.find("tokenizer.ggml.add_space_prefix", bool)
    return b"".join(
        [
            *(_piece(*entry) for entry in zip(_spelled(pieces, types), scores, types, strict=True)),
            _message(
                2,  # trainer_spec
                _varint_field(3, _BPE),
                _varint_field(4, len(pieces)),
                _varint_field(35, _BYTE in types),
                *(_varint_field(40 + i, ids[name]) for i, name in enumerate(("unknown", "bos", "eos"))),
                _varint_field(43, -1),  # no pad piece
                *(_bytes_field(45 + i, pieces[ids[name]]) for i, name in enumerate(("unknown", "bos", "eos"))),
            ),
            _message(
                3,  # normalizer_spec
                _bytes_field(1, b"identity"),
                _varint_field(3, add_space is not False),
                _varint_field(4, False),  # remove_extra_whitespaces
                _varint_field(5, True),  # escape_whitespaces
            ),
        ]
    )


def _check_types(where: object, pieces: Sequence[bytes], types: Sequence[int]) -> None:
    """Refuse what SentencePiece would refuse with less to say, or would read as something else."""
    if unknown := {kind for kind in types if not _NORMAL <= kind <= _BYTE}:
        raise CheckpointError(f"{where}: token_type has {shown(sorted(unknown))}; 1 to {_BYTE} were expected")
    n_unknown, n_bytes = sum(kind == _UNKNOWN for kind in types), sum(kind == _BYTE for kind in types)
    if n_unknown != 1 or n_bytes not in (0, 256):
        raise CheckpointError(
            f"{where}: the vocabulary has {n_unknown} unknown pieces and {n_bytes} byte pieces; "
            f"1 and 0 or 256 were expected"
        )
    seen = set()
    for id, piece in enumerate(pieces):
        try:
            piece.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{where}: piece {id}, {shown(piece)}, is not UTF-8") from error
        if not piece or b"\0" in piece or piece in seen:
            raise CheckpointError(
                f"{where}: piece {id}, {shown(piece.decode())}, is empty, holds NUL or is there twice"
            )
        seen.add(piece)


def _special(header: Header, name: str, types: list[int]) -> int:
    key = f"tokenizer.ggml.{name}_token_id"
    id = header.find(key, int)
    if id is None and name == "unknown":
        return types.index(_UNKNOWN)
    if id is None or not 0 <= id < len(types):
        found = "missing" if id is None else str(id)
        raise CheckpointError(f"{header.path}: {key} is {found}; an id from 0 to {len(types) - 1} was expected")
    return id


def _spelled(pieces: Sequence[bytes], types: Sequence[int]) -> list[bytes]:
    """Write spaces of user-defined pieces as U+2581 again: llama.cpp's converter made them spaces, for its own search.

    A piece whose other spelling is a piece of its own is left as it is.
    """
    known = set(pieces)
    spelled = []
    for piece, kind in zip(pieces, types, strict=True):
        if kind == _USER_DEFINED and b" " in piece:
            other = piece.replace(b" ", _SPACE)
            if other not in known:
                known.add(other)
                piece = other
        spelled.append(piece)
    return spelled


def _piece(piece: bytes, score: float, kind: int) -> bytes:
    """One SentencePiece of the model: piece = 1, score = 2 (float, wire type 5), type = 3."""
    return _message(1, _bytes_field(1, piece), b"\x15" + struct.pack("<f", score), _varint_field(3, kind))


def _message(number: int, *fields: bytes) -> bytes:
    return _bytes_field(number, b"".join(fields))


def _bytes_field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value & (2**64 - 1))  # a negative int32 is written as 64 bits


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)
