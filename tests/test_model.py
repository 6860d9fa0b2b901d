"""Rung 1 of the parity ladder: the model is Llama."""

import pytest
import torch

from codellama.config import ModelArgs
from codellama.model import attend, rotary_angles, rotate
from tests.support import tiny
from tests.support.oracle import oracle_logits
from tests.support.peers import transformers_model

CONFIGS = [
    ModelArgs(dim=48, n_layers=3, n_heads=8, n_kv_heads=2, vocab_size=320, multiple_of=40, rope_theta=1e4),
    ModelArgs(dim=40, n_layers=2, n_heads=4, vocab_size=96, multiple_of=24, rope_theta=1e6),
    ModelArgs(dim=96, n_layers=5, n_heads=6, n_kv_heads=1, vocab_size=128, multiple_of=56, rope_theta=1e6),
    ModelArgs(
        dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=72, multiple_of=32, ffn_dim_multiplier=1.3,
        rope_theta=1e4, norm_eps=1e-3,
    ),
]  # fmt: skip


def our_logits(args: ModelArgs, weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    model = tiny.whole_model(args, weights)
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([ids]), torch.arange(len(ids))[None]))
    return logits[0]


def random_ids(args: ModelArgs, length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(args.vocab_size, (length,), generator=generator).tolist()


@pytest.mark.parametrize("args", CONFIGS)
def test_logits_equal_the_oracle(args: ModelArgs) -> None:
    weights = tiny.random_weights(args)
    ids = random_ids(args, 23)
    difference = (our_logits(args, weights, ids) - oracle_logits(args, weights, ids)).abs().max()
    assert difference < 2e-5


@pytest.mark.parametrize("args", CONFIGS)
def test_logits_equal_transformers(args: ModelArgs) -> None:
    weights = tiny.random_weights(args)
    ids = random_ids(args, 67)
    theirs = transformers_model(args, weights)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    difference = (our_logits(args, weights, ids) - expected).abs().max()
    assert difference < 1e-4


def test_rotation_is_exact_far_out() -> None:
    position, head_dim, theta = 100_000, 8, 1e6
    cos, sin = rotary_angles(torch.tensor([[position]]), head_dim, theta)
    x = torch.arange(1.0, head_dim + 1).view(1, 1, 1, head_dim)
    turned = rotate(x, cos, sin).flatten().tolist()
    for pair in range(head_dim // 2):
        angle = torch.tensor(position * theta ** (-2 * pair / head_dim), dtype=torch.float64)
        a, b = 2 * pair + 1, 2 * pair + 2
        assert turned[2 * pair] == pytest.approx(float(a * angle.cos() - b * angle.sin()), abs=1e-6)
        assert turned[2 * pair + 1] == pytest.approx(float(a * angle.sin() + b * angle.cos()), abs=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("rows", [1, 2])
def test_attention_with_a_cache_equals_the_definition(
    rows: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles of queries, and a last one that is shorter."""
    generator = torch.Generator().manual_seed(3)
    new, heads, head_dim, length = 109, 6, 4, 140
    monkeypatch.setattr("codellama.memory.MASK_BYTES", rows * length * 5 * 50)
    query = torch.randn(rows, new, heads, head_dim, generator=generator)
    key = torch.randn(rows, kv_heads, length, head_dim, generator=generator)
    value = torch.randn(rows, kv_heads, length, head_dim, generator=generator)
    positions = torch.stack([torch.arange(new) + 31, torch.arange(new) + 7])[:rows]
    mixed = attend(query, key, value, positions)
    wide_key = key.repeat_interleave(heads // kv_heads, dim=1).double()
    wide_value = value.repeat_interleave(heads // kv_heads, dim=1).double()
    scores = torch.einsum("bthd,bhsd->bhts", query.double(), wide_key) / head_dim**0.5
    hidden = torch.arange(length) > positions[:, None, :, None]
    expected = torch.einsum(
        "bhts,bhsd->bthd", torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1), wide_value
    )
    assert (mixed - expected).abs().max() < 1e-5
