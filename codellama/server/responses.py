"""What the routes answer with, as the schema in /openapi.json tells it.

Nothing is made or checked with these: `answers.py` and `faults.py` make the answers, and tests hold them against this.
"""

from typing import Any, Literal

from pydantic import BaseModel, RootModel

FinishReason = Literal["stop", "length", "content_filter"]


class ErrorObject(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error, whatever its status."""

    error: ErrorObject


class CachedTokens(BaseModel):
    """Tokens of the prompts that the cache held already."""

    cached_tokens: int


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class RivalScore(BaseModel):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenScore(RivalScore):
    """A token of an answer."""

    top_logprobs: list[RivalScore]


class ChatScores(BaseModel):
    """All tokens of an answer."""

    content: list[ChatTokenScore] | None
    refusal: list[ChatTokenScore] | None


class AssistantMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class ChatAnswerChoice(BaseModel):
    """One of the n answers to a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatScores | None
    finish_reason: FinishReason


class ChatAnswer(BaseModel):
    """All answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatAnswerChoice]
    usage: Usage


class CompletionScores(BaseModel):
    """All tokens of a text: spelled, scored, and where they begin in it."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionAnswerChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: CompletionScores | None
    finish_reason: FinishReason
    refusal: str = ""


class CompletionAnswer(BaseModel):
    """All texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionAnswerChoice]
    usage: Usage


class LlamaCppCompletion(BaseModel):
    """A text, in llama.cpp's words; the most important ones."""

    index: int
    content: str
    tokens: list[int]
    stop: bool
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    stop_type: Literal["none", "eos", "limit", "word"]
    stopping_word: str
    truncated: bool
    generation_settings: dict[str, Any]
    timings: dict[str, float]


class LlamaCppAnswers(RootModel[LlamaCppCompletion | list[LlamaCppCompletion]]):
    """One text, or one for each of several prompts."""


class ModelAnswer(BaseModel):
    """The model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelListAnswer(BaseModel):
    """The one model in a list."""

    object: Literal["list"]
    data: list[ModelAnswer]


class TokenizeAnswer(BaseModel):
    """Token ids of a text."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeAnswer(BaseModel):
    """The text of token ids, under both names."""

    prompt: str
    content: str


class HealthAnswer(BaseModel):
    """All is well."""

    status: Literal["ok"]


Responses = dict[int | str, dict[str, Any]]

REFUSALS: Responses = {
    400: {"model": ErrorAnswer, "description": "The request makes no sense, or does not fit the context"},
    401: {"model": ErrorAnswer, "description": "The API key is missing or wrong"},
    413: {"model": ErrorAnswer, "description": "The body is too large"},
    "4XX": {"model": ErrorAnswer, "description": "Anything else that is wrong with the request"},
    500: {"model": ErrorAnswer, "description": "The model failed"},
    504: {"model": ErrorAnswer, "description": "The answer took longer than the server allows"},
    503: {"model": ErrorAnswer, "description": "The model is not ready, or too many requests wait: try again later"},
}
"""Of every route; with 4XX among them, FastAPI adds no 422, which is never sent."""


def answers_with(model: type[BaseModel], *, streams: bool = False) -> Responses:
    """Describe what a route answers with; streams says that the same can come as server-sent events."""
    described: dict[str, Any] = {"model": model}
    if streams:
        told = "a chunk, or an error as in ErrorAnswer, as JSON; the last is [DONE]"
        event = {
            "type": "object",
            "properties": {"data": {"type": "string", "description": told}},
            "required": ["data"],
        }
        described["content"] = {"text/event-stream": {"itemSchema": event}}
    return {200: described}
