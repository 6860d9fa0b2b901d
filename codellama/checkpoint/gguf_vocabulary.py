"""The vocabulary inside a GGUF file as a SentencePiece model, which it came from, so that there is one Tokenizer.

It knows nothing of weights. A SentencePiece model is a protobuf message, of which a few fields are enough; they are
written by hand here. Sources: sentencepiece_model.proto; tokenizer.ggml.* in ggml's docs/gguf.md. llama.cpp normalises
nothing, writes spaces as U+2581, puts one before the text unless add_space_prefix is false, merges by score, and falls
back to bytes: the same as this model.
"""

import array
import struct
from collections.abc import Sequence

from codellama.checkpoint.gguf_header import Header
from codellama.checkpoint.piece_names import is_unused, name_pieces
from codellama.checkpoint.protobuf import bytes_field, message, varint_field
from codellama.errors import CheckpointError, shown
from codellama.tokenizer import FILE_SEPARATOR, MIDDLE, PREFIX, SUFFIX, TURN_END

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Kinds of pieces; GGUF's token_type has SentencePiece's numbers."""
_BPE = 2  # TrainerSpec.ModelType
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}".encode()
_NAMES = {
    "prefix": PREFIX, "fim_pre": PREFIX, "suffix": SUFFIX, "fim_suf": SUFFIX, "middle": MIDDLE, "fim_mid": MIDDLE,
    "fsep": FILE_SEPARATOR, "fim_sep": FILE_SEPARATOR, "eot": TURN_END,
}  # fmt: skip
"""What tokenizer.ggml.*_token_id name, in llama.cpp's older and newer words, where a piece itself is called unused."""


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
    pad = _pad(header, types, ids)
    model = b"".join(
        [
            *(_piece(*entry) for entry in zip(_spelled(pieces, types), scores, types, strict=True)),
            message(
                2,  # trainer_spec
                varint_field(3, _BPE),
                varint_field(4, len(pieces)),
                varint_field(35, _BYTE in types),
                *(varint_field(40 + i, ids[name]) for i, name in enumerate(("unknown", "bos", "eos"))),
                varint_field(43, -1 if pad is None else pad),
                b"" if pad is None else bytes_field(48, pieces[pad]),
                *(bytes_field(45 + i, pieces[ids[name]]) for i, name in enumerate(("unknown", "bos", "eos"))),
            ),
            message(
                3,  # normalizer_spec
                bytes_field(1, b"identity"),
                varint_field(3, add_space is not False),
                varint_field(4, False),  # remove_extra_whitespaces
                varint_field(5, True),  # escape_whitespaces
            ),
        ]
    )
    names = _names(header, pieces)
    return name_pieces(model, names, str(where)) if names else model


def _names(header: Header, pieces: Sequence[bytes]) -> dict[str, int]:
    """Ids of pieces that are called unused, but that the file says the use of."""
    names = {}
    for key, name in _NAMES.items():
        id = header.find(f"tokenizer.ggml.{key}_token_id", int)
        if id is not None and 0 <= id < len(pieces) and is_unused(pieces[id].decode()):
            names[name] = id
    return names


def _pad(header: Header, types: Sequence[int], ids: dict[str, int]) -> int | None:
    """Find the piece of padding; some files name another one's, since llama.cpp pads with nothing."""
    id = header.find("tokenizer.ggml.padding_token_id", int)
    if id is None or not 0 <= id < len(types) or types[id] != _CONTROL or id in ids.values():
        return None
    return id


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
    return message(1, bytes_field(1, piece), b"\x15" + struct.pack("<f", score), varint_field(3, kind))
