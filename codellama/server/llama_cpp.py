"""llama.cpp's own routes, /completion and /infill, in its words: what is asked, and what is answered.

It knows nothing of HTTP or of the engine. Source of the words: llama.cpp, tools/server/README.md.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from codellama.config import SamplingParams
from codellama.errors import PromptError
from codellama.generation.prompt import Prompt, PromptMaker
from codellama.generation.request import Delta, TokenScore
from codellama.grammar import Grammar
from codellama.prompts import text_stop_tokens
from codellama.server.answers import Json, split_lines
from codellama.server.markers import split_markers
from codellama.server.schemas import Biases, GenerationRequest
from codellama.tokenizer import Tokenizer

Mixed = Annotated[list[int | str], Field(fail_fast=True)]  # as in schemas.py


def _aliases(name: str, *others: str) -> Any:
    return AliasChoices(name, *others)


def _as_object(value: Any) -> Any:
    """Write pairs of an id and its bias as OpenAI does; false is the lowest bias."""
    if isinstance(value, list):
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            raise ValueError("a list of pairs was expected, each of an id and its bias")
        value = {str(id): bias for id, bias in value}
    if isinstance(value, dict):
        return {id: -100.0 if bias is False else bias for id, bias in value.items()}
    return value


class LlamaCppRequest(GenerationRequest):
    """POST /completion.

    Attributes:
        prompt: a text, token ids, both mixed in a list, or a list of such prompts.
        max_tokens: llama.cpp says n_predict; negative is all that the context leaves.
        logit_bias: pairs of an id and its bias, where false forbids the id; or an object of the same.
        json_schema: what the text must satisfy.
        n_probs: rivals to report at each place; 0 reports nothing.
        return_tokens: also return the ids.
    """

    prompt: str | Mixed | Annotated[list[str | Mixed], Field(fail_fast=True)] = ""
    max_tokens: int | None = Field(None, validation_alias=_aliases("n_predict", "max_tokens"))
    repetition_penalty: Annotated[
        float,
        BeforeValidator(lambda value: 1.0 if value is None else value),
        Field(ge=0.01, le=100, allow_inf_nan=False, validation_alias=_aliases("repeat_penalty", "repetition_penalty")),
    ] = 1.0
    logit_bias: Annotated[Biases | None, BeforeValidator(_as_object)] = None
    json_schema: dict[str, Any] | bool | None = None
    n_probs: Annotated[int, BeforeValidator(lambda value: value or 0), Field(ge=0, le=20)] = 0
    return_tokens: Annotated[bool, BeforeValidator(lambda value: value or False)] = False

    @property
    def is_batch(self) -> bool:
        """True where prompt is a list of prompts, and so the answer a list of answers."""
        return isinstance(self.prompt, list) and bool(self.prompt) and not any(isinstance(x, int) for x in self.prompt)

    @property
    def n_answers(self) -> int:
        """How many prompts `prompts` makes; llama.cpp knows no n."""
        return len(self.prompt) if self.is_batch else 1

    def prompts(self, maker: PromptMaker, tokenizer: Tokenizer) -> list[Prompt]:
        """Make the prompts.

        Raises:
            PromptError: ids outside the vocabulary, a model that cannot infill; ContextLengthError: too long.
        """
        params = self._params(tokenizer)
        many: Sequence[Any] = self.prompt if self.is_batch else [self.prompt]
        return [self._one(item, params, maker, tokenizer, f"prompt {index}") for index, item in enumerate(many)]

    def _params(self, tokenizer: Tokenizer) -> SamplingParams:
        params = self.params(tokenizer.n_words, self.max_tokens, self.n_probs or None)
        if self.json_schema is not None:
            params = replace(params, grammar=Grammar.json_schema(self.json_schema))
        return replace(params, seed=None) if params.seed == -1 else params  # llama.cpp's word for any seed

    def _one(
        self, item: str | Mixed, params: SamplingParams, maker: PromptMaker, tokenizer: Tokenizer, where: str
    ) -> Prompt:
        if isinstance(item, str):
            prefix, suffix = split_markers(item, tokenizer)
            if suffix is not None:
                return maker.gap(prefix, suffix, params, where=where)
            return maker.text(item, params, where)
        ids: list[int] = []
        for part in item:
            ids += tokenizer.encode(part, bos=not ids, eos=False) if isinstance(part, str) else [part]
        prompt = maker.ids(ids, replace(params, stop_tokens=text_stop_tokens(tokenizer)), where)
        return replace(prompt, before=tokenizer.decode(prompt.tokens))


class ExtraFile(BaseModel):
    """A file that helps to fill a gap in another one."""

    filename: str = ""
    text: str = ""


class InfillRequest(LlamaCppRequest):
    """POST /infill.

    Attributes:
        input_extra: other files, the library's context_files.
        prompt: how the middle begins.
    """

    input_prefix: str
    input_suffix: str
    input_extra: Annotated[list[ExtraFile], Field(fail_fast=True)] | None = None

    @property
    def is_batch(self) -> bool:
        """Never: there is one gap."""
        return False

    def prompts(self, maker: PromptMaker, tokenizer: Tokenizer) -> list[Prompt]:
        """Make the prompt; errors as above."""
        if not isinstance(self.prompt, str):
            raise PromptError("the prompt of /infill is a list; the text that the middle begins with was expected")
        files = [(file.filename, file.text) for file in self.input_extra or ()]
        params = self._params(tokenizer)
        prompt = maker.gap(self.input_prefix, self.input_suffix, params, context_files=files)
        if not self.prompt:
            return [prompt]
        begun = [*prompt.tokens, *tokenizer.encode_infilling(self.prompt)]
        whole = maker.ids(begun, prompt.params, prompt.where)
        return [replace(whole, before=prompt.before + self.prompt, after=prompt.after, seed=prompt.seed)]


class LlamaCppAnswer:
    """The answer to one HTTP request: one text, or one for each of several prompts."""

    done = ""
    """What a stream ends with, beside its last event."""

    def __init__(
        self, prompts: Sequence[Prompt], tokenizer: Tokenizer, model_id: str, request: LlamaCppRequest
    ) -> None:
        """Begin."""
        self._request = request
        self.prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
        self._texts = [_Text(index, prompt, tokenizer, model_id, request) for index, prompt in enumerate(prompts)]

    @property
    def n_generated(self) -> int:
        """Tokens so far."""
        return sum(text.n_tokens for text in self._texts)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that the cache held."""
        return sum(text.n_reused for text in self._texts)

    def openings(self) -> Iterator[Json]:
        """Nothing."""
        return iter(())

    def take(self, index: int, delta: Delta) -> None:
        """Take a delta of a text, for `whole`."""
        self._texts[index].take(delta)

    def push(self, index: int, delta: Delta) -> Iterator[Json]:
        """Take a delta of a text and yield the chunks that tell it."""
        return self._texts[index].push(delta)

    def closing(self) -> Iterator[Json]:
        """Nothing: each text's last chunk says all."""
        return iter(())

    def whole(self) -> Json | list[Json]:
        """All of it, once every text has ended."""
        wholes = [text.whole() for text in self._texts]
        return wholes if self._request.is_batch else wholes[0]


