"""The [INST] chat format of Code Llama 7B, 13B and 34B Instruct (and of Llama 2 chat).

It knows nothing of generation. Source: Llama 2 (arXiv 2307.09288, appendix A.3.3).
"""

from codellama.errors import PromptError
from codellama.prompts.dialog import Dialog, check_dialog
from codellama.tokenizer import Tokenizer


class InstructFormat:
    """`[INST] {user} [/INST] {assistant} `, the system message folded into the first user message."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Write dialogs with this tokenizer."""
        self._tokenizer = tokenizer

    def encode_dialog(self, dialog: Dialog, allow_tags: bool = False) -> list[int]:
        """Encode a dialog up to where the assistant answers.

        Every finished pair is bos + text + eos; the last user message is bos + text. Contents are stripped.

        Raises:
            PromptError: see `check_dialog`; or a message has a destination, which this format cannot express.
        """
        check_dialog(dialog, allow_tags)
        for index, message in enumerate(dialog):
            if "destination" in message:
                raise PromptError(f"message {index} has a destination; only the 70B chat format can express one")
        contents = [message["content"].strip() for message in dialog]
        if dialog[0]["role"] == "system":
            folded = f"<<SYS>>\n{dialog[0]['content']}\n<</SYS>>\n\n{dialog[1]['content']}"
            contents = [folded.strip(), *contents[2:]]
        ids: list[int] = []
        for user, assistant in zip(contents[:-1:2], contents[1::2], strict=True):
            ids += self._tokenizer.encode(f"[INST] {user} [/INST] {assistant} ", bos=True, eos=True)
        return ids + self._tokenizer.encode(f"[INST] {contents[-1]} [/INST]", bos=True, eos=False)

    def stop_tokens(self) -> frozenset[int]:
        """The answer ends with eos."""
        return frozenset({self._tokenizer.eos_id})
