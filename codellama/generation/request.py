"""One request on its way through the engine: its prompt, what it asks for, and what has been generated.

It knows nothing of batches, of the model, or of torch.
"""

import logging
import operator
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from codellama.config import SamplingParams
from codellama.errors import ContextLengthError, PromptError
from codellama.generation.drafting import Drafter
from codellama.generation.grammar import Matcher
from codellama.generation.stop_string import StopString
from codellama.tokenizer import TextDecoder, Tokenizer

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "error", "content_filter"]
"""How a generation ended; content_filter is a safety hook's word, which the engine never says."""


@dataclass(frozen=True)
class TokenScore:
    """Log-probability of one token under the model, in nats, and its most probable rivals as (id, log-probability)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What is certain since the last one: text, ids and their scores. The last of a request has a finish_reason.

    All deltas of a request, one after the other, are its Completion: what may still be cut off by a stop string is held
    back, and with echo the first one begins with the prompt's ids and scores.

    Attributes:
        stopped_by: the stop string that ended the text, in the last one.
        n_reused: tokens of the prompt so far that were in the cache already, and were not computed for this request.
        n_steps: passes of the model that gave a token so far; with speculation there are more tokens than passes.
    """

    text: str
    tokens: tuple[int, ...] = ()
    scores: tuple[TokenScore, ...] = ()
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    stopped_by: str | None = None
    n_reused: int = 0
    n_steps: int = 0


@dataclass(frozen=True)
class Completion:
    """A finished request.

    Attributes:
        tokens: generated ids, without the stop token; with echo the prompt's before them.
        text: the generated text alone.
        scores: one for each of tokens, if asked for. The first token of a prompt is certain: log-probability 0.
        error: what ended the request, where finish_reason is "error" or "content_filter".
        n_steps: passes of the model that gave a token, one for each without speculation.
    """

    tokens: tuple[int, ...]
    text: str
    scores: tuple[TokenScore, ...]
    finish_reason: FinishReason
    error: BaseException | None = None
    n_steps: int = 0


