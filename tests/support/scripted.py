"""A service without a model: it answers with the deltas of a script, in a thread of its own."""

import threading
from collections.abc import Sequence

from codellama.generation.prompt import Prompt, PromptMaker
from codellama.generation.request import Delta, Request
from codellama.server.service import NotReadyError, OnDelta, State, Status
from codellama.tokenizer import Tokenizer


class ScriptedService:
    """Each prompt gets the script's deltas; a script without an end runs until it is cancelled."""

    def __init__(self, tokenizer: Tokenizer, script: Sequence[Delta], state: State = "ready") -> None:
        self._tokenizer = tokenizer
        self._maker = PromptMaker(tokenizer, tokenizer.n_words, 64, seed=0)
        self.script = list(script)
        self.state: State = state
        self.submitted: list[Prompt] = []
        self.cancelled: list[Request] = []
        self.was_cancelled = threading.Event()

    def _check(self) -> None:
        if self.state != "ready":
            raise NotReadyError(f"the model is not ready: it is {self.state}")

    @property
    def prompts(self) -> PromptMaker:
        self._check()
        return self._maker

    @property
    def tokenizer(self) -> Tokenizer:
        self._check()
        return self._tokenizer

    def submit(self, prompt: Prompt, on_delta: OnDelta) -> Request:
        self._check()
        self.submitted.append(prompt)
        threading.Thread(target=lambda: [on_delta(delta) for delta in self.script], daemon=True).start()
        return self._maker.request(prompt)

    def cancel(self, handle: Request) -> None:
        self.cancelled.append(handle)
        self.was_cancelled.set()

    def status(self) -> Status:
        return Status(self.state, 64, 2)
