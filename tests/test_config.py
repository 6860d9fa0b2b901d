"""Sizes of the real models, strictness of params.json, and every range of the two other records."""

import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest

from codellama.config import ModelArgs, RuntimeArgs, SamplingParams, feed_forward_params
from codellama.errors import CheckpointError

SMALL = {"dim": 64, "n_layers": 2, "n_heads": 8, "vocab_size": 320, "rope_theta": 1e6}
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "norm_eps": 1e-5, "rope_theta": 1e6}
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "multiplier", "head_dim", "hidden_dim"),
    [
        pytest.param(4096, 32, 32, None, 256, None, 128, 11008, id="7B"),
        pytest.param(5120, 40, 40, None, 256, None, 128, 13824, id="13B"),
        pytest.param(8192, 48, 64, 8, 256, None, 128, 22016, id="34B"),
        pytest.param(8192, 48, 64, 8, 256, 1.0, 128, 22016, id="34B with a multiplier of 1"),
        pytest.param(8192, 80, 64, 8, 4096, 1.3, 128, 28672, id="70B"),
    ],
)
def test_the_real_models(
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None,
    multiple_of: int,
    multiplier: float | None,
    head_dim: int,
    hidden_dim: int,
) -> None:
    params: dict[str, Any] = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "norm_eps": 1e-5, "vocab_size": -1}
    params |= {"multiple_of": multiple_of, "rope_theta": 1e6}
    params |= {} if n_kv_heads is None else {"n_kv_heads": n_kv_heads}
    params |= {} if multiplier is None else {"ffn_dim_multiplier": multiplier}
    args = ModelArgs.from_params(params, vocab_size=32016)
    assert args.head_dim == head_dim
    assert args.hidden_dim == hidden_dim
    assert args.kv_heads == (n_kv_heads or n_heads)
    assert args.vocab_size == 32016


def test_hidden_dim_on_the_border() -> None:
    """2/3 · 4 · 96 = 256 is a multiple already; 2/3 · 4 · 112 = 298.7 is cut before it is widened and rounded up."""
    assert ModelArgs(**SMALL | {"dim": 96}).hidden_dim == 256
    assert ModelArgs(**SMALL | {"dim": 112}, multiple_of=1).hidden_dim == 298
    assert ModelArgs(**SMALL | {"dim": 112}, multiple_of=1, ffn_dim_multiplier=1.5).hidden_dim == 447


@pytest.mark.parametrize(("given", "expected"), [(None, 8), (8, 8), (2, 2), (1, 1)])
def test_n_kv_heads(given: int | None, expected: int) -> None:
    args = ModelArgs.from_params(PARAMS | {"n_kv_heads": given}, vocab_size=320)
    assert (args.n_kv_heads, args.kv_heads) == (expected, expected)


@pytest.mark.parametrize(("in_file", "expected"), [({}, 320), ({"vocab_size": -1}, 320), ({"vocab_size": 999}, 999)])
def test_vocab_size_of_the_file_counts(in_file: dict[str, int], expected: int) -> None:
    assert ModelArgs.from_params(PARAMS | in_file, vocab_size=320).vocab_size == expected


def test_two_values_of_rope_theta_are_refused() -> None:
    assert ModelArgs.from_params(PARAMS, vocab_size=320, rope_theta=1e6).rope_theta == 1e6
    with pytest.raises(CheckpointError, match=r"rope_theta 10000\.0 was given, but params\.json says 1000000\.0"):
        ModelArgs.from_params(PARAMS, vocab_size=320, rope_theta=1e4)


@pytest.mark.parametrize("in_file", [{}, {"rope_theta": None}])
def test_a_missing_rope_theta_is_refused(in_file: dict[str, None]) -> None:
    params = {key: value for key, value in PARAMS.items() if key != "rope_theta"} | in_file
    with pytest.raises(CheckpointError, match=r"no rope_theta.*rope_theta=1000000\.0"):
        ModelArgs.from_params(params, vocab_size=320)
    assert ModelArgs.from_params(params, vocab_size=320, rope_theta=1e4).rope_theta == 1e4


@pytest.mark.parametrize(
    ("dim", "hidden_dim", "expected"),
    [
        pytest.param(4096, 11008, (256, None), id="7B"),
        pytest.param(5120, 13824, (256, None), id="13B"),
        pytest.param(8192, 22016, (256, None), id="34B"),
        pytest.param(8192, 28672, (4096, 1.3), id="70B"),
        pytest.param(4096, 14336, (14336, None), id="wider than published"),
        pytest.param(4096, 5632, (5632, 5632.5 / 10922), id="narrower than two thirds of four"),
    ],
)
def test_a_width_that_is_published_gets_the_published_numbers(
    dim: int, hidden_dim: int, expected: tuple[int, float | None]
) -> None:
    assert feed_forward_params(dim, hidden_dim) == expected


