"""CodeGemma's architecture: what transformers saved, and the same weights as GGUF, in memory as planned."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from codellama.checkpoint import Checkpoint, load_model, open_checkpoint, tensor_shapes
from codellama.checkpoint.convert import convert
from codellama.checkpoint.huggingface import WEIGHTS
from codellama.checkpoint.info import info
from codellama.checkpoint.layout import rank_span
from codellama.checkpoint.verify import verify
from codellama.config import ModelArgs, RuntimeArgs
from codellama.errors import CheckpointError
from codellama.layers import Held
from codellama.linear import Dense
from codellama.memory import plan_budget
from codellama.model import RMSNorm, Transformer
from codellama.parallel import Parallel
from codellama.quantization import Quantization
from tests.support import tiny
from tests.support.gguf import write_gguf
from tests.support.oracle import oracle_logits
from tests.support.peers import transformers_gemma

CPU = torch.device("cpu")
IDS = torch.randint(tiny.VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
PARTS = ("one of four", "four of four")


def logits(model: Transformer) -> Tensor:
    with torch.inference_mode():
        return model.logits(model(IDS, torch.arange(IDS.shape[1])[None]))


def loaded(checkpoint: Checkpoint, quantize: str | None = None) -> Transformer:
    return load_model(checkpoint, Parallel(), CPU, torch.float32, quantization=Quantization.parse(quantize))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that transformers wrote, with a tokenizer."""
    folders = {}
    for name, args in tiny.GEMMAS.items():
        folders[name] = tmp_path_factory.mktemp("saved") / "ckpt"
        transformers_gemma(args, tiny.random_weights(args)).save_pretrained(folders[name])
        tiny.tiny_tokenizer(folders[name])
    return folders


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as GGUF."""
    folder = tmp_path_factory.mktemp("gguf")
    return {
        name: write_gguf(folder / f"{args.kv_heads}.gguf", args, tiny.random_weights(args), name="gemma")
        for name, args in tiny.GEMMAS.items()
    }


@pytest.mark.parametrize("name", PARTS)
def test_logits_equal_transformers(saved: dict[str, Path], name: str) -> None:
    args = tiny.GEMMAS[name]
    checkpoint = open_checkpoint(saved[name])
    assert checkpoint.args == args
    assert {tensor: checkpoint.shape(tensor) for tensor in checkpoint.names()} == tensor_shapes(args)
    with torch.no_grad():
        expected = transformers_gemma(args, tiny.random_weights(args))(IDS).logits
    assert (logits(loaded(checkpoint)) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", PARTS)
def test_logits_equal_the_oracle(name: str) -> None:
    args, ids = tiny.GEMMAS[name], IDS[0, :20].tolist()
    weights = tiny.random_weights(args)
    model = tiny.whole_model(args, weights)
    with torch.inference_mode():
        found = model.logits(model(torch.tensor([ids]), torch.arange(len(ids))[None]))[0]
    assert (found - oracle_logits(args, weights, ids)).abs().max() < 5e-5


@pytest.mark.parametrize("name", PARTS)
def test_in_bfloat16_every_hidden_state_has_transformers_bits_up_to_the_sums(name: str) -> None:
    """Where the embedding's factor and the norms round: the first norm's result, before any matrix."""
    args = tiny.GEMMAS[name]
    weights = tiny.random_weights(args, dtype=torch.bfloat16)
    model = tiny.whole_model(args, weights)
    theirs = transformers_gemma(args, weights).to(torch.bfloat16)
    seen: dict[str, Tensor] = {}
    model.layers[0].attention_norm.register_forward_hook(lambda _, x, y: seen.update(x=x[0], y=y))
    theirs.model.layers[0].input_layernorm.register_forward_hook(lambda _, x, y: seen.update(u=x[0], v=y))
    with torch.no_grad():
        model(IDS, torch.arange(IDS.shape[1])[None])
        theirs(IDS)
    assert torch.equal(seen["x"], seen["u"])
    assert torch.equal(seen["y"], seen["v"])


@pytest.mark.parametrize("name", PARTS)
def test_gguf_holds_the_same(files: dict[str, Path], saved: dict[str, Path], name: str) -> None:
    ours, theirs = open_checkpoint(files[name]), open_checkpoint(saved[name])
    assert ours.args == theirs.args
    for tensor in theirs.names():
        wide = ours.read(tensor)
        assert torch.allclose(wide, theirs.read(tensor), rtol=0, atol=2e-7 if wide.dim() == 1 else 0), tensor  # 1 + w
        for rank in range(4):
            span = rank_span(tensor, ours.args, rank, 4)
            if span:
                assert torch.equal(ours.read(tensor, *span), wide.narrow(span[0], span[1], span[2] - span[1])), tensor
    assert (logits(loaded(ours)) - logits(loaded(theirs))).abs().max() < 1e-3


def test_a_gguf_in_blocks_answers_nearly_the_same(tmp_path: Path, files: dict[str, Path]) -> None:
    args = tiny.GEMMAS["one of four"]
    path = write_gguf(tmp_path / "q8.gguf", args, tiny.random_weights(args), kind="Q8_0", name="gemma")
    expected = logits(loaded(open_checkpoint(files["one of four"])))
    difference = (logits(loaded(open_checkpoint(path))) - expected).abs().max() / expected.std()
    assert 1e-4 < difference < 0.5


@pytest.mark.parametrize(("quantize", "limit"), [("int8", 0.05), ("int4", 0.5)])
def test_quantized_as_it_is_loaded(saved: dict[str, Path], quantize: str, limit: float) -> None:
    checkpoint = open_checkpoint(saved["one of four"])
    expected = logits(loaded(checkpoint))
    model = loaded(checkpoint, quantize)
    difference = (logits(model) - expected).abs().mean() / expected.std()
    assert 1e-4 < difference < limit
    assert model.tok_embeddings.weight.dtype == torch.float32  # not rounded, unlike the matrix that was made of it
    assert model.output.matrix is not None
    assert not torch.equal(model.output.dense(), model.tok_embeddings.weight)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_ranks_hold_parts_of_the_same_codes(saved: dict[str, Path], quantize: str) -> None:
    checkpoint, quantization = open_checkpoint(saved["one of four"]), Quantization.parse(quantize)
    whole = load_model(checkpoint, Parallel(), CPU, torch.float32, quantization=quantization)
    parts = [
        load_model(checkpoint, Parallel(rank, 2), CPU, torch.float32, quantization=quantization) for rank in (0, 1)
    ]
    joined = torch.cat([part.output.dense() for part in parts])
    assert torch.equal(joined, whole.output.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_plan_knows_the_bytes(saved: dict[str, Path], dtype: torch.dtype, quantize: str | None, size: int) -> None:
    """float16 is multiplied in float32 on a CPU, so its output is packed, and cannot be the embedding."""
    checkpoint, quantization = open_checkpoint(saved["one of four"]), Quantization.parse(quantize)
    model = load_model(checkpoint, Parallel(size - 1, size), CPU, dtype, quantization=quantization)
    matrices = {id(layer.matrix): layer.matrix for layer in model.modules() if isinstance(layer, Held)}
    held = sum(matrix.nbytes for matrix in matrices.values() if matrix is not None)
    storages = {p.untyped_storage().data_ptr() for m in matrices.values() if isinstance(m, Dense) for p in [m.weight]}
    held += sum(p.nbytes for p in model.parameters() if p.untyped_storage().data_ptr() not in storages)
    itemsize = model.norm.weight.itemsize
    budget = plan_budget(checkpoint.args, RuntimeArgs(), size, itemsize, dtype.itemsize, quantization)
    assert budget.weights == held


def test_one_matrix_is_embedding_and_output(saved: dict[str, Path]) -> None:
    model = loaded(open_checkpoint(saved["one of four"]))
    assert [name for name, _ in model.named_parameters()].count("output.weight") == 0
    assert model.output.dense().data_ptr() == model.tok_embeddings.weight.data_ptr()
    before = logits(model)
    model.load_state_dict(tiny.random_weights(tiny.GEMMAS["one of four"], seed=9), assign=True)
    other = tiny.whole_model(tiny.GEMMAS["one of four"], tiny.random_weights(tiny.GEMMAS["one of four"], seed=9))
    assert torch.equal(logits(model), logits(other))
    assert not torch.allclose(before, logits(model))


def rewritten(saved: dict[str, Path], folder: Path, **changes: object) -> Path:
    """A copy of a folder with these changes of its description; ... removes."""
    folder.mkdir()
    for path in saved["one of four"].iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu", "hidden_activation": None, "tie_word_embeddings": ...},
        {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
        {"use_bidirectional_attention": False},
    ],
)
def test_descriptions_that_say_the_same(saved: dict[str, Path], tmp_path: Path, changes: dict[str, object]) -> None:
    found = open_checkpoint(rewritten(saved, tmp_path / "ckpt", **changes))
    assert found.args == tiny.GEMMAS["one of four"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": ...}, "lacks head_dim"),
        ({"head_dim": None}, "lacks head_dim"),
        ({"head_dim": 16}, r"q_proj\.weight is \[128, 64\], expected \[64, 64\]"),
        ({"head_dim": 31}, "head_dim is 31; .* must be even"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'; this package computes 'gelu_pytorch_tanh' only"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; this package computes"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"mlp_bias": False}, "does not know: 'mlp_bias'"),
        ({"model_type": "gemma2"}, "model_type is 'gemma2'; only 'llama' and 'gemma' can be read"),
        ({"model_type": "llama"}, r"architectures is \['GemmaForCausalLM'\]; only \['LlamaForCausalLM'\]"),
        ({"tie_word_embeddings": False}, r"lacks lm_head\.weight"),
    ],
)
def test_descriptions_that_are_refused(
    saved: dict[str, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(rewritten(saved, tmp_path / "ckpt", **changes))


def test_an_output_in_the_files_wins_over_the_description(saved: dict[str, Path], tmp_path: Path) -> None:
    """As for Llama: what is there is read."""
    folder = rewritten(saved, tmp_path / "ckpt")
    weights = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(5)
    output = torch.randn(weights["model.embed_tokens.weight"].shape, generator=generator)
    (folder / WEIGHTS).unlink()
    save_file(weights | {"lm_head.weight": output}, folder / WEIGHTS, {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.args == replace(tiny.GEMMAS["one of four"], tied_output=False)
    before = tiny.whole_model(
        checkpoint.args, tiny.random_weights(tiny.GEMMAS["one of four"]) | {"output.weight": output}
    )
    assert torch.equal(logits(loaded(checkpoint)), logits(before))
    convert(folder, tmp_path / "again", format="huggingface")
    assert open_checkpoint(tmp_path / "again").args == checkpoint.args


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gemma.attention.key_length": None}, "lacks gemma.attention.key_length"),
        ({"gemma.attention.value_length": 16}, "value_length is 16; 32 was expected, as gemma.attention.key_length is"),
        ({"gemma.attn_logit_softcapping": 30.0}, "does not know: 'gemma.attn_logit_softcapping'"),
        ({"gemma.rope.freq_base": 5e5, "gemma.rope.scaling.type": "linear"}, "scales its rotary frequencies"),
    ],
)
def test_metadata_that_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "bad.gguf", tiny.GEMMAS["one of four"], values=values, name="gemma")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_a_rotary_base_that_a_gguf_names_counts(tmp_path: Path) -> None:
    args = tiny.GEMMAS["one of four"]
    path = write_gguf(tmp_path / "base.gguf", args, values={"gemma.rope.freq_base": 5e5}, name="gemma")
    assert open_checkpoint(path).args.rope_theta == 5e5
    with pytest.raises(CheckpointError, match=r"rope_theta 10000\.0 was given, but .* says 500000\.0"):
        open_checkpoint(path, rope_theta=1e4)


@pytest.mark.parametrize("name", PARTS)
def test_converting_keeps_every_bit(saved: dict[str, Path], files: dict[str, Path], tmp_path: Path, name: str) -> None:
    for source in (saved[name], files[name]):
        target = tmp_path / source.stem
        convert(source, target, format="huggingface")
        before, after = open_checkpoint(source), open_checkpoint(target)
        assert after.args == before.args
        assert all(torch.equal(before.read(tensor), after.read(tensor)) for tensor in before.names())
        assert verify(source, full=True).ok
        assert verify(target, full=True).ok
    convert(tmp_path / "ckpt", tmp_path / "again", format="huggingface")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "ckpt" / WEIGHTS).read_bytes()


def test_transformers_reads_what_is_written(saved: dict[str, Path], tmp_path: Path) -> None:
    from transformers import GemmaForCausalLM

    convert(saved["one of four"], tmp_path / "ckpt", format="huggingface", dtype="bfloat16")
    theirs, loading = GemmaForCausalLM.from_pretrained(tmp_path / "ckpt", output_loading_info=True)
    assert {key for key, found in loading.items() if found} == set()
    assert (theirs.config.head_dim, theirs.config.max_position_embeddings) == (32, 8192)
    with torch.no_grad():
        expected = theirs.float()(IDS).logits
    assert (logits(loaded(open_checkpoint(tmp_path / "ckpt"))) - expected).abs().max() <= 1e-4


def test_metas_layout_has_no_words_for_it(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no words for head_dim 32, activation gelu_tanh.*to huggingface"):
        convert(saved["one of four"], tmp_path / "ckpt", format="meta")
    assert list(tmp_path.iterdir()) == []


def test_info_counts_a_tied_output_once(files: dict[str, Path]) -> None:
    found = info(files["one of four"], 64, 3, "bfloat16")
    args = tiny.GEMMAS["one of four"]
    assert found.parameters == sum(tensor.numel() for tensor in tiny.random_weights(args).values())
    assert found.budgets.keys() == {1, 2, 4}
    text = found.describe()
    for line in ("head_dim         32", "activation       gelu_tanh", "tied_output      True"):
        assert line in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_with_an_offset_rounds_once(dtype: torch.dtype) -> None:
    norm = RMSNorm(1024, 1e-6, 1)
    generator = torch.Generator().manual_seed(2)
    norm.weight = torch.nn.Parameter((0.1 * torch.randn(1024, generator=generator)).to(dtype))
    x = (3 * torch.randn(50, 1024, generator=generator)).to(dtype)
    wide = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * (1 + norm.weight.double())
    difference = (norm(x).double() - wide).abs() / wide.abs().clamp(min=1e-9)
    assert difference.max() <= (2**-8 if dtype == torch.bfloat16 else 2**-21)  # half a unit in the last place


def test_params_json_stays_as_strict(tmp_path: Path) -> None:
    params: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 8, "rope_theta": 1e6}
    extras: dict[str, Any] = {"head_dim": 8, "activation": "silu", "norm_offset": 0, "embedding_scale": None}
    for key, value in {**extras, "tied_output": False}.items():
        with pytest.raises(CheckpointError, match=f"does not know: {key}; known are dim, ffn_dim_multiplier"):
            ModelArgs.from_params({**params, key: value}, vocab_size=320)
