"""The dicts that go in and out of the generator's methods: their keys are the reference's, and a few more.

They know nothing of how a generation is made.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NotRequired, TypedDict, TypeVar

from codellama.config import LogitsProcessor, SamplingParams
from codellama.errors import PromptError, shown
from codellama.generation.prompt import Prompt
from codellama.generation.request import Completion, FinishReason
from codellama.grammar import Grammar
from codellama.tokenizer import Tokenizer

T = TypeVar("T")


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments that every generating method takes; their meaning is SamplingParams'.

    A list of seeds has one for each prompt.
    """

    top_k: int | None
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    grammar: Grammar | None
    stop: str | Sequence[str] | None
    stop_tokens: Collection[int]
    seed: int | Sequence[int] | None
    top_logprobs: int
    logits_processor: LogitsProcessor | None
    speculate: int


class InfillingOptions(SamplingOptions, total=False):
    """Keyword arguments of the infilling methods.

    context_files are other files that help, each a path and its text; they stand before every gap of the call.
    """

    context_files: Sequence[tuple[str, str]]


class Prediction(TypedDict):
    """Keys of every result.

    tokens (as pieces) and logprobs are there if logprobs or top_logprobs was asked for; refusal is a safety hook's
    reason, where finish_reason is "content_filter".
    """

    finish_reason: FinishReason
    refusal: NotRequired[str]
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
    asked: dict[str, Any] = dict(options)
    if asked.get("stop", ()) is None:
        del asked["stop"]
    if isinstance(asked.get("seed"), list | tuple):  # see `seeded`
        del asked["seed"]
    params = SamplingParams(
        **asked,
        temperature=temperature,
        top_p=top_p,
        max_gen_len=max_gen_len,
        logprobs=logprobs or bool(options.get("top_logprobs")),
        echo=echo,
    )
    return params if stop_token is None else replace(params, stop_tokens=params.stop_tokens | {stop_token})


def split_files(options: InfillingOptions) -> tuple[SamplingOptions, list[tuple[str, str]]]:
    """Part the arguments of an infilling call: those of sampling, and the files that stand before the gap.

    Raises:
        TypeError: the files are not a list of a path and a text each.
    """
    sampling: Any = dict(options)
    files = sampling.pop("context_files", ())
    if isinstance(files, str) or not isinstance(files, Sequence):
        raise TypeError(f"context_files is a {type(files).__name__}; a list of (path, text) was expected")
    for index, file in enumerate(files):
        if not isinstance(file, tuple | list) or len(file) != 2 or not all(isinstance(part, str) for part in file):
            raise TypeError(f"context_files holds {shown(file)} at {index}; (path, text), two strings, was expected")
    return sampling, [(path, text) for path, text in files]


def paired(prefixes: Sequence[str], suffixes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Put together what surrounds each gap.

    Raises:
        TypeError: not two lists; PromptError: of different lengths.
    """
    if len(listed(prefixes)) != len(listed(suffixes)):
        raise PromptError(f"{len(prefixes)} prefixes but {len(suffixes)} suffixes; a gap has one of each")
    return zip(prefixes, suffixes, strict=True)


def seeded(prompts: list[Prompt], options: SamplingOptions) -> list[Prompt]:
    """Give each prompt the seed that a list of them has for it; nothing changes without such a list.

    Raises:
        TypeError: it holds something else than integers.
        ValueError: there are more or fewer seeds than prompts.
    """
    seeds = options.get("seed")
    if not isinstance(seeds, list | tuple):
        return prompts
    if len(seeds) != len(prompts):
        raise ValueError(
            f"{len(seeds)} seeds for {len(prompts)} prompts; one number for all, or one each, was expected"
        )
    return [
        replace(prompt, seed=seed, params=replace(prompt.params, seed=seed))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def refuse_alternatives(options: SamplingOptions) -> None:
    """Refuse to compute what a result has no place for.

    Raises:
        ValueError: top_logprobs is asked for.
    """
    if options.get("top_logprobs"):
        raise ValueError("top_logprobs has no place in this method's result; text_completion and its kin return it")


def listed(prompts: Sequence[T]) -> Sequence[T]:
    """Refuse one prompt where a list of them was expected.

    Raises:
        TypeError: not a list.
    """
    if isinstance(prompts, str | dict) or not isinstance(prompts, Sequence):
        raise TypeError(f"a list of prompts was expected; found {type(prompts).__name__}")
    return prompts


def describe_text(prompt: Prompt, completion: Completion, tokenizer: Tokenizer) -> CompletionPrediction:
    """Write the result of a text."""
    generation = prompt.before + completion.text if prompt.params.echo else completion.text
    return {"generation": generation, **describe(prompt, completion, tokenizer)}


def describe_gap(prompt: Prompt, completion: Completion, tokenizer: Tokenizer) -> InfillingPrediction:
    """Write the result of a gap."""
    full = prompt.before + completion.text + prompt.after
    return {"generation": completion.text, "full_text": full, **describe(prompt, completion, tokenizer)}


def describe_chat(prompt: Prompt, completion: Completion, tokenizer: Tokenizer) -> ChatPrediction:
    """Write the result of a chat; one that was refused has no content."""
    answer: Answer = {"role": "assistant", "content": completion.text}
    if tokenizer.step_id is not None:
        answer["destination"] = "user"
    return {"generation": answer, **describe(prompt, completion, tokenizer)}


def describe(prompt: Prompt, completion: Completion, tokenizer: Tokenizer) -> Prediction:
    """Write the keys that all results share."""
    described: Prediction = {"finish_reason": completion.finish_reason}
    if completion.finish_reason == "content_filter":
        described["refusal"] = str(completion.error)
    piece = tokenizer.token_piece
    if prompt.params.logprobs:
        described["tokens"] = [piece(id) for id in completion.tokens]
        described["logprobs"] = [score.logprob for score in completion.scores]
    if prompt.params.top_logprobs:
        described["top_logprobs"] = [{piece(id): value for id, value in score.top} for score in completion.scores]
    return described
