"""Prompt formats: from text and messages to token ids. One file per format; `format_for` chooses the chat format.

Nothing here knows of the model or of torch.
"""

from typing import Protocol

from codellama.prompts.dialog import TAGS, TURN_TAGS, Dialog, Message, Role, check_dialog
from codellama.prompts.gemma import TurnsFormat
from codellama.prompts.infilling import infilling_prompt_tokens, infilling_stop_tokens, text_stop_tokens
from codellama.prompts.instruct import InstructFormat
from codellama.prompts.steps import StepsFormat
from codellama.tokenizer import Tokenizer

__all__ = [
    "TAGS",
    "TURN_TAGS",
    "Dialog",
    "Message",
    "PromptFormat",
    "Role",
    "check_dialog",
    "dialog_prompt_tokens",
    "format_for",
    "infilling_prompt_tokens",
    "infilling_stop_tokens",
    "text_stop_tokens",
]


class PromptFormat(Protocol):
    """How a chat is written as token ids."""

    def encode_dialog(self, dialog: Dialog, allow_tags: bool = False) -> list[int]:
        """Encode a dialog up to where the assistant answers."""

    def stop_tokens(self) -> frozenset[int]:
        """Return the ids that end an answer."""


def format_for(tokenizer: Tokenizer) -> PromptFormat:
    """Choose the chat format by what the tokenizer holds.

    With the step piece it is the 70B format, with the two pieces around a turn CodeGemma's, else [INST].
    """
    if tokenizer.step_id is not None:
        return StepsFormat(tokenizer, tokenizer.step_id)
    if tokenizer.turn_start_id is not None and tokenizer.turn_end_id is not None:
        return TurnsFormat(tokenizer, tokenizer.turn_start_id, tokenizer.turn_end_id)
    return InstructFormat(tokenizer)


def dialog_prompt_tokens(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """Encode a dialog in the tokenizer's chat format.

    Raises:
        PromptError: the dialog is not one that the format can express; see `check_dialog`.
    """
    return format_for(tokenizer).encode_dialog(dialog)