class _Text:
    """One generated text, as it grows."""

    def __init__(
        self, index: int, prompt: Prompt, tokenizer: Tokenizer, model_id: str, request: LlamaCppRequest
    ) -> None:
        self._index, self._prompt, self._tokenizer = index, prompt, tokenizer
        self._model_id, self._request = model_id, request
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._scores: list[TokenScore] = []
        self._latest = Delta("")
        self._times = [time.perf_counter()]  # of the begin, the first delta and the last one

    @property
    def n_tokens(self) -> int:
        return len(self._tokens)

    @property
    def n_reused(self) -> int:
        return self._latest.n_reused

    def take(self, delta: Delta) -> None:
        self._times = [*self._times[:2], time.perf_counter()]
        self._latest = delta
        self._pieces.append(delta.text)
        self._tokens += delta.tokens
        self._scores += delta.scores

    def push(self, delta: Delta) -> Iterator[Json]:
        self.take(delta)
        probabilities, tokens = self._probabilities(delta.tokens, delta.scores), list(delta.tokens)
        for piece in split_lines(delta.text) or [""] * bool(delta.tokens):
            yield {
                "index": self._index, "content": piece, "tokens": tokens, "stop": False,
                "id_slot": 0, "tokens_predicted": len(self._tokens), "tokens_evaluated": len(self._prompt.tokens),
                **probabilities,
            }  # fmt: skip
            probabilities, tokens = {}, []
        if delta.finish_reason is not None:
            yield self._last("", [])

    def whole(self) -> Json:
        tokens = self._tokens if self._request.return_tokens else []
        return {**self._last("".join(self._pieces), tokens), **self._probabilities(self._tokens, self._scores)}

    def _last(self, content: str, tokens: list[int]) -> Json:
        word = self._latest.stopped_by
        kind = "limit" if self._latest.finish_reason == "length" else "eos" if word is None else "word"
        begin, first, last = self._times[0], self._times[1], self._times[-1]
        n_prompt, n_generated = len(self._prompt.tokens), len(self._tokens)
        params = self._prompt.params
        return {
            "index": self._index,
            "content": content,
            "tokens": tokens,
            "id_slot": 0,
            "stop": True,
            "model": self._model_id,
            "tokens_predicted": n_generated,
            "tokens_evaluated": n_prompt,
            "generation_settings": {
                "n_predict": -1 if params.max_gen_len is None else params.max_gen_len,
                "seed": self._prompt.seed,
                "temperature": params.temperature,
                "top_k": params.top_k or 0,
                "top_p": params.top_p,
                "min_p": params.min_p,
                "repeat_penalty": params.repetition_penalty,
                "stop": list(params.stop),
                "n_probs": params.top_logprobs,
                "stream": self._request.stream,
            },
            "prompt": self._prompt.before,
            "has_new_line": any("\n" in piece for piece in self._pieces),
            "truncated": False,
            "stop_type": kind,
            "stopping_word": word or "",
            "tokens_cached": self.n_reused,
            **({"refusal": str(self._latest.error)} if self._latest.finish_reason == "content_filter" else {}),
            "timings": {
                **_pace("prompt", n_prompt - self.n_reused, first - begin),
                **_pace("predicted", n_generated, last - first),
            },
        }

    def _probabilities(self, tokens: Sequence[int], scores: Sequence[TokenScore]) -> Json:
        if not self._request.n_probs:
            return {}
        scored = [
            {**self._scored(token, score.logprob), "top_logprobs": [self._scored(*rival) for rival in score.top]}
            for token, score in zip(tokens, scores, strict=True)
        ]
        return {"completion_probabilities": scored}

    def _scored(self, token: int, logprob: float) -> Json:
        spelled = self._tokenizer.token_bytes(token)
        return {"id": token, "token": spelled.decode(errors="replace"), "bytes": list(spelled), "logprob": logprob}


def _pace(name: str, n: int, seconds: float) -> Json:
    """Tell a number of tokens and the time that they took."""
    return {
        f"{name}_n": n,
        f"{name}_ms": 1000 * seconds,
        f"{name}_per_token_ms": 1000 * seconds / n if n else 0.0,
        f"{name}_per_second": n / seconds if seconds else 0.0,
    }
