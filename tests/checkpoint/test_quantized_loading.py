"""Quantized as it is loaded: the same codes on any number of ranks, from any format, in the memory that was planned."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from codellama.checkpoint import load_model, open_checkpoint
from codellama.config import ModelArgs, RuntimeArgs
from codellama.errors import QuantizationError
from codellama.layers import Held
from codellama.linear import make_matrix
from codellama.memory import plan_budget
from codellama.model import Transformer
from codellama.parallel import Parallel
from codellama.quantization import Quantization
from tests.support import tiny

CPU = torch.device("cpu")
ARGS = ModelArgs(
    dim=128, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=tiny.VOCAB, multiple_of=48, rope_theta=1e4
)  # hidden_dim 384: with four ranks 96, which is three groups of 32


def matrices(model: Transformer) -> dict[str, Tensor]:
    """All that the linear layers of a rank hold, as numbers."""
    return {name: layer.dense() for name, layer in model.named_modules() if isinstance(layer, Held)}


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_parts_of_the_same_codes(tmp_path: Path, name: str, size: int) -> None:
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "ckpt", 2, ARGS))
    quantization = Quantization.parse(name)
    whole = matrices(load_model(checkpoint, Parallel(), CPU, torch.float32, quantization=quantization))
    parts = [
        matrices(load_model(checkpoint, Parallel(rank, size), CPU, torch.float32, quantization=quantization))
        for rank in range(size)
    ]
    for key, expected in whole.items():
        leaf = key.rpartition(".")[2]
        if leaf in ("wk", "wv") and size == 4:  # two key/value heads, each on two ranks
            joined = torch.cat([parts[0][key], parts[2][key]])
            assert torch.equal(parts[0][key], parts[1][key])
        else:
            joined = torch.cat([part[key] for part in parts], dim=1 if leaf in ("wo", "w2") else 0)
        assert torch.equal(joined, expected), key


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_layers_hold_what_quantization_makes_of_the_weights(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(tiny.tiny_huggingface(tmp_path / "ckpt", ARGS))
    quantization = Quantization.parse(name)
    model = load_model(checkpoint, Parallel(), CPU, torch.float32, quantization=quantization)
    weights = tiny.random_weights(ARGS)
    found = matrices(model)
    assert len(found) == 7 * ARGS.n_layers + 1
    for key, held in found.items():
        matrix = make_matrix(*held.shape, torch.float32, torch.float32, CPU, quantization)
        matrix.put_(0, weights[f"{key}.weight"])
        assert torch.equal(held, matrix.dense()), key
    plain = {key for key, _ in model.named_parameters()}
    assert plain == {key for key in weights if key.startswith("tok_embeddings") or "norm" in key}


@pytest.mark.parametrize("name", [None, "int8", "int4"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_plan_knows_the_bytes(tmp_path: Path, name: str | None, size: int) -> None:
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "ckpt", 1, ARGS))
    quantization = Quantization.parse(name)
    model = load_model(checkpoint, Parallel(1 % size, size), CPU, torch.bfloat16, quantization=quantization)
    held = {id(layer.matrix): layer.matrix.nbytes for group in model.matrices() for layer in group if layer.matrix}
    norms = {key: p.nbytes for key, p in model.named_parameters() if "norm" in key or key.startswith("tok_embeddings")}
    budget = plan_budget(ARGS, RuntimeArgs(), size, 2, 2, quantization)
    assert budget.weights == sum(held.values()) + sum(norms.values())


def test_dense_parameters_are_views_of_what_is_multiplied(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "ckpt", 1, ARGS))
    model = load_model(checkpoint, Parallel(), CPU, torch.float32)
    ids, positions = torch.tensor([[3, 5, 7]]), torch.arange(3)[None]
    before = model(ids, positions)
    attention = model.layers[1].attention
    assert attention.wq.matrix is attention.wv.matrix
    with torch.no_grad():
        attention.wv.weight.mul_(2)
    changed = model(ids, positions)
    assert not torch.allclose(before, changed)
    model.load_state_dict(tiny.random_weights(ARGS), assign=True)
    assert torch.allclose(model(ids, positions), before)


def test_groups_that_do_not_divide_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "ckpt", 1, ARGS))
    with pytest.raises(QuantizationError, match=r"groups of 128 do not divide .*wo \(64 inputs\)"):
        load_model(checkpoint, Parallel(0, 2), CPU, torch.float32, quantization=Quantization("int4", 128))
