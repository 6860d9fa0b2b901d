"""Names for pieces that a SentencePiece model keeps unused: CodeGemma's special pieces, as other files call them.

The names are written into the model, so that there is one Tokenizer, and a converted checkpoint keeps them. It knows
nothing of what the pieces are for. Sources: sentencepiece_model.proto; transformers' tokenizer_config.json.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from codellama.checkpoint.faults import read_json
from codellama.checkpoint.protobuf import bytes_field, message, split_fields
from codellama.errors import CheckpointError, shown
from codellama.tokenizer import GEMMA_PIECES, Tokenizer

CONFIG = "tokenizer_config.json"
_UNUSED = re.compile(r"<unused\d+>")
_PIECES = _SPELLING = 1  # ModelProto.pieces, and SentencePiece.piece in each


def is_unused(piece: str) -> bool:
    """Say whether a piece is one that a vocabulary keeps for later."""
    return _UNUSED.fullmatch(piece) is not None


def open_with_names(path: Path) -> Tokenizer:
    """Open a `tokenizer.model` with the names that the tokenizer_config.json beside it adds.

    That file is read only where the model has unused pieces.

    Raises:
        CheckpointError: no SentencePiece model, or the two files contradict each other.
    """
    words = Tokenizer(path)
    config = path.parent / CONFIG
    if not any(map(is_unused, map(words.token_piece, range(words.n_words)))) or not config.is_file():
        return words
    names = _added_pieces(config)
    if all(id < words.n_words and words.token_piece(id) == name for name, id in names.items()):
        return words
    return Tokenizer.from_bytes(name_pieces(words.model_bytes, names, f"{path} and {CONFIG}"), str(path))


def name_pieces(model: bytes, names: Mapping[str, int], where: str) -> bytes:
    """Spell pieces of a SentencePiece model anew; those that are spelled so already stay.

    Args:
        model: content of a `tokenizer.model`.
        names: ids of the pieces.
        where: what an error message calls it.

    Raises:
        CheckpointError: the id is in use, or outside the vocabulary; or the piece is there with another one.
    """
    try:
        fields = list(split_fields(model))
        places = [at for at, (number, _, _) in enumerate(fields) if number == _PIECES]
        pieces = [_spelling(fields[at][1]) for at in places]
    except ValueError as error:
        raise CheckpointError(f"{where}: the SentencePiece model is damaged: {error}") from error
    ids = {piece: id for id, piece in enumerate(pieces)}
    written = [whole for _, _, whole in fields]
    for name, id in names.items():
        if ids.get(name, id) != id:
            raise CheckpointError(f"{where}: {name} should be piece {id}, but piece {ids[name]} is spelled so")
        if not 0 <= id < len(pieces):
            raise CheckpointError(f"{where}: {name} should be piece {id}, but there are {len(pieces)}")
        if pieces[id] == name:
            continue
        if not is_unused(pieces[id]):
            raise CheckpointError(f"{where}: {name} should be piece {id}, but that is {shown(pieces[id])}, not unused")
        content = fields[places[id]][1]
        written[places[id]] = message(
            _PIECES,
            *(
                bytes_field(number, name.encode()) if number == _SPELLING else whole
                for number, _, whole in split_fields(content)
            ),
        )
    return b"".join(written)


def _spelling(piece: bytes) -> str:
    return next((content.decode() for number, content, _ in split_fields(piece) if number == _SPELLING), "")


def _added_pieces(config: Path) -> dict[str, int]:
    """Ids of CodeGemma's special pieces among the added tokens."""
    added = read_json(config).get("added_tokens_decoder", {})
    if not isinstance(added, dict):
        raise CheckpointError(f"{config}: added_tokens_decoder is a {type(added).__name__}; an object was expected")
    names = {}
    for id, token in added.items():
        content = token.get("content") if isinstance(token, dict) else None
        if content not in GEMMA_PIECES:
            continue
        if not re.fullmatch("[0-9]{1,9}", id):
            raise CheckpointError(f"{config}: {content} has the id {shown(id)}; a number was expected")
        names[content] = int(id)
    return names
