"""What clients may ask for, in OpenAI's words, and how that becomes prompts.

It knows nothing of HTTP, of the engine, or of torch. What is not named here is ignored; docs/server.md lists it.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from codellama.config import SamplingParams
from codellama.errors import GrammarError, PromptError
from codellama.generation.prompt import Prompt, PromptMaker
from codellama.grammar import Grammar
from codellama.prompts import text_stop_tokens
from codellama.server.dialogs import ChatMessage, normalize_dialog
from codellama.server.markers import split_markers
from codellama.tokenizer import Tokenizer

TEMPERATURE, TOP_P = 0.2, 0.95  # where a client asks for none: what code is sampled with, not prose
MAX_TOKENS = 16  # of a completion; a chat's answer may fill the context
MAX_STOPS = 64
MAX_BIASES = 1024

_ID = re.compile("[0-9]{1,9}")


# A list is refused at its first wrong item: to describe a million wrong ones takes the event loop 20 seconds.
Ids = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


def _few(biases: Any) -> Any:
    """Refuse too many biases, before each of them is judged."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"there are {len(biases)} keys; at most {MAX_BIASES} are possible")
    return biases


Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Biases = Annotated[dict[str, Bias], BeforeValidator(_few)]


def _no_null(default: Any) -> BeforeValidator:
    """Let null mean that the field is not there: many clients send all that they know."""
    return BeforeValidator(lambda value: default if value is None else value)


class StreamOptions(BaseModel):
    """How to stream."""

    include_usage: Annotated[bool, _no_null(False)] = False


class JsonSchema(BaseModel):
    """A schema with OpenAI's wrapping; a name, a description and strict are accepted and change nothing."""

    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema"), _no_null(True)] = True


class ResponseFormat(BaseModel):
    """What form an answer must have; text is any."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """Say it in our words.

        Raises:
            GrammarError: the schema is missing or too large.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar.json_object()
        if self.json_schema is None:
            raise GrammarError("response_format has no json_schema; with type json_schema one was expected")
        return Grammar.json_schema(self.json_schema.schema_)


