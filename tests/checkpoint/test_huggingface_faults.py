"""Hugging Face checkpoints: each way in which a folder, a description or a file can be wrong."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from codellama.checkpoint import open_checkpoint
from codellama.checkpoint.huggingface import INDEX, WEIGHTS
from codellama.errors import CheckpointError
from tests.fuzz_headers import fuzz
from tests.support import tiny

FIRST = "model-00001-of-00008.safetensors"
SECOND = "model-00002-of-00008.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.tiny_huggingface(tmp_path / "ckpt")


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    folder = tiny.tiny_huggingface(tmp_path / "divided", max_file_bytes=70_000)
    assert (folder / FIRST).is_file()
    return folder


def rewrite_config(folder: Path, **changes: object) -> None:
    """Change keys of config.json; ... removes."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of one file; None removes."""
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def rewrite_index(folder: Path, **changes: str | None) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    files = {**index["weight_map"], **changes}
    index["weight_map"] = {name: file for name, file in files.items() if file is not None}
    path.write_text(json.dumps(index))


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None], text: Callable[[str], str] = str) -> None:
    """Change the table of a header, and its text after that; the data stay."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end])
    change(table)
    header = text(json.dumps(table)).encode("utf-8", "surrogateescape")
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, r"architectures is \['MistralForCausalLM'\]; only \['LlamaForC"),
        ({"architectures": ["LlamaModel"]}, r"architectures is \['LlamaModel'\]"),
        ({"architectures": ...}, "architectures is None"),
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; only 'llama'"),
        ({"model_type": ...}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this package computes 'silu' only"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"mlp_bias": 0}, "mlp_bias is 0"),
        ({"head_dim": 8}, "head_dim is 8; .* hidden_size / num_attention_heads only, which is 6"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the weights are quantized by 'gptq'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling asks for rope_type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling asks for type 'linear'"),
        ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling has \['factor'\], which"),
        ({"rope_scaling": 2.0}, "rope_scaling is 2.0; a JSON object"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters asks for rope_type 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "two values of rope_theta, 10000.0 and 1000000.0"),
        ({"rope_theta": ..., "rope_parameters": ...}, r"config\.json has no rope_theta.*pass rope_theta=1000000\.0"),
        ({"rope_theta": "1e4", "rope_parameters": ...}, "rope_theta is '1e4'; a positive number"),
        ({"sliding_window": 4096, "moe": 1}, r"does not know: 'moe'; 'sliding_window'\. They may ask"),
        ({"hidden_size": ..., "rms_norm_eps": ...}, "lacks hidden_size, rms_norm_eps$"),
        ({"intermediate_size": ...}, "lacks intermediate_size"),
        ({"intermediate_size": 0}, "hidden_dim is 0; a positive integer"),
        ({"num_attention_heads": 7}, "in the words of params.json: dim 48 does not split into 7 heads"),
        ({"num_key_value_heads": 3}, "8 query heads cannot share 3"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; true or false"),
        ({"num_hidden_layers": 2**31 - 1}, r"asks for 2147483647 layers, but there are 30 tensors"),
        ({"hidden_size": 10**400}, "dim is 10{79}.*; a positive integer below"),
        ({"num_hidden_layers": 4}, r"lacks model\.layers\.3\..*; config\.json asks for 39 tensors"),
        ({"num_hidden_layers": 2}, r"holds 'model\.layers\.2\..*; and 6 more, which config\.json has no place for"),
        ({"intermediate_size": 168}, r"gate_proj\.weight is \[160, 48\], expected \[168, 48\].*and 6 more$"),
        ({"vocab_size": 312}, r"\[320, 48\], expected \[312, 48\].*312 pieces \(tokenizer: 320\): is this the tokeni"),
    ],
)
def test_descriptions_that_are_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    rewrite_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": ..., "hidden_act": ..., "attention_bias": ..., "mlp_bias": ..., "tie_word_embeddings": ...},
        {"rope_theta": ..., "rope_scaling": None, "transformers_version": "5.23.0", "dtype": "float32"},
        {"rope_parameters": None, "rope_scaling": {"type": "default"}, "pretraining_tp": 2, "head_dim": None},
        {"_name_or_path": "x", "use_cache": False, "pad_token_id": 0, "max_position_embeddings": 7, "bos_token_id": 9},
    ],
)
def test_descriptions_that_say_the_same(folder: Path, changes: dict[str, object]) -> None:
    expected = open_checkpoint(folder).args
    rewrite_config(folder, **changes)
    assert open_checkpoint(folder).args == expected


def test_missing_numbers_that_have_one_meaning(folder: Path) -> None:
    rewrite_config(folder, rope_theta=..., rope_parameters={"rope_type": "default"})
    assert open_checkpoint(folder, rope_theta=5e5).args.rope_theta == 5e5
    rewrite_config(folder, rope_theta=1e4)
    with pytest.raises(CheckpointError, match=r"rope_theta 500000\.0 was given, but .*config\.json says 10000\.0"):
        open_checkpoint(folder, rope_theta=5e5)
    rewrite_config(folder, num_key_value_heads=...)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight is \[12, 48\], expected \[48, 48\]"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "a JSON object was expected"),
        (b"\xff{}", "not JSON"),
        (b'{"vocab_size": 1, "vocab_size": 320}', "'vocab_size' stands there twice"),
        (b"[" * 1_000_000, "not JSON: maximum recursion"),
        (b" " * 11_000_000, "has 11000000 bytes"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none(divided: Path, name: str, content: bytes, message: str) -> None:
    (divided / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}.*{message}"):
        open_checkpoint(divided)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>Log in</html>", "HTML page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"PK\x03\x04pickled", "not a safetensors file"),
        (b"", r"\(0 bytes\) is not a safetensors file"),
        (b"\x02\0\0\0\0\0\0\0[]", "not a safetensors file"),
        (b"\0\0\0\0\0\0\0\x80{}", "announces a header of 9223372036854775808 bytes"),
        (b"\xff" * 8 + b"{}", "announces a header of 18446744073709551615 bytes"),
        (b"\x03\0\0\0\0\0\0\0{}", "has 10 bytes, but its header alone has 3: it is probably truncated"),
        (b"\x02\0\0\0\0\0\0\0{}", "asks for 3 layers, but there are 0 tensors"),
        (b"\x02\0\0\0\0\0\0\0{}+", "has 1 bytes behind its last tensor"),
    ],
)
def test_files_of_another_kind(folder: Path, content: bytes, message: str) -> None:
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("left", [0.001, 0.5, 0.9999])
def test_truncated_files(folder: Path, left: float) -> None:
    size = (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, int(size * left))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes, but its header .*truncated"):
        open_checkpoint(folder)


def norm(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda table: table["model.norm.weight"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (norm(dtype="I32"), "gives 'model.norm.weight' as 'I32'; BF16, F16, F32 can be read"),
        (norm(dtype=["F32"]), r"as \['F32'\]"),
        (norm(shape=[49]), "192 bytes, but its shape needs 196"),
        (norm(shape=[2**62, 2**62]), r"the shape \[4611686018427387904, 4611686018427387904\]"),
        (norm(shape=[2**47] * 8), "192 bytes, but its shape needs"),
        (norm(shape=[1] * 1_000_000), "the shape .*; up to 8 sizes"),
        (norm(shape=[-48]), r"the shape \[-48\]"),
        (norm(shape=[48.0]), r"the shape \[48\.0\]"),
        (norm(shape=[True]), r"the shape \[True\]"),
        (norm(shape="48"), "the shape '48'"),
        (norm(data_offsets=[0, 192]), "tensors overlap, or there is a gap"),
        (norm(data_offsets=[10**9, 10**9 + 192]), "tensors overlap, or there is a gap"),
        (norm(data_offsets=[192, 0]), "-192 bytes, but its shape needs 192"),
        (norm(data_offsets=[2**64, 2**64 + 192]), "the offsets"),
        (norm(data_offsets=[-192, 0]), "the offsets"),
        (norm(data_offsets=[0]), r"the offsets \[0\]; begin and end"),
        (norm(offset=1), r"describes 'model\.norm\.weight' by .*; dtype, shape, data_offsets"),
        (lambda table: table.update({"model.norm.weight": 5}), "describes 'model.norm.weight' by 5"),
        (lambda table: table.update(__metadata__={"format": 1}), "__metadata__ that is no table of strings"),
        (lambda table: table.update(__metadata__=[]), "__metadata__ that is no table of strings"),
        (lambda table: table.update({"\ud800": table.pop("model.norm.weight")}), r"lacks model\.norm\.weight"),
    ],
)
def test_hostile_headers(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    rewrite_header(folder / WEIGHTS, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda text: text.replace("lm_head", "model.norm", 1), "'model.norm.weight' stands there twice"),
        (lambda text: "{" + '"a":{' * 100_000, "not JSON: maximum recursion"),
        (lambda text: text.replace("norm", "\udcff", 1), "not JSON: 'utf-8' codec"),
        (lambda text: text.replace("48", "9" * 5000, 1), "not JSON: Exceeds the limit"),
        (lambda text: text[:-1], "not JSON"),
    ],
)
def test_headers_that_are_no_json(folder: Path, text: Callable[[str], str], message: str) -> None:
    rewrite_header(folder / WEIGHTS, lambda table: None, text)
    with pytest.raises(CheckpointError, match=rf"the header of .*{message}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["..\\x.safetensors", "../x.safetensors", "/x.safetensors", "x.bin", "", "a/b.safetensors"]
)
def test_an_index_that_leaves_the_folder(divided: Path, name: str) -> None:
    (divided.parent / "x.safetensors").write_bytes((divided / FIRST).read_bytes())
    rewrite_index(divided, **{"model.embed_tokens.weight": name})
    with pytest.raises(CheckpointError, match=r"names the file '.*'; a \.safetensors file in the same folder"):
        open_checkpoint(divided)


def test_an_index_that_is_not_true(divided: Path) -> None:
    rewrite_index(divided, **{"model.norm.weight": FIRST})
    with pytest.raises(CheckpointError, match=rf"lists 'model\.norm\.weight' in {FIRST}, which lacks it"):
        open_checkpoint(divided)
    rewrite_index(divided, **{"model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' of .* is not listed in"):
        open_checkpoint(divided)
    (divided / INDEX).write_text(json.dumps({"weight_map": []}))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_checkpoint(divided)


def test_a_tensor_in_two_files(divided: Path) -> None:
    rewrite(divided / SECOND, **{"model.embed_tokens.weight": torch.ones(320, 48)})
    with pytest.raises(
        CheckpointError, match=rf"'model\.embed_tokens\.weight' is in two files, .*{FIRST} and .*{SECOND}"
    ):
        open_checkpoint(divided)


def test_files_that_are_missing(divided: Path) -> None:
    (divided / FIRST).rename(divided / "kept")
    with pytest.raises(CheckpointError, match=rf"lacks {FIRST}, which {INDEX} names: download"):
        open_checkpoint(divided)
    (divided / "kept").rename(divided / FIRST)
    (divided / "config.json").rename(divided / "kept")
    with pytest.raises(CheckpointError, match=r"lacks config\.json"):
        open_checkpoint(divided)
    (divided / "kept").rename(divided / "config.json")
    (divided / INDEX).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {INDEX}, which says"):
        open_checkpoint(divided)


def test_one_file_and_an_index(divided: Path, folder: Path) -> None:
    (folder / WEIGHTS).rename(divided / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"holds both {WEIGHTS} and {INDEX}"):
        open_checkpoint(divided)


def test_tensors_that_are_missing_or_too_many_or_of_another_kind(folder: Path) -> None:
    rewrite(folder / WEIGHTS, **{"lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight; config\.json asks for 30 tensors"):
        open_checkpoint(folder)
    rewrite(folder / WEIGHTS, **{"lm_head.weight": torch.ones(320, 48), "lm_head.bias": torch.ones(320)})
    with pytest.raises(CheckpointError, match=r"holds 'lm_head\.bias', which config\.json has no place for"):
        open_checkpoint(folder)
    rewrite(folder / WEIGHTS, **{"lm_head.weight": torch.ones(320, 48, dtype=torch.int32), "lm_head.bias": None})
    with pytest.raises(CheckpointError, match=r"gives 'lm_head\.weight' as 'I32'"):
        open_checkpoint(folder)


def test_a_file_that_changes_after_it_was_opened(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / WEIGHTS, 1000)
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.read("norm.weight")


def test_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.model").rename(tmp_path / "elsewhere.model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.model, and a tokenizer\.json alone is not enough"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, tmp_path / "elsewhere.model").tokenizer().n_words == 320
    with pytest.raises(CheckpointError, match=r"no tokenizer at .*nowhere"):
        open_checkpoint(folder, tmp_path / "nowhere")
    (tmp_path / "other.model").write_bytes(tiny.tokenizer_bytes(size=312))
    with pytest.raises(CheckpointError, match=r"tokenizer has 312 pieces.*has 320 rows"):
        open_checkpoint(folder, tmp_path / "other.model")


def test_a_folder_with_two_formats(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_checkpoint(folder)
    assert caplog.messages == []
    tiny.tiny_checkpoint(folder, seed=1)
    with caplog.at_level(logging.WARNING):
        taken = open_checkpoint(folder)
    assert taken.format_name == "meta"
    (message,) = caplog.messages
    assert message.endswith("2 formats: meta is read; pass checkpoint_format to choose another one (huggingface)")
    caplog.clear()
    weights = [tiny.random_weights(tiny.ARGS, seed)["norm.weight"] for seed in (1, 0)]
    for name, expected in zip(("meta", "huggingface"), weights, strict=True):
        chosen = open_checkpoint(folder, checkpoint_format=name)
        assert chosen.format_name == name
        assert torch.equal(chosen.read("norm.weight"), expected)
    assert caplog.messages == []


def test_a_format_that_is_unknown_or_not_there(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint_format is 'hf'; known are meta, huggingface"):
        open_checkpoint(folder, checkpoint_format="hf")
    with pytest.raises(CheckpointError, match=r"holds no weights in the format meta, but huggingface: .*params\.json"):
        open_checkpoint(folder, checkpoint_format="meta")


def test_mutated_files_are_refused_or_read(tmp_path: Path) -> None:
    """`python -m tests.fuzz_headers --format huggingface` runs many more."""
    results = fuzz("huggingface", tmp_path, count=300)
    assert results.total() == 300
    assert results["read"] < 60
    assert len(results) > 25
