"""The dicts that go in and out of the generator's methods: their keys are the reference's, and a few more.

They know nothing of how they are filled.
"""

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

from codellama.config import LogitsProcessor
from codellama.generation.request import FinishReason


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments that every generating method takes; their meaning is SamplingParams'."""

    top_k: int | None
    min_p: float
    repetition_penalty: float
    stop: str | Sequence[str]
    seed: int | None
    top_logprobs: int
    logits_processor: LogitsProcessor | None


class Prediction(TypedDict):
    """Keys of every result; tokens (as pieces), logprobs and top_logprobs are there if they were asked for."""

    finish_reason: FinishReason
    tokens: NotRequired[list[str]]
    logprobs: NotRequired[list[float]]
    top_logprobs: NotRequired[list[dict[str, float]]]


class CompletionPrediction(Prediction):
    """Result of text_completion."""

    generation: str


class InfillingPrediction(Prediction):
    """Result of text_infilling; full_text is prefix + generation + suffix."""

    generation: str
    full_text: str


class Answer(TypedDict):
    """The assistant's message; the 70B format adds whom it is for."""

    role: Literal["assistant"]
    content: str
    destination: NotRequired[str]


class ChatPrediction(Prediction):
    """Result of chat_completion."""

    generation: Answer
