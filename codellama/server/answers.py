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
from codellama.tokenizer import Tokenizer

Json = dict[str, Any]
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


class Choice:
    """One generated text, as it grows."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Tokenizer, echo: bool = False) -> None:
        """Begin; with echo, the text begins with the prompt's."""
        self.index = index
        self.n_tokens = 0  # generated ones
        self.finish_reason: str | None = None
        self.refusal: str | None = None  # why a safety hook refused it
        self._tokenizer = tokenizer
        self._wants_scores = prompt.params.logprobs
        self._first = prompt.before if echo else ""
        self._echoed = len(prompt.tokens) if prompt.params.echo else 0
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._scores: list[TokenScore] = []
        self._offset = 0

    def opening(self) -> Json | None:
        """What a stream says before anything is generated."""
        return None

    def push(self, delta: Delta) -> Iterator[Json]:
        """Take a delta and yield what a stream says of it: a piece never goes on after a line's end."""
        if delta.finish_reason == "content_filter":
            self.finish_reason, self.refusal = delta.finish_reason, str(delta.error)
            yield from self._refusal(shown="".join(self._texts))
            yield self._last()
            return
        text, self._first = self._first + delta.text, ""
        self._texts.append(text)
        self._tokens += delta.tokens
        self._scores += delta.scores
        self.n_tokens = max(0, len(self._tokens) - self._echoed)
        logprobs = self._logprobs(delta.tokens, delta.scores) if self._wants_scores else None
        pieces = _LINE.findall(text)
        if not pieces and logprobs is not None and delta.tokens:
            pieces = [""]
        for piece in pieces:
            yield self._piece(piece, logprobs)
            logprobs = None  # with the first piece of its delta
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            yield self._last()

    def whole(self) -> Json:
        """All of it."""
        self._offset = 0
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
        texts, offsets = [self._spell(token) for token in tokens], []
        first = self._offset == 0 and self._echoed > 0  # nothing foretells the first token of a prompt
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        values = [score.logprob for score in scores]
        rivals = [{self._spell(token): value for token, value in score.top} for score in scores]
        return {
            "tokens": texts,
            "token_logprobs": [None, *values[1:]] if first and values else values,
            "top_logprobs": [None, *rivals[1:]] if first and rivals else rivals,
            "text_offset": offsets,
        }

    def _spell(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")


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
        self._prompt_tokens = sum(len(prompt.tokens) for prompt in prompts[::n])
        self._include_usage = include_usage
        self._names = ("chat.completion", "chat.completion.chunk") if chat else ("text_completion", "text_completion")
        self._head: Json = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_id,
        }

    def openings(self) -> Iterator[Json]:
        """Chunks that a stream begins with."""
        for choice in self.choices:
            opening = choice.opening()
            if opening is not None:
                yield self._chunk(opening)

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
        generated = sum(choice.n_tokens for choice in self.choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
        }
