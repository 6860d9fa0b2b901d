"""Rung 1 of the parity ladder: the model is Llama."""

import pytest
import torch

from codellama.config import ModelArgs
from codellama.model import RMSNorm
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


@pytest.mark.parametrize("args", CONFIGS[:2])
def test_gradients_equal_the_oracle(args: ModelArgs) -> None:
    """The demo checkpoint was trained with this forward."""
    weights = tiny.random_weights(args)
    ids = random_ids(args, 12)
    model = tiny.whole_model(args, weights).requires_grad_()
    logits = model.logits(model(torch.tensor([ids]), torch.arange(len(ids))[None]))[0]
    logits.square().mean().backward()
    wide = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    oracle_logits(args, wide, ids).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        expected = wide[name].grad
        assert expected is not None, name
        assert (parameter.grad - expected).abs().max() < 1e-4 * expected.abs().max(), name


def test_inference_has_the_bits_of_a_forward_for_gradients() -> None:
    args = CONFIGS[2]
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.whole_model(args, tiny.random_weights(args, dtype=dtype))
        tokens, positions = torch.tensor([random_ids(args, 80)]), torch.arange(80)[None]
        with torch.inference_mode():
            fast = model(tokens, positions)
        assert torch.equal(fast, model(tokens, positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_rounds_as_the_weights_were_trained(dtype: torch.dtype) -> None:
    norm = RMSNorm(2048, 1e-5)
    generator = torch.Generator().manual_seed(2)
    norm.weight = torch.nn.Parameter((1 + 0.1 * torch.randn(2048, generator=generator)).to(dtype))
    x = (3 * torch.randn(70, 2048, generator=generator)).to(dtype)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), wide.to(dtype) * norm.weight)
