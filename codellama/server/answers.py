"""Answers in OpenAI's words: what was generated, as it grows and as a whole.

It knows nothing of HTTP or of the engine: deltas in, dicts out.
"""

import re
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from codellama.generation.prompt import Prompt
from codellama.generation.request import Delta, TokenScore
from codellama.tokenizer import TextDecoder, Tokenizer

Json = dict[str, Any]
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


def split_lines(text: str) -> list[str]:
    """Cut a text after each of its line ends: a piece of a stream never goes on after one."""
    return _LINE.findall(text)


class Choice:
    """One generated text, as it grows."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Tokenizer, echo: bool = False) -> None:
        """Begin; with echo, the text begins with the prompt's."""
        self.index = index
        self.n_tokens = 0  # generated ones
        self.n_reused = 0  # of the prompt, that were in the cache
        self.finish_reason: str | None = None
        self.refusal: str | None = None  # why a safety hook refused it
        self._tokenizer = tokenizer
        self._wants_scores = prompt.params.logprobs
        self._before = self._first = prompt.before if echo else ""
        self._echoed = len(prompt.tokens) if prompt.params.echo else 0
        self._drops_space = tokenizer.implicit_space and prompt.tokens == [tokenizer.bos_id]  # as the text does
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._scores: list[TokenScore] = []
        self._places = self._measure()

    def opening(self) -> Json | None:
        """What a stream says before anything is generated."""
        return None

    def take(self, delta: Delta) -> str:
        """Take a delta, and return its text as the answer has it."""
        if delta.finish_reason == "content_filter":
            self.finish_reason, self.refusal = delta.finish_reason, str(delta.error)
            return ""
        text, self._first = self._first + delta.text, ""
        self._texts.append(text)
        self._tokens += delta.tokens
        self._scores += delta.scores
        self.n_tokens = max(0, len(self._tokens) - self._echoed)
        if delta.finish_reason is not None:
            self.finish_reason, self.n_reused = delta.finish_reason, delta.n_reused
        return text

    def push(self, delta: Delta) -> Iterator[Json]:
        """Take a delta and yield what a stream says of it: a piece never goes on after a line's end."""
        text = self.take(delta)
        if self.refusal is not None:
            yield from self._refusal(shown="".join(self._texts))
            yield self._last()
            return
        logprobs = self._logprobs(delta.tokens, delta.scores) if self._wants_scores else None
        pieces = split_lines(text)
        if not pieces and logprobs is not None and delta.tokens:
            pieces = [""]
        for piece in pieces:
            yield self._piece(piece, logprobs)
            logprobs = None  # with the first piece of its delta
        if delta.finish_reason is not None:
            yield self._last()

    def whole(self) -> Json:
        """All of it."""
        self._places = self._measure()
        logprobs = self._logprobs(self._tokens, self._scores) if self._wants_scores else None
        return {
            "index": self.index,
            **self._body("".join(self._texts)),
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
        }

    def _body(self, text: str) -> Json:
        return {"text": text, **self._refused()}

    def _piece(self, text: str, logprobs: Json | None) -> Json:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _last(self) -> Json:
        return {
            "index": self.index, "text": "", "logprobs": None, "finish_reason": self.finish_reason, **self._refused(),
        }  # fmt: skip

    def _refusal(self, shown: str) -> Iterator[Json]:
        """Tell a stream's reader of a refusal, before the last piece: a text becomes code, so it is left alone."""
        return iter(())

    def _refused(self) -> Json:
        return {} if self.refusal is None else {"refusal": self.refusal}

    def _logprobs(self, tokens: Sequence[int], scores: Sequence[TokenScore]) -> Json:
        offsets = [self._places.place(token) for token in tokens]
        # Two tokens may be spelled alike: the more probable one, which comes first, is told.
        rivals = [{self._spell(token): value for token, value in reversed(score.top)} for score in scores]
        return {
            "tokens": [self._spell(token) for token in tokens],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": rivals,
            "text_offset": offsets,
        }

    def _measure(self) -> "Places":
        return Places(self._tokenizer, self._before, self._echoed, self._drops_space)

    def _spell(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")


class Places:
    """Where in a returned text each of its tokens begins, in characters."""

    def __init__(self, tokenizer: Tokenizer, before: str, n_echoed: int, drops_space: bool) -> None:
        """Start at the text's beginning.

        Args:
            before: the text that is returned before the generated one.
            n_echoed: tokens that come before the generated ones; what they add to `before`, such as the text after a
                gap, has its place at its end.
            drops_space: the generated text is returned without SentencePiece's implicit space; a prompt always is,
                if there is one.
        """
        self._decoder = TextDecoder(tokenizer)
        self._tokenizer = tokenizer
        self._before, self._n_echoed, self._drops_space = before, n_echoed, drops_space
        # The next text may begin with a space that is not returned.
        self._space = drops_space or (n_echoed > 0 and tokenizer.implicit_space)
        self._at = 0
        self._n_tokens = 0

    def place(self, token: int) -> int:
        """Return where the next token begins; all bytes of one character have one place."""
        if self._n_tokens == self._n_echoed and self._n_echoed > 0:
            self._decoder, self._at, self._space = TextDecoder(self._tokenizer), len(self._before), self._drops_space
        pending, text = self._decoder.pending, self._decoder.push([token])
        if self._space and text:
            text, self._space = text.removeprefix(" "), False
        # A character that this token shows to be broken belongs to the tokens before it.
        start = self._at + (pending and text.startswith("\N{REPLACEMENT CHARACTER}"))
        self._at += len(text)
        self._n_tokens += 1
        return min(start, len(self._before)) if self._n_tokens <= self._n_echoed else start


class ChatChoice(Choice):
    """The same as a message of the assistant."""

    def opening(self) -> Json | None:
        """Say who speaks."""
        return self._delta({"role": "assistant", "content": ""})

    def _body(self, text: str) -> Json:
        content = text if self.refusal is None else self.refusal
        return {"message": {"role": "assistant", "content": content, "refusal": self.refusal}}

    def _refusal(self, shown: str) -> Iterator[Json]:
        """Tell it as OpenAI does, and in the content, too, on a line of its own: most clients show nothing else."""
        assert self.refusal is not None, "it was refused"
        yield self._delta({"refusal": self.refusal})
        between = "\n" if shown and not shown.endswith("\n") else ""
        for line in _LINE.findall(between + self.refusal):
            yield self._delta({"content": line})

    def _piece(self, text: str, logprobs: Json | None) -> Json:
        return {**self._delta({"content": text}), "logprobs": logprobs}

    def _last(self) -> Json:
        return {**self._delta({}), "finish_reason": self.finish_reason}

    def _delta(self, delta: Json) -> Json:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[int], scores: Sequence[TokenScore]) -> Json:
        content = [
            {
                **self._scored(token, score.logprob),
                "top_logprobs": [self._scored(*rival) for rival in score.top],
            }
            for token, score in zip(tokens, scores, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float) -> Json:
        return {"token": self._spell(token), "logprob": logprob, "bytes": list(self._tokenizer.token_bytes(token))}


class Answer:
    """The answer to one HTTP request: all its choices, in an envelope."""

    done = "data: [DONE]\n\n"
    """What a stream ends with, beside its last event."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        model_id: str,
        *,
        chat: bool,
        n: int = 1,
        echo: bool = False,
        include_usage: bool = False,
    ) -> None:
        """Begin.

        Args:
            prompts: one for each choice; n neighbours are the same one, which counts once in the usage.
            chat: speak of messages, not of texts.
        """
        kind = ChatChoice if chat else Choice
        self.choices = [kind(index, prompt, tokenizer, echo) for index, prompt in enumerate(prompts)]
        self._n = n
        self.prompt_tokens = sum(len(prompt.tokens) for prompt in prompts[::n])
        self._include_usage = include_usage
        self._names = ("chat.completion", "chat.completion.chunk") if chat else ("text_completion", "text_completion")
        self._head: Json = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_id,
        }

    @property
    def n_generated(self) -> int:
        """Tokens of all choices so far."""
        return sum(choice.n_tokens for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that the cache held before this request."""
        # The other choices of a prompt find it in the cache because the first has put it there.
        groups = [self.choices[at : at + self._n] for at in range(0, len(self.choices), self._n)]
        return sum(min(choice.n_reused for choice in group) for group in groups)

    def openings(self) -> Iterator[Json]:
        """Chunks that a stream begins with."""
        for choice in self.choices:
            opening = choice.opening()
            if opening is not None:
                yield self._chunk(opening)

    def take(self, index: int, delta: Delta) -> None:
        """Take a delta of a choice, for `whole`."""
        self.choices[index].take(delta)

    def push(self, index: int, delta: Delta) -> Iterator[Json]:
        """Take a delta of a choice and yield the chunks that tell it."""
        return (self._chunk(piece) for piece in self.choices[index].push(delta))

    def closing(self) -> Iterator[Json]:
        """Chunks that a stream ends with."""
        if self._include_usage:
            yield {"object": self._names[1], **self._head, "choices": [], "usage": self._usage()}

    def whole(self) -> Json:
        """All of it, once every choice has finished."""
        choices = [choice.whole() for choice in self.choices]
        return {"object": self._names[0], **self._head, "choices": choices, "usage": self._usage()}

    def _chunk(self, choice: Json) -> Json:
        usage: Json = {"usage": None} if self._include_usage else {}
        return {"object": self._names[1], **self._head, "choices": [choice], **usage}

    def _usage(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.n_generated,
            "total_tokens": self.prompt_tokens + self.n_generated,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
