"""The dicts that go in and out of the generator's methods: their keys are the reference's, and a few more.

They know nothing of how a result is made.
"""

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

from codellama.config import LogitsProcessor, SamplingParams
from codellama.generation.request import FinishReason


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments that every generating method takes; their meaning is SamplingParams'."""

    top_k: int | None
    min_p: float
    repetition_penalty: float
    stop: str | Sequence[str] | None
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


def sampling_params(
    options: SamplingOptions,
    temperature: float,
    top_p: float,
    max_gen_len: int | None,
    logprobs: bool = False,
    echo: bool = False,
    stop_token: int | None = None,
) -> SamplingParams:
    """Check the arguments of a call.

    Raises:
        TypeError: an unknown argument, or one of the wrong type.
        ValueError: a value outside its range.
    """
    unknown = options.keys() - SamplingOptions.__annotations__.keys()
    if unknown:
        known = ", ".join(SamplingOptions.__annotations__)
        raise TypeError(f"unknown argument {', '.join(sorted(unknown))}; beside the named ones there are {known}")
    stop = options.get("stop")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    asked: dict[str, Any] = {**options, "stop": stops}
    return SamplingParams(
        **asked,
        temperature=temperature,
        top_p=top_p,
        max_gen_len=max_gen_len,
        logprobs=logprobs or bool(options.get("top_logprobs")),
        echo=echo,
        stop_tokens=frozenset() if stop_token is None else frozenset({stop_token}),
    )