def test_every_width_can_be_expressed() -> None:
    rng = random.Random(0)
    sizes = [(2, 1), (2, 2), (2**31 - 2, 1), (2, 2**31 - 1), (2**31 - 2, 2**31 - 1)]
    sizes += [(2 * rng.randint(1, 2**exponent), rng.randint(1, 2**30)) for exponent in range(30) for _ in range(40)]
    sizes += [(2 * rng.randint(1, 9000), rng.randint(1, 60_000)) for _ in range(2000)]
    for dim, hidden_dim in sizes:
        multiple_of, multiplier = feed_forward_params(dim, hidden_dim)
        args = ModelArgs(**SMALL | {"dim": dim, "n_heads": 1}, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
        assert args.hidden_dim == hidden_dim, (dim, hidden_dim)


@pytest.mark.parametrize(("dim", "hidden_dim"), [(0, 8), (8, 0), (8, 2**31), (2**31, 8), (8, True), (8, 8.0)])
def test_widths_that_are_none(dim: int, hidden_dim: int) -> None:
    with pytest.raises(CheckpointError, match=r"dim is .*; a positive integer below 2\*\*31 was expected"):
        feed_forward_params(dim, hidden_dim)


def test_unknown_keys_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"does not know: moe, use_scaled_rope;.*known are dim, "):
        ModelArgs.from_params(PARAMS | {"use_scaled_rope": True, "moe": {}}, vocab_size=320)


@pytest.mark.parametrize("missing", [("dim",), ("n_layers",), ("n_heads",), ("dim", "n_layers", "n_heads")])
def test_missing_keys_are_named(missing: tuple[str, ...]) -> None:
    params = {key: value for key, value in PARAMS.items() if key not in missing}
    with pytest.raises(CheckpointError, match=f"lacks {', '.join(missing)}$"):
        ModelArgs.from_params(params, vocab_size=320)


@pytest.mark.parametrize("name", ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"])
@pytest.mark.parametrize("value", [0, -2, 64.0, "64", True, [64], NAN, 2**31, 10**400])
def test_bad_sizes(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"^{name} is "):
        ModelArgs.from_params(PARAMS | {name: value}, vocab_size=320)


@pytest.mark.parametrize("name", ["rope_theta", "norm_eps", "ffn_dim_multiplier"])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, NAN, INF, 10**400, 1e13, "1e6", True, [1.0]])
def test_bad_numbers(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"^{name} is "):
        ModelArgs.from_params(PARAMS | {name: value}, vocab_size=320)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 65}, "dim 65 does not split into 8 heads"),
        ({"dim": 24}, "dim 24 does not split into 8 heads of an even size"),
        ({"n_kv_heads": 3}, "8 query heads cannot share 3"),
        ({"n_kv_heads": 16}, "8 query heads cannot share 16"),
    ],
)
def test_sizes_that_do_not_divide(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelArgs(**SMALL | sizes)


def test_the_tokenizers_size_is_checked_too() -> None:
    with pytest.raises(CheckpointError, match="vocab_size is 0"):
        ModelArgs.from_params(PARAMS, vocab_size=0)


def test_records_do_not_change() -> None:
    for record, name in ((ModelArgs(**SMALL), "dim"), (RuntimeArgs(), "max_seq_len"), (SamplingParams(), "top_p")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, 1)


@pytest.mark.parametrize("name", ["max_seq_len", "max_batch_size", "chunk_size"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (2.0, TypeError), ("2", TypeError), (True, TypeError), (None, TypeError)],
)
def test_runtime_args_are_positive_integers(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name} is "):
        RuntimeArgs(**{name: value})
    assert getattr(RuntimeArgs(**{name: 1}), name) == 1


def test_how_to_decode_is_one_of_three() -> None:
    ways = ["eager", "graph", "compile", None]
    assert [RuntimeArgs(decode=way).decode for way in ways] == ways
    with pytest.raises(ValueError, match=r"^decode is 'fast'; eager, graph or compile was expected"):
        RuntimeArgs(decode="fast")


@pytest.mark.parametrize(
    ("name", "good", "outside"),
    [
        ("temperature", (0, 0.0, 1e-9, 1, 100.0), (-1e-9, -1)),
        ("top_p", (0, 0.0, 0.5, 1, 1.0), (-0.1, 1.0000001, 2)),
        ("min_p", (0, 0.0, 0.5, 1, 1.0), (-0.1, 1.0000001, 2)),
        ("repetition_penalty", (1e-6, 0.5, 1, 2.5), (0, 0.0, 9e-7, -1.0)),
        ("presence_penalty", (-2, 0, 0.5, 2.0), (-2.1, 3)),
        ("frequency_penalty", (-2.0, 0, 0.5, 2), (-3, 2.0001)),
    ],
)
def test_numbers_of_sampling_params(name: str, good: tuple[float, ...], outside: tuple[float, ...]) -> None:
    for value in good:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (*outside, NAN, INF, -INF):
        with pytest.raises(ValueError, match=f"^{name} is "):
            SamplingParams(**{name: value})
    for wrong in (True, False, None, "0.5", [0.5], 1j):
        with pytest.raises(TypeError, match=f"^{name} is "):
            SamplingParams(**{name: wrong})


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
def test_an_integer_beyond_floats_is_no_finite_number(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is "):
        SamplingParams(**{name: 10**400})


@pytest.mark.parametrize(
    ("name", "good", "outside"),
    [
        ("top_k", (None, 1, 10**6), (0, -1)),
        ("max_gen_len", (None, 0, 1, 10**6), (-1,)),
        ("top_logprobs", (0, 1, 10**6), (-1,)),
        ("seed", (None, 0, -5, 2**64), ()),
    ],
)
def test_integers_of_sampling_params(name: str, good: tuple[int | None, ...], outside: tuple[int, ...]) -> None:
    for value in good:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(ValueError, match=f"^{name} is "):
            SamplingParams(**{name: value})
    for wrong in (True, False, 1.0, NAN, INF, "1", [1]):
        with pytest.raises(TypeError, match=f"^{name} is "):
            SamplingParams(**{name: wrong})


def test_biases_are_pairs_in_the_order_of_ids() -> None:
    params = SamplingParams(logit_bias={np.int64(7): -100, 2: np.float32(0.5)})
    assert params.logit_bias == ((2, 0.5), (7, -100.0))
    assert dataclasses.replace(params, seed=1).logit_bias == params.logit_bias
    assert hash(params) == hash(SamplingParams(logit_bias=((7, -100), (2, 0.5))))
    for wrong in ({1: 100.5}, {1: NAN}, {1: -INF}):
        with pytest.raises(ValueError, match=r"^a value of logit_bias is "):
            SamplingParams(logit_bias=wrong)  # type: ignore[arg-type]
    for wrong in (None, "1", 3, {"1": 0}, {1.5: 0}, {True: 0}, {1: "0"}):
        with pytest.raises(TypeError, match="logit_bias"):
            SamplingParams(logit_bias=wrong)  # type: ignore[arg-type]


def test_top_logprobs_is_never_none() -> None:
    with pytest.raises(TypeError, match=r"^top_logprobs is None"):
        SamplingParams(top_logprobs=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["logprobs", "echo"])
@pytest.mark.parametrize("value", [None, 1, "no"])
def test_switches_are_true_or_false(name: str, value: object) -> None:
    """So that "no" from a command line or a JSON file does not mean yes."""
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("value", "expected"), [((), ()), ("END", ("END",)), (["a", "bc"], ("a", "bc")), (("\n",), ("\n",))]
)
def test_stop_strings(value: Any, expected: tuple[str, ...]) -> None:
    assert SamplingParams(stop=value).stop == expected


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("", ValueError),
        (["a", ""], ValueError),
        ([1], TypeError),
        ([None], TypeError),
        (None, TypeError),
        (5, TypeError),
    ],
)
def test_bad_stop_strings(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        SamplingParams(stop=value)


def test_stop_tokens() -> None:
    assert SamplingParams(stop_tokens=[2, 7, 2]).stop_tokens == frozenset({2, 7})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 2, ["2"], [2.5], [None], "ab", [True]])
