"""From text, gaps and chats to requests: encoded, checked, and able to travel to the replica that runs them.

It knows nothing of the model beyond two sizes, and nothing of torch.
"""

import numbers
import random
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from codellama.config import LogitsProcessor, SamplingParams
from codellama.errors import GrammarError, PromptError
from codellama.generation.generated_text import GeneratedText
from codellama.generation.grammar import Grammars, Matcher
from codellama.generation.request import Request, check_ids
from codellama.prompts import (
    Dialog,
    format_for,
    infilling_prompt_tokens,
    infilling_stop_tokens,
    text_stop_tokens,
)
from codellama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What one request starts from.

    Attributes:
        tokens: ids, bos included.
        params: what is asked for; a logits_processor cannot travel and is handed to `PromptMaker.request`.
        seed: of this request's own random numbers.
        where: what an error message calls it.
        before: the text that the generated one continues; after: the text that it leads to. For results.
        strip: drop white space around the generated text.
        matcher: the grammar, prepared for one request; it does not travel either, and is prepared again where needed.
        dialog: the chat that is answered; empty where it is none.
    """

    tokens: list[int]
    params: SamplingParams
    seed: int
    where: str
    before: str = ""
    after: str = ""
    strip: bool = False
    matcher: Matcher | None = field(default=None, compare=False, repr=False)
    dialog: Dialog = ()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"matcher": None}


class PromptMaker:
    """Makes prompts for one model. Every method checks its prompt as far as it can be checked before it runs.

    Raises:
        PromptError: the text cannot be expressed as ids.
        ContextLengthError: it leaves no room to generate.
        GrammarError: its grammar is refused.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_seq_len: int, seed: int | None) -> None:
        """Draw seeds for prompts that bring none; seed None draws them from the operating system."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_seq_len = max_seq_len
        self._grammars = Grammars(tokenizer, vocab_size)
        if seed is not None and not isinstance(seed, numbers.Integral):
            raise TypeError(f"seed is {seed!r}; an integer was expected")
        self._seeds = random.Random() if seed is None else random.Random(str(int(seed)))

    def ids(self, tokens: Sequence[int], params: SamplingParams, where: str = "the prompt") -> Prompt:
        """Take ids as they are; the caller sets the stop tokens."""
        return self._checked(tokens, params, where)

    def text(self, text: str, params: SamplingParams, where: str = "the prompt") -> Prompt:
        """Continue a text, until eos or the file's end."""
        with _named(where):
            tokens = self._tokenizer.encode(text, bos=True, eos=False)
        return replace(self._checked(tokens, _stopping(params, text_stop_tokens(self._tokenizer)), where), before=text)

    def gap(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams,
        suffix_first: bool = False,
        where: str = "the gap",
        context_files: Sequence[tuple[str, str]] = (),
    ) -> Prompt:
        """Fill what stands between prefix and suffix, until the middle's or the text's end."""
        with _named(where):
            tokens = infilling_prompt_tokens(self._tokenizer, prefix, suffix, suffix_first, context_files)
        checked = self._checked(tokens, _stopping(params, infilling_stop_tokens(self._tokenizer)), where)
        return replace(checked, before=prefix, after=suffix)

    def chat(
        self, dialog: Dialog, params: SamplingParams, allow_tags: bool = False, where: str = "the dialog"
    ) -> Prompt:
        """Answer a chat in the tokenizer's format."""
        chat = format_for(self._tokenizer)
        with _named(where):
            tokens = chat.encode_dialog(dialog, allow_tags)
        checked = self._checked(tokens, _stopping(params, chat.stop_tokens()), where)
        return replace(checked, strip=True, dialog=dialog)

    def alternatives(self, prompt: Prompt, n: int) -> list[Prompt]:
        """Repeat a prompt n times, each with a seed of its own; the first one keeps the prompt's."""
        more = (replace(prompt, seed=prompt.seed + index, matcher=self._matcher(prompt)) for index in range(1, n))
        return [prompt, *more]

    def request(self, prompt: Prompt, processor: LogitsProcessor | None = None) -> Request:
        """Make the request that runs a prompt.

        The first one of a prompt finds its grammar prepared; any other, and that of a prompt from elsewhere, waits.
        """
        request = self._request(prompt, processor)
        ready = prompt.matcher is not None and prompt.matcher.claim()
        request.matcher = prompt.matcher if ready else self._matcher(prompt)
        return request

    def _matcher(self, prompt: Prompt) -> Matcher | None:
        return None if prompt.params.grammar is None else self._grammars.matcher(prompt.params.grammar)

    def _request(self, prompt: Prompt, processor: LogitsProcessor | None = None) -> Request:
        return Request(
            prompt.tokens,
            replace(prompt.params, logits_processor=processor),
            prompt.seed,
            self._vocab_size,
            self._max_seq_len,
            GeneratedText(
                self._tokenizer,
                prompt.params.stop,
                drop_space=self._tokenizer.implicit_space and prompt.tokens == [self._tokenizer.bos_id],
                strip=prompt.strip,
            ),
            prompt.where,
        )

    def _checked(self, tokens: Sequence[int], params: SamplingParams, where: str) -> Prompt:
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        ids = check_ids(tokens, self._vocab_size, where)
        prompt = Prompt(ids, replace(params, logits_processor=None), seed, where)
        self._request(prompt)  # the other checks are the request's own
        if params.grammar is None:
            return prompt
        with _named(where):
            self._grammars.check(params.grammar)
            return replace(prompt, matcher=self._matcher(prompt))


def _stopping(params: SamplingParams, stop_tokens: Set[int]) -> SamplingParams:
    """Stop at these tokens, beside the caller's own."""
    return replace(params, stop_tokens=params.stop_tokens | stop_tokens)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Say which of a call's prompts is refused."""
    try:
        yield
    except GrammarError as error:
        raise GrammarError(f"{where}: {error}") from error
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from error