class GeneratedText:
    """Text of a generation as it grows: whole characters only; stop strings are cut and never shown."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, drop_space: bool = False, strip: bool = False
    ) -> None:
        """Begin an empty text.

        Args:
            tokenizer: decodes the ids.
            stop: strings that end the text; the text ends before the one whose end comes first.
            drop_space: drop SentencePiece's implicit space, because the generation begins the text.
            strip: drop white space around the whole, as a chat answer's content is written without it.
        """
        self._decoder = TextDecoder(tokenizer)
        self._stops = [StopString(text) for text in stop]
        self._drop_space = drop_space
        self._strip = strip
        self._held = ""
        self._parts: list[str] = []
        self._decoded = 0
        self._starts: list[int] = []
        self._n_certain = 0
        self._ended = False
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """True once a stop string has ended the text."""
        return self.stopped_by is not None

    @property
    def text(self) -> str:
        """All that has been returned so far."""
        return "".join(self._parts)

    @property
    def n_tokens(self) -> int:
        """Tokens that are certain to stay: a stop string may yet cut off those that have no share in the text."""
        if self._stops and not self._ended:
            certain = self._decoded - len(self._held)
            while self._n_certain < len(self._starts) and self._starts[self._n_certain] < certain:
                self._n_certain += 1
            return self._n_certain
        return len(self._starts)

    def push(self, token: int) -> str:
        """Add a token and return the text that became certain."""
        pending = self._decoder.pending
        text = self._decoder.push([token])
        # A character that this token shows to be broken belongs to the tokens before it.
        self._starts.append(self._decoded + (pending and text.startswith("\N{REPLACEMENT CHARACTER}")))
        return self._take(text, final=False)

    def finish(self) -> str:
        """Return what was held back, since nothing follows."""
        if self.stopped:
            return ""
        self._ended = True
        return self._take(self._decoder.finish(), final=True)

    def _take(self, text: str, final: bool) -> str:
        before = len(self._held)
        self._decoded += len(text)
        self._held += text
        ends = [(before + n, stop) for stop in self._stops if (n := stop.push(text)) is not None]
        if ends:
            _, sure, self.stopped_by = min((end, end - len(stop.text), stop.text) for end, stop in ends)
        else:
            overlap = 0 if final else max((stop.length for stop in self._stops), default=0)
            sure = len(self._held) - overlap
        taken, self._held = self._held[:sure], self._held[sure:]
        return self._trim(taken, ended=final or self.stopped)

    def _trim(self, taken: str, ended: bool) -> str:
        if self._drop_space and taken:
            taken, self._drop_space = taken.removeprefix(" "), False
        if self._strip:
            if not self._parts:
                taken = taken.lstrip()
            if not ended:  # white space at the end may turn out to be inside
                kept = taken.rstrip()
                taken, self._held = kept, taken[len(kept) :] + self._held
            else:
                taken = taken.rstrip()
        if taken:
            self._parts.append(taken)
        return taken


@dataclass(eq=False)
class Request:
    """A prompt, what is asked of it, and the state of its generation. The engine alone changes the state.

    Attributes:
        matcher: where it stands in its grammar, if it has one.
        counts: how often each id was generated; kept where a penalty asks for it.
        row: of the cache, once it has been given one.
        n_cached: tokens whose keys and values are there, or will be when the steps that were launched are over.
        n_pending: tokens that were drawn and are not read yet, 0 or 1: the device alone knows them.
        n_reused: how many of them other requests had computed, in this row or in one that they were copied from.
        n_steps: passes of the model that gave it a token.

    Raises:
        PromptError: the prompt holds no ids, or it or logit_bias holds ids outside the vocabulary.
        ContextLengthError: it leaves no room to generate.
    """

    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    vocab_size: int
    max_seq_len: int
    text: GeneratedText | None = None
    where: str = "the prompt"
    on_delta: Callable[[Delta], None] | None = None
    matcher: Matcher | None = None

    counts: dict[int, int] = field(default_factory=dict, init=False)
    row: int | None = field(default=None, init=False)
    n_cached: int = field(default=0, init=False)
    n_pending: int = field(default=0, init=False)
    n_reused: int = field(default=0, init=False)
    n_steps: int = field(default=0, init=False)
    output: list[int] = field(default_factory=list, init=False)
    scores: list[TokenScore] = field(default_factory=list, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    error: BaseException | None = field(default=None, init=False)
    _n_handed: int = field(default=0, init=False)
    _uniforms: list[float] = field(default_factory=list, init=False)
    _drafter: Drafter | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.prompt = check_ids(self.prompt, self.vocab_size, self.where)
        if self.params.logit_bias:
            check_ids([id for id, _ in self.params.logit_bias], self.vocab_size, f"logit_bias of {self.where}")
        if len(self.prompt) > self.max_seq_len - (self.params.max_gen_len != 0):
            raise ContextLengthError(len(self.prompt), self.max_seq_len, self.where)
        room = self.max_seq_len - len(self.prompt)
        self.n_max = room if self.params.max_gen_len is None else min(room, self.params.max_gen_len)
        self.rng = random.Random(str(self.seed))  # as a number, -1 would be 1
        if self.scores_prompt:
            self.scores.append(TokenScore(0.0))

    @property
    def scores_prompt(self) -> bool:
        """True where the prompt's own log-probabilities are asked for."""
        return self.params.echo and self.params.logprobs

    @property
    def n_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt) + len(self.output)

    @property
    def prefilling(self) -> bool:
        """True while part of the prompt is not in the cache yet."""
        return self.n_cached < len(self.prompt)

    @property
    def needs_ids(self) -> bool:
        """True where the next token cannot be drawn before the host knows the last one.

        A stop string or a stop token is no reason: what is drawn behind it is dropped.
        """
        return self.params.speculate > 0 or self._looks_back

    @property
    def _looks_back(self) -> bool:
        params = self.params
        penalized = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        return penalized or params.logits_processor is not None or self.matcher is not None

    def draft(self, most: int) -> list[int]:
        """Guess the next tokens, no more than this many, than it asked for, or than it may still generate but one."""
        most = min(most, self.params.speculate, self.n_max - len(self.output) - 1)
        if most < 1 or self._looks_back:
            return []
        if self._drafter is None:
            self._drafter = Drafter(self.prompt)
        self._drafter.extend(self.output[len(self._drafter) - len(self.prompt) :])
        return self._drafter.draft(most)

    def uniforms(self, n: int) -> list[float]:
        """Look at the next n random numbers, in [0, 1): one for each token, guessed or not; `take` takes them away."""
        self._uniforms += [self.rng.random() for _ in range(n - len(self._uniforms))]
        return self._uniforms[:n]

    def history(self) -> list[int]:
        """Prompt and output, for those parameters that look back; else nothing, since a prompt may be long."""
        looks_back = self.params.logits_processor is not None or self.params.repetition_penalty != 1
        return [*self.prompt, *self.output] if looks_back else []

    def allowed(self) -> bytearray | None:
        """One byte for each id, 0 where its grammar forbids it; None without a grammar.

        Raises:
            GrammarError: the grammar cannot be followed any further.
        """
        return self.matcher.allowed(self.params.stop_tokens) if self.matcher is not None else None

    def completion(self) -> Completion:
        """Return the result of a finished request."""
        assert self.finish_reason is not None, "the request is finished"
        text = self.text.text if self.text else ""
        return Completion(
            tuple(self._returned()), text, tuple(self.scores), self.finish_reason, self.error, self.n_steps
        )

    def take(self, drawn: Sequence[tuple[int, TokenScore | None]], guesses: Sequence[int] = ()) -> int:
        """Add what one step drew, as far as the guesses that it was drawn behind have turned out right.

        Args:
            drawn: tokens and their scores; each but the first was drawn as if the guess before it was right.
            guesses: one less.

        Returns:
            How many were added, the one that ended the request included.
        """
        self.n_steps += 1
        n = 0
        for token, score in drawn:
            self.append(token, score)
            n += 1
            if self.finish_reason is not None or n > len(guesses) or token != guesses[n - 1]:
                break
        del self._uniforms[:n]
        return n

    def append(self, token: int, score: TokenScore | None) -> None:
        """Add a generated token, or end with it."""
        if token in self.params.stop_tokens:
            self.finish("stop")
            return
        self.output.append(token)
        if self.params.presence_penalty or self.params.frequency_penalty:
            self.counts[token] = self.counts.get(token, 0) + 1
        if self.matcher is not None:
            self.matcher.advance(token)
        if score is not None:
            self.scores.append(score)
        text = self.text.push(token) if self.text else ""
        if self.text and self.text.stopped:
            # What a stop string cut off the text is cut off the tokens too.
            extra = len(self.output) - self.text.n_tokens
            del self.output[len(self.output) - extra :]
            del self.scores[len(self.scores) - (extra if score is not None else 0) :]
            self.finish("stop", text)
        elif self.matcher is not None and self.matcher.done:
            self.finish("stop", text)
        elif len(self.output) >= self.n_max:
            self.finish("length", text)
        else:
            self._emit(text)

    def finish(self, reason: FinishReason, text: str = "", error: BaseException | None = None) -> None:
        """End the request and hand out what was held back."""
        assert self.finish_reason is None, "a request ends once"
        self.finish_reason, self.error = reason, error
        self._emit(text + (self.text.finish() if self.text else ""))

    def cancel(self) -> None:
        """End the request, unless it has ended, because nobody wants it any more."""
        if self.finish_reason is None:
            self.finish("cancelled")

    def fail(self, error: BaseException) -> None:
        """End the request, unless it has ended, because of an error of its own or of the whole engine."""
        if self.finish_reason is None:
            self.finish("error", error=error)

    def _emit(self, text: str) -> None:
        """Hand out text, and the tokens that have become certain with it."""
        certain = len(self.output)
        if self.text and self.finish_reason is None:
            certain = self.text.n_tokens
        whole = self._returned()
        returned = whole[: len(whole) - len(self.output) + certain]
        tokens = returned[self._n_handed :]
        scores = self.scores[self._n_handed : len(returned)] if self.params.logprobs else []
        self._n_handed = len(returned)
        if self.on_delta is None:
            return
        try:
            word = self.text.stopped_by if self.text and self.finish_reason is not None else None
            counts = self.n_reused, self.n_steps
            self.on_delta(Delta(text, tuple(tokens), tuple(scores), self.finish_reason, self.error, word, *counts))
        except Exception as error:  # concerns this request alone, and there is nobody left to tell
            logger.error("the receiver of %s raised %s: %s", self.where, type(error).__name__, error)
            self.on_delta = None
            self.fail(error)

    def _returned(self) -> list[int]:
        if not self.params.echo:
            return self.output
        scored = len(self.scores) if self.scores_prompt else len(self.prompt)
        return [*self.prompt[:scored], *self.output]  # a prompt that was not scored through is returned so far


def check_ids(ids: Sequence[int], vocab_size: int, where: str) -> list[int]:
    """Copy token ids, once they are known to be ids.

    Raises:
        PromptError: none at all, or one outside the vocabulary.
        TypeError: something else than integers.
    """
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise TypeError(f"{where} is {ids!r}; a list of integer token ids was expected")
    ids = list(ids)
    if not ids:
        raise PromptError(f"{where} holds no token ids; at least one is needed (an empty text is bos alone)")
    for index, id in enumerate(ids):
        if not hasattr(id, "__index__") or isinstance(id, bool):
            raise TypeError(f"{where} holds {id!r} at {index}; integer token ids were expected")
        ids[index] = id = operator.index(id)  # numpy's integers are welcome
        if not 0 <= id < vocab_size:
            raise PromptError(f"{where} holds id {id} at {index}; the vocabulary has ids 0 to {vocab_size - 1}")
    return ids