def test_bad_stop_tokens(value: Any) -> None:
    """A stop token that is no id never stops anything."""
    with pytest.raises(TypeError):
        SamplingParams(stop_tokens=value)


def test_logits_processor_is_callable() -> None:
    with pytest.raises(TypeError, match=r"^logits_processor is 'grammar'"):
        SamplingParams(logits_processor="grammar")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "greedy"),
    [
        ({}, True),
        ({"temperature": 0.5}, False),
        ({"temperature": 0.5, "top_p": 0.0}, True),
        ({"temperature": 0.5, "top_k": 1}, True),
        ({"temperature": 0.5, "top_k": 2, "top_p": 0.1}, False),
    ],
)
def test_greedy(given: dict[str, Any], greedy: bool) -> None:
    assert SamplingParams(**given).greedy is greedy


def test_numpy_scalars_are_numbers() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), top_p=np.float64(0.25), top_k=np.int64(3), max_gen_len=np.int32(4),
        seed=np.int64(5), stop_tokens=[np.int64(7)], top_logprobs=np.uint8(2),
    )  # fmt: skip
    assert params == SamplingParams(
        temperature=0.5, top_p=0.25, top_k=3, max_gen_len=4, seed=5, stop_tokens=frozenset({7}), top_logprobs=2
    )
    assert all(type(value).__module__ == "builtins" for value in vars(params).values())
    assert RuntimeArgs(max_seq_len=np.int64(9)) == RuntimeArgs(max_seq_len=9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stop": 5}, "stop is 5; a string, or a list of strings, was expected"),
        ({"stop_tokens": None}, "stop_tokens is None; a list of integer token ids was expected"),
        ({"stop_tokens": "12"}, "stop_tokens is '12'; a list"),
        ({"stop_tokens": 5}, "stop_tokens is 5; a list"),
        ({"temperature": np.bool_(True)}, "temperature is .*True.*; a number was expected"),
    ],
)
def test_stops_of_the_wrong_kind(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SamplingParams(**wrong)
