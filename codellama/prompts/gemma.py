"""CodeGemma's two formats: turns of a chat, and gaps in one of several files.

It knows nothing of generation. Source: Google's pages on the prompts of Gemma and CodeGemma. Those give no suffix-first
order, so there is none here.
"""

from collections.abc import Sequence
from typing import NamedTuple

from codellama.errors import PromptError
from codellama.prompts.dialog import TURN_TAGS, Dialog, check_dialog
from codellama.tokenizer import Tokenizer

_NAMES = {"user": "user", "assistant": "model"}


class TurnsFormat:
    """`<start_of_turn>user`, a line end, the content, `<end_of_turn>`; the system message is part of the first turn."""

    def __init__(self, tokenizer: Tokenizer, start_id: int, end_id: int) -> None:
        """Write dialogs with this tokenizer, which has the two pieces around a turn."""
        self._tokenizer = tokenizer
        self._start_id, self._end_id = start_id, end_id

    def encode_dialog(self, dialog: Dialog, allow_tags: bool = False) -> list[int]:
        """Encode a dialog up to where the model answers. Contents are stripped.

        The format has no system role: the message, a blank line and the first user message are one turn.

        Raises:
            PromptError: see `check_dialog`; or a message has a destination, which this format cannot express.
        """
        check_dialog(dialog, allow_tags, TURN_TAGS)
        for index, message in enumerate(dialog):
            if "destination" in message:
                raise PromptError(f"message {index} has a destination; only the 70B chat format can express one")
        turns = [(message["role"], message["content"].strip()) for message in dialog]
        if turns[0][0] == "system":
            turns = [("user", f"{turns[0][1]}\n\n{turns[1][1]}".strip()), *turns[2:]]
        ids = [self._tokenizer.bos_id]
        for role, content in turns:
            ids += [self._start_id, *self._encode(f"{_NAMES[role]}\n{content}"), self._end_id, *self._encode("\n")]
        return [*ids, self._start_id, *self._encode("model\n")]

    def stop_tokens(self) -> frozenset[int]:
        """The answer ends with its turn, or with the text's end."""
        return frozenset({self._end_id, self._tokenizer.eos_id})

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode_infilling(text)  # what stands between two pieces never begins a text


class GapPieces(NamedTuple):
    """Ids of the four pieces."""

    prefix: int
    suffix: int
    middle: int
    separator: int


def file_gap(
    tokenizer: Tokenizer, pieces: GapPieces, pre: str, suf: str, context_files: Sequence[tuple[str, str]]
) -> list[int]:
    """Encode a gap: bos, the other files, prefix piece, prefix, suffix piece, suffix, middle piece; no spaces between.

    A file is its path, a line end and its text. The separator stands behind each, so that the last one of them parts
    the other files from this one, whose path nobody said.
    """
    encode = tokenizer.encode_infilling
    ids = [tokenizer.bos_id]
    for file in context_files:
        ids += [*encode(titled(*file)), pieces.separator]
    return [*ids, pieces.prefix, *encode(pre), pieces.suffix, *encode(suf), pieces.middle]


def titled(path: str, text: str) -> str:
    """Put a file's path above its text; a file without one is its text alone."""
    return f"{path}\n{text}" if path else text
