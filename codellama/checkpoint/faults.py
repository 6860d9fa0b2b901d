"""Faults that files of any format can have, found and worded alike.

It knows nothing of any one format.
"""

import json
from pathlib import Path
from typing import Any

from codellama.config import ModelArgs
from codellama.errors import CheckpointError, shown

_JSON_BYTES = 10 * 2**20


def refuse_page(path: Path, head: bytes) -> None:
    """Raise CheckpointError where a file of weights begins as a web page does."""
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is an HTML page, not weights: the download saved a login or error page")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object, of at most 10 MiB.

    Raises:
        CheckpointError: no JSON, no object, too large, or a key twice.
    """
    size = path.stat().st_size
    if size > _JSON_BYTES:
        raise CheckpointError(f"{path} has {size} bytes; {_JSON_BYTES} are the most that a description may have")
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Decode one JSON object in which no key stands twice; `where` is what an error message calls it.

    Raises:
        CheckpointError: no JSON, no object, or a key twice.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of thousands of digits; nested deeply
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a {type(value).__name__}; a JSON object was expected")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"{shown(key)} stands there twice")
            seen.add(key)
    return table


def vocabulary_hint(wrong: list[str], args: ModelArgs, tokenizer_words: int) -> str:
    """Say what it means when the first words of `wrong` name the embedding or the output; else nothing."""
    if not any(line.startswith(("tok_embeddings", "output", "model.embed_tokens", "lm_head")) for line in wrong):
        return ""
    return (
        f". The vocabulary has {args.vocab_size} pieces (tokenizer: {tokenizer_words}): "
        f"is this the tokenizer.model that came with these weights?"
    )


def some(names: list[str]) -> str:
    """Name a few, count the rest: hundreds of lines help nobody."""
    line = "; ".join(names[:3])
    return line if len(names) <= 3 else f"{line}; and {len(names) - 3} more"