class GenerationRequest(BaseModel):
    """The fields that chats and completions share.

    Attributes:
        top_k: 0 and -1 keep all.
        seed: makes the answer repeat; the n answers of one request have different ones.
        logit_bias: keys that are no ids of the vocabulary are ignored.
        max_tokens: clamped to what the context leaves; negative is all of it.
    """

    stream: Annotated[bool, _no_null(False)] = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, _no_null(1), Field(ge=1, le=128)] = 1
    temperature: Annotated[float, _no_null(TEMPERATURE), Field(ge=0, le=100, allow_inf_nan=False)] = TEMPERATURE
    top_p: Annotated[float, _no_null(TOP_P), Field(ge=0, le=1, allow_inf_nan=False)] = TOP_P
    top_k: Annotated[int, _no_null(0), Field(ge=-1)] = 0
    min_p: Annotated[float, _no_null(0.0), Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    repetition_penalty: Annotated[float, _no_null(1.0), Field(ge=0.01, le=100, allow_inf_nan=False)] = 1.0
    presence_penalty: Annotated[float, _no_null(0.0), Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[float, _no_null(0.0), Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    logit_bias: Biases | None = None
    response_format: ResponseFormat | None = None
    speculate: Annotated[int, _no_null(0), Field(ge=0, le=64)] = 0
    stop: str | Texts | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    max_tokens: int | None = None

    @property
    def include_usage(self) -> bool:
        """True where a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def n_answers(self) -> int:
        """How many prompts `prompts` makes, known before it makes them."""
        return self.n

    def params(
        self, vocab_size: int, max_gen_len: int | None, top_logprobs: int | None, echo: bool = False
    ) -> SamplingParams:
        """Say it in our words.

        Args:
            vocab_size: ids from there on have no bias.
            max_gen_len: None or negative is as much as the context holds.
            top_logprobs: None is no log-probabilities at all, 0 only those of the tokens themselves.
            echo: score the prompt, too, where log-probabilities are asked for.

        Raises:
            PromptError: too many stop strings; GrammarError: no schema where one is announced.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOPS:
            raise PromptError(f"stop has {len(stop)} strings; at most {MAX_STOPS} are possible")
        ids = {int(key): value for key, value in (self.logit_bias or {}).items() if _ID.fullmatch(key)}
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k if self.top_k > 0 else None,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((id, value) for id, value in ids.items() if id < vocab_size),
            grammar=self.response_format.grammar() if self.response_format is not None else None,
            max_gen_len=None if max_gen_len is None or max_gen_len < 0 else max_gen_len,
            stop=tuple(filter(None, stop)),
            seed=self.seed,
            speculate=self.speculate,
            logprobs=top_logprobs is not None,
            top_logprobs=top_logprobs or 0,
            echo=echo and top_logprobs is not None,
        )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, json_schema_extra={"minItems": 1})]
    max_completion_tokens: int | None = None
    logprobs: Annotated[bool, _no_null(False)] = False
    top_logprobs: Annotated[int, _no_null(0), Field(ge=0, le=20)] = 0

    def prompts(self, maker: PromptMaker, tokenizer: Tokenizer) -> list[Prompt]:
        """Make the n prompts.

        Raises:
            PromptError: the messages are no chat, or hold tags of the chat format; ContextLengthError: too long.
        """
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        params = self.params(tokenizer.n_words, limit, self.top_logprobs if self.logprobs else None)
        prompt = maker.chat(normalize_dialog(self.messages), params, where="the chat")
        return maker.alternatives(prompt, self.n)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions.

    Attributes:
        prompt: a text, token ids, or a list of either.
        suffix: what stands after the gap; the prompt is then what stands before it. None is no gap; an empty one is.
        logprobs: number of rivals to report at each place; 0 reports the tokens alone, None nothing.
    """

    prompt: str | Ids | Texts | Annotated[list[Ids], Field(fail_fast=True)] | None = ""
    suffix: str | None = None
    echo: Annotated[bool, _no_null(False)] = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def n_answers(self) -> int:
        """How many prompts `prompts` makes, known before it makes them."""
        return self.n * len(self._items())

    def prompts(self, maker: PromptMaker, tokenizer: Tokenizer) -> list[Prompt]:
        """Make n prompts of each prompt.

        Raises:
            PromptError: ids outside the vocabulary, a model that cannot infill; ContextLengthError: too long.
        """
        limit = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        params = self.params(tokenizer.n_words, limit, self.logprobs, self.echo)
        made: list[Prompt] = []
        for index, item in enumerate(self._items()):
            where = f"prompt {index}"
            if isinstance(item, str):
                prefix, suffix = (item, self.suffix) if self.suffix is not None else split_markers(item, tokenizer)
                if suffix is not None:
                    prompt = maker.gap(prefix, suffix, params, where=where)
                else:
                    prompt = maker.text(item, params, where)
                made += maker.alternatives(prompt, self.n)
                continue
            if self.suffix is not None:
                raise PromptError(f"{where} is token ids; with a suffix, a text was expected")
            prompt = maker.ids(item, replace(params, stop_tokens=text_stop_tokens(tokenizer)), where)
            prompt = replace(prompt, before=tokenizer.decode(prompt.tokens))
            made += maker.alternatives(prompt, self.n)
        return made

    def _items(self) -> Sequence[str | list[int]]:
        """The prompts as a list."""
        match self.prompt:
            case None:
                return [""]
            case str():
                return [self.prompt]
            case []:
                raise PromptError("prompt is an empty list; a text, token ids, or a list of either was expected")
            case [int(), *_]:
                return [[id for id in self.prompt if isinstance(id, int)]]
            case [str(), *_]:
                return [item for item in self.prompt if isinstance(item, str)]
            case _:
                return [item for item in self.prompt if isinstance(item, list)]


class TokenizeRequest(BaseModel):
    """POST /tokenize; vLLM's word is prompt, llama.cpp's is content."""

    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    tokens: Ids
