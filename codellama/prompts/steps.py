"""The step chat format of Code Llama 70B Instruct: `Source: …`, a body, and `<step>` after every message.

It knows nothing of generation. Source: the 70B release's model card, as its tokenizer writes it.
"""

from codellama.prompts.dialog import Dialog, Message, check_dialog
from codellama.tokenizer import Tokenizer


class StepsFormat:
    """Header, body and the final header are encoded each on its own; a missing system message is an empty one."""

    def __init__(self, tokenizer: Tokenizer, step_id: int) -> None:
        """Write dialogs with this tokenizer, which has the step piece."""
        self._tokenizer = tokenizer
        self._step_id = step_id

    def encode_dialog(self, dialog: Dialog, allow_tags: bool = False) -> list[int]:
        """Encode a dialog up to where the assistant answers the user.

        Raises:
            PromptError: see `check_dialog`.
        """
        check_dialog(dialog, allow_tags)
        ids = [self._tokenizer.bos_id]
        if dialog[0]["role"] != "system":
            ids += self._encode_message({"role": "system", "content": ""})
        for message in dialog:
            ids += self._encode_message(message)
        return ids + self._encode(" Source: assistant\nDestination: user") + self._encode("\n\n ")

    def stop_tokens(self) -> frozenset[int]:
        """The answer ends with step, or with the text's end."""
        return frozenset({self._step_id, self._tokenizer.eos_id})

    def _encode_message(self, message: Message) -> list[int]:
        header = f" Source: {message['role']}"
        if "destination" in message:
            header += f"\nDestination: {message['destination']}"
        body = message["content"].strip()
        ids = self._encode(header)
        if body:
            ids += self._encode(f"\n\n {body}")
        return [*ids, self._step_id]

    def _encode(self, text: str) -> list[int]:
        # Each part is an ordinary text of its own, SentencePiece's implicit space included: so was the model trained.
        return self._tokenizer.encode(text, bos=False, eos=False)
