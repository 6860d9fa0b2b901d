"""What the weights are (ModelArgs), how we run them (RuntimeArgs), what one request asks for (SamplingParams).

This module knows nothing of files, tensors or torch.
"""

import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from codellama.errors import CheckpointError, shown
from codellama.grammar import Grammar

LogitsProcessor = Callable[[Sequence[int], Any], Any]
"""(token ids so far, float32 logits [vocab_size]) → logits of the same shape."""

_LARGEST_SIZE = 2**31 - 1
_LARGEST_NUMBER = 1e12  # of rope_theta and the like: far above any real one, and products of sizes stay finite

BEYOND_PARAMS = ("head_dim", "activation", "norm_offset", "embedding_scale", "tied_output")
"""Fields of ModelArgs that Meta's params.json has no key for."""


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The architecture of a checkpoint, in the words of Meta's params.json, and of what that has no words for.

    The last five say in what models with Llama's block differ from it. Their defaults are Llama's.

    Attributes:
        n_kv_heads: key/value heads; None means n_heads (multi-head attention).
        multiple_of: the feed-forward size is rounded up to a multiple of this.
        ffn_dim_multiplier: widens the feed-forward layer before rounding; None means 1.
        rope_theta: base of the rotary frequencies. No default: 10,000 in place of 1,000,000 breaks a model silently.
        head_dim: size of one attention head; None means dim / n_heads.
        activation: of the feed-forward gate: "silu", or "gelu_tanh" (GELU by its approximation with tanh).
        norm_offset: a norm scales by offset + weight, 0 or 1; with 1 in float32, before it rounds.
        embedding_scale: what embeddings are multiplied by, rounded to their own dtype; None is nothing.
        tied_output: the output has the weights of the embedding, and a checkpoint holds them once.

    Raises:
        CheckpointError: a size is not positive, the sizes do not divide, or another value is not among those above.
    """

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    rope_theta: float
    n_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    head_dim: int = None  # type: ignore[assignment]  # an int from the construction on
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_offset: int = 0
    embedding_scale: float | None = None
    tied_output: bool = False

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"):
            value = getattr(self, name)
            _check_size(name, value)
        for name in ("rope_theta", "norm_eps", "ffn_dim_multiplier", "embedding_scale"):
            value = getattr(self, name)
            if value is None and name in ("ffn_dim_multiplier", "embedding_scale"):
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= _LARGEST_NUMBER:
                raise CheckpointError(f"{name} is {shown(value)}; a positive number up to 1e12 was expected")
        if self.head_dim is None:
            if self.dim % (2 * self.n_heads):
                raise CheckpointError(f"dim {self.dim} does not split into {self.n_heads} heads of an even size")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        _check_size("head_dim", self.head_dim)
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}; rotary positions turn pairs, so it must be even")
        if self.n_heads % self.kv_heads:
            raise CheckpointError(f"{self.n_heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        for name, values in (("activation", ("silu", "gelu_tanh")), ("norm_offset", (0, 1))):
            if getattr(self, name) not in values:
                raise CheckpointError(f"{name} is {shown(getattr(self, name))}; one of {values} was expected")
        if not isinstance(self.tied_output, bool):
            raise CheckpointError(f"tied_output is {shown(self.tied_output)}; True or False was expected")

    @property
    def heads_dim(self) -> int:
        """Width of all query heads together: the rows of wq and the columns of wo."""
        return self.n_heads * self.head_dim

    @property
    def kv_heads(self) -> int:
        """n_kv_heads, which is never None after construction."""
        assert self.n_kv_heads is not None
        return self.n_kv_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer: 2/3 of 4·dim, widened, rounded up. Source: Llama 2's params.json."""
        return _hidden_dim(self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @property
    def beyond_params(self) -> dict[str, object]:
        """What a params.json cannot say of this model."""
        without = {field.name: field.default for field in fields(self)} | {"head_dim": self.dim / self.n_heads}
        return {name: getattr(self, name) for name in BEYOND_PARAMS if getattr(self, name) != without[name]}

    @classmethod
    def from_params(cls, params: Mapping[str, Any], *, vocab_size: int, rope_theta: float | None = None) -> "ModelArgs":
        """Read the content of a params.json strictly.

        Args:
            params: the decoded JSON object.
            vocab_size: the tokenizer's size; counts where the file gives none, or -1.
            rope_theta: counts where the file gives none.

        Raises:
                CheckpointError: an unknown or missing key, a bad value, no rope_theta from either side, or two.
        """
        known = {field.name for field in fields(cls)} - {*BEYOND_PARAMS}
        unknown = sorted(set(params) - known)
        if unknown:
            raise CheckpointError(
                f"params.json has keys that this package does not know: {', '.join(unknown)}; "
                f"known are {', '.join(sorted(known))}. It may describe another architecture"
            )
        missing = [key for key in ("dim", "n_layers", "n_heads") if key not in params]
        if missing:
            raise CheckpointError(f"params.json lacks {', '.join(missing)}")
        values = dict(params)
        if values.get("vocab_size", -1) == -1:
            values["vocab_size"] = vocab_size
        values["rope_theta"] = choose_rope_theta(values.get("rope_theta"), rope_theta, "params.json")
        return cls(**values)


def choose_rope_theta(found: Any, given: float | None, where: str) -> Any:
    """Take the base of the rotary frequencies from the weights' description, or else from the caller.

    Args:
        found: what the description says; None where it says nothing.
        given: what the caller says.
        where: what an error message calls the description.

    Raises:
        CheckpointError: neither says it, or they differ.
    """
    if found is None and given is None:
        raise CheckpointError(
            f"{where} has no rope_theta, and a wrong one breaks the model silently: pass "
            f"rope_theta=1000000.0 for Code Llama (10000.0 for 70B Python and Instruct, Llama 2 and CodeGemma)"
        )
    if found is not None and given is not None and found != given:
        raise CheckpointError(f"rope_theta {given} was given, but {where} says {shown(found)}")
    return given if found is None else found


def feed_forward_params(dim: int, hidden_dim: int) -> tuple[int, float | None]:
    """Find a multiple_of and an ffn_dim_multiplier that give this feed-forward width, the published ones first.

    Formats other than Meta's write the width itself.

    Raises:
        CheckpointError: a size is not positive.
    """
    _check_size("dim", dim)
    _check_size("hidden_dim", hidden_dim)
    published: tuple[tuple[int, float | None], ...] = ((256, None), (4096, 1.3))
    for multiple_of, multiplier in published:
        if _hidden_dim(dim, multiple_of, multiplier) == hidden_dim:
            return multiple_of, multiplier
    if _hidden_dim(dim, 1, None) <= hidden_dim:
        return hidden_dim, None  # rounded up to one times hidden_dim
    # The half keeps the product clear of the integers on both sides, whatever the last bit of the division.
    return hidden_dim, (hidden_dim + 0.5) / _hidden_dim(dim, 1, None)


def _hidden_dim(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    hidden = int(2 * 4 * dim / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


Decode = Literal["eager", "graph", "compile"]
"""How a step of one token for each row runs."""


@dataclass(frozen=True, kw_only=True)
class RuntimeArgs:
    """How the model is run.

    Attributes:
        max_seq_len: tokens that one row of the cache holds, prompt and generation together.
        max_batch_size: rows of the cache, so requests that are decoded at once; more wait for a free row.
        chunk_size: a prompt is prefilled in chunks of at most this many tokens.
        cache_dtype: "int8" holds keys and values in 8 bits; None in the dtype of the model.
        decode: how steps of one token per row run: "eager", as "graph" (CUDA) or through "compile" (torch.compile).
            None is eager: graphs have not run on a GPU yet.
    """

    max_seq_len: int = 2048
    max_batch_size: int = 4
    chunk_size: int = 2048
    cache_dtype: str | None = None
    decode: Decode | None = None

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "max_batch_size", "chunk_size"):
            object.__setattr__(self, name, _integer(name, getattr(self, name), 1))
        if self.cache_dtype not in (None, "int8"):
            raise ValueError(f"cache_dtype is {self.cache_dtype!r}; 'int8' was expected, or None for the model's own")
        if self.decode not in (None, "eager", "graph", "compile"):
            raise ValueError(f"decode is {self.decode!r}; eager, graph or compile was expected")


_RANGES = (
    ("temperature", 0.0, math.inf),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 1e-6, math.inf),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks for. Defaults generate greedily until a stop token or the end of the row.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_p: keep the smallest set of tokens whose probability reaches this; 0 is greedy, 1 keeps all.
        top_k: keep this many tokens; None keeps all.
        min_p: drop tokens less probable than this fraction of the most probable one.
        repetition_penalty: divides positive and multiplies negative logits of tokens that already occurred, prompt
            included; 1 changes nothing. Source: CTRL, arXiv 1909.05858, section 4.1.
        presence_penalty: subtracted from the logits of tokens that were generated.
        frequency_penalty: subtracted as often as a token was generated.
        logit_bias: added to the logits of these ids, -100 to 100 each; a mapping, kept as pairs in the order of ids.
        grammar: the form that the text must have. Tokens that stop may come when it is complete.
        max_gen_len: tokens to generate at most; None means as many as the row holds. 0 with echo scores the prompt.
        stop_tokens: ids that end the generation and are not returned.
        stop: strings that end the generation and are cut from the text, with all that follows.
        seed: makes the samples repeat; None draws a new one for each request.
        logprobs: report the log-probability of each returned token under the model, before any of the above.
        top_logprobs: also report this many most probable alternatives at each position.
        echo: return the prompt before the generation.
        logits_processor: called on the leader with the ids so far and the logits, returns the logits to use.
        speculate: guess up to this many tokens from what came before and let one step judge them; 0 does not. The
            tokens are the same. Ignored with a grammar, a penalty or a logits_processor.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    max_gen_len: int | None = None
    stop_tokens: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    echo: bool = False
    logits_processor: LogitsProcessor | None = None
    speculate: int = 0

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            object.__setattr__(self, name, _number(name, getattr(self, name), low, high))
        for name, least in (("top_k", 1), ("max_gen_len", 0), ("seed", None)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _integer(name, getattr(self, name), least))
        for name in ("top_logprobs", "speculate"):
            if getattr(self, name) is None:
                raise TypeError(f"{name} is None; an integer was expected, 0 for none")
            object.__setattr__(self, name, _integer(name, getattr(self, name), 0))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Iterable):
            raise TypeError(f"stop is {stop!r}; a string, or a list of strings, was expected")
        object.__setattr__(self, "stop", tuple(stop))
        if not isinstance(self.stop_tokens, Iterable) or isinstance(self.stop_tokens, str):
            raise TypeError(f"stop_tokens is {self.stop_tokens!r}; a list of integer token ids was expected")
        ids = frozenset(_integer("an id of stop_tokens", id, None) for id in self.stop_tokens)
        object.__setattr__(self, "stop_tokens", ids)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise TypeError(
                f"grammar is {self.grammar!r}; a Grammar was expected, such as Grammar.json_schema({{...}})"
            )
        for name in ("logprobs", "echo"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; True or False was expected")
        for text in self.stop:
            if not isinstance(text, str):
                raise TypeError(f"stop holds {text!r}; strings were expected")
            if not text:
                raise ValueError("stop holds an empty string, which would stop before the first token")
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise TypeError(f"logits_processor is {self.logits_processor!r}; a callable was expected")

    @property
    def greedy(self) -> bool:
        """True where the most probable token is taken without drawing."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """Check a logit_bias: a mapping, or the pairs that it is kept as."""
    if given is None or isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"logit_bias is {given!r}; a mapping from token ids to numbers was expected")
    pairs = given.items() if isinstance(given, Mapping) else given
    checked = {
        _integer("an id of logit_bias", id, None): float(_number("a value of logit_bias", value, -100, 100))
        for id, value in pairs
    }
    return tuple(sorted(checked.items()))


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_SIZE:
        raise CheckpointError(f"{name} is {shown(value)}; a positive integer below 2**31 was expected")


def _number(name: str, value: Any, low: float, high: float) -> float:
    """Check a number and make it Python's own; numpy's are welcome."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; a number was expected")
    own = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not (low <= own <= min(high, sys.float_info.max)):  # NaN fails every comparison
        bound = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} is {value!r}; a finite number {bound} was expected")
    return own


def _integer(name: str, value: Any, low: int | None) -> int:
    """Check an integer and make it Python's own; numpy's are welcome."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; an integer was expected")
    if low is not None and value < low:
        raise ValueError(f"{name} is {value}; it must be at least {low}")
    return int(value)
