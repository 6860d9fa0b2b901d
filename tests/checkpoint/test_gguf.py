"""GGUF checkpoints: any slice of any block type, and each way in which a file can be wrong."""

import builtins
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codellama.checkpoint import open_checkpoint
from codellama.checkpoint.gguf import NAMES, GGUFCheckpoint, gguf_name
from codellama.checkpoint.layout import SHARD_DIM, rank_span, shard_dim, tensor_shapes
from codellama.config import ModelArgs
from codellama.errors import CheckpointError
from codellama.llama import Llama
from tests.support import gguf, tiny

WEIGHTS = tiny.random_weights(tiny.ARGS)
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return gguf.write_gguf(tmp_path / "model.gguf")


def write(folder: Path, **changes: Any) -> Path:
    """A tiny file with these changes of its values."""
    return gguf.write_gguf(folder / "changed.gguf", values={key.replace("__", "."): v for key, v in changes.items()})


def check_every_rank(checkpoint: Any, args: ModelArgs, expected: dict[str, torch.Tensor]) -> None:
    assert list(checkpoint.names()) == list(expected)
    for size in (1, 2, 4, 8):
        for name, tensor in expected.items():
            assert checkpoint.shape(name) == tensor.shape
            for rank in range(size):
                span = rank_span(name, args, rank, size)
                read = checkpoint.read(name, *span) if span else checkpoint.read(name)
                part = tensor.narrow(span[0], span[1], span[2] - span[1]) if span else tensor
                assert torch.equal(read.float(), part.float()), (name, size, rank)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_every_rank_of_every_size_reads_what_it_reads_from_a_meta_checkpoint(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    meta = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "meta", dtype=dtype))
    weights = {name: meta.read(name) for name in meta.names()}
    checkpoint = open_checkpoint(gguf.write_gguf(tmp_path / "model.gguf", tiny.ARGS, weights, kind=kind))
    check_every_rank(checkpoint, tiny.ARGS, weights)
    assert {checkpoint.read(name).dtype for name in checkpoint.names() if shard_dim(name) is not None} == {dtype}
    assert checkpoint.read("norm.weight").dtype == torch.float32


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_rank_of_every_size_reads_its_slice_of_the_dequantized_whole(tmp_path: Path, kind: str) -> None:
    path = gguf.write_gguf(tmp_path / "model.gguf", gguf.ARGS, kind=kind)
    whole = gguf.whole(path)
    checkpoint = open_checkpoint(path)
    check_every_rank(checkpoint, gguf.ARGS, {name: whole[gguf_name(name)] for name in tensor_shapes(gguf.ARGS)})
    error = (checkpoint.read("output.weight") - tiny.random_weights(gguf.ARGS)["output.weight"]).abs().mean()
    assert 1e-4 < error < 0.02  # of weights of size 0.15


def test_slices_across_the_other_axis(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(gguf.write_gguf(tmp_path / "model.gguf", gguf.ARGS, kind="Q8_0"))
    for name in checkpoint.names():
        tensor = checkpoint.read(name)
        if tensor.dim() == 2:
            for dim in (0, 1):
                stop = min(65, tensor.shape[dim] - 1)
                assert torch.equal(checkpoint.read(name, dim, 13, stop), tensor.narrow(dim, 13, stop - 13)), name
                assert torch.equal(checkpoint.read(name, dim, 7), tensor.narrow(dim, 7, tensor.shape[dim] - 7)), name
                assert checkpoint.read(name, dim, 9, 9).shape[dim] == 0


def test_a_vector_is_cut_too(path: Path) -> None:
    assert torch.equal(open_checkpoint(path).read("norm.weight", 0, 5, 17), WEIGHTS["norm.weight"][5:17])


def test_a_model_from_gguf_answers_as_from_meta(tmp_path: Path, tiny_folder: Path, path: Path) -> None:
    prompts = ["def f(x):", "the quick"]
    answers = [
        Llama.build(source, max_seq_len=64, dtype="float32", device="cpu").text_completion(
            prompts, temperature=0, max_gen_len=12
        )
        for source in (tiny_folder, path)
    ]
    assert answers[0] == answers[1]


def test_the_architecture_is_that_of_the_weights(path: Path, tiny_folder: Path) -> None:
    ours, metas = open_checkpoint(path).args, open_checkpoint(tiny_folder).args
    assert tensor_shapes(ours) == tensor_shapes(metas)
    assert (ours.norm_eps, ours.rope_theta, ours.n_heads) == (1e-5, 1e4, 8)  # 1e-5, not the float32 next to it


def test_an_output_that_is_the_embedding(tmp_path: Path) -> None:
    path = gguf.write_gguf(tmp_path / "tied.gguf", tensors={"output.weight": None})
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.read("output.weight", 0, 40, 80), WEIGHTS["tok_embeddings.weight"][40:80])
    assert checkpoint.shape("output.weight") == (320, 48)


def test_version_2_is_read_and_others_are_not(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4] = 2
    path.write_bytes(content)
    assert torch.equal(open_checkpoint(path).read("output.weight"), WEIGHTS["output.weight"])
    for version in (b"\1\0\0\0", b"\4\0\0\0", b"\0\0\0\3"):
        content[4:8] = version
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"GGUF version \d+; 2 and 3, little-endian, are read"):
            open_checkpoint(path)


def test_the_file_of_a_folder_is_found_by_its_first_bytes(path: Path, tmp_path: Path) -> None:
    path.rename(tmp_path / "weights.bin")
    (tmp_path / "readme.gguf").write_text("no weights")
    (tmp_path / "empty").touch()
    (tmp_path / "folder.gguf").mkdir()
    assert torch.equal(open_checkpoint(tmp_path).read("norm.weight"), WEIGHTS["norm.weight"])
    shutil.copy(tmp_path / "weights.bin", tmp_path / "another")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files: another; weights\.bin\. Name one"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "another").format_name == "gguf"


def test_a_folder_without_gguf_is_none(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGU")
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "model.gguf", tiny_folder, tmp_path / "absent"):
        assert not GGUFCheckpoint.probe(other)
    with pytest.raises(CheckpointError, match="holds no GGUF file"):
        GGUFCheckpoint(tmp_path)


def test_names_are_the_tensors_of_llama_cpp() -> None:
    assert gguf_name("layers.11.attention.wo.weight") == "blk.11.attn_output.weight"
    assert gguf_name("norm.weight") == "output_norm.weight"
    assert {name.split(".")[-1] for name in NAMES} == SHARD_DIM.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split__count": 3}, r"is one of 3 parts of a split GGUF file: join them"),
        ({"llama__rope__scaling__type": "yarn"}, r"scales its rotary frequencies \('llama\.rope\.scaling\.type' = 'y"),
        ({"llama__rope__scaling__factor": 2.0}, r"scales its rotary frequencies \('llama\.rope\.sc.*factor' = 2\.0"),
        ({"llama__expert_count": 8}, r"llama\.expert_count = 8: mixtures of experts"),
        ({"llama__attention__sliding_window": 8}, r"keys that this package does not know: 'llama\.attention\.sliding"),
        ({"llama__rope__dimension_count": 8}, r"llama\.rope\.dimension_count is 8; 6 was expected, 48 over 8 heads"),
        ({"llama__attention__key_length": 12}, r"llama\.attention\.key_length is 12; 6 was expected"),
        ({"llama__block_count": None}, r"lacks llama\.block_count"),
        ({"llama__block_count": 2**30}, r"llama\.block_count is 1073741824, but the file holds 30 tensors"),
        ({"llama__block_count": 4}, r"lacks blk\.3\.attn_q\.weight; .*; and 6 more; its metadata asks for 39"),
        ({"llama__block_count": 2}, r"holds 'blk\.2\.attn_q\.weight'; .*which its metadata has no place for"),
        ({"llama__embedding_length": 0}, r"llama\.embedding_length is 0; a positive integer below"),
        ({"llama__embedding_length": 2**31}, r"llama\.embedding_length is 2147483648; a positive integer below"),
        ({"llama__embedding_length": 96, "llama__rope__dimension_count": None}, r"token_embd\.weight is .* more"),
        ({"llama__embedding_length": 4.0}, r"llama\.embedding_length is 4\.0; an integer was expected"),
        ({"llama__attention__head_count": [8, 8, 8]}, r"head_count is an array of 3 values; an integer was expected"),
        ({"llama__attention__head_count": 5}, r"dim 48 does not split into 5 heads"),
        ({"llama__attention__head_count_kv": None}, r"blk\.0\.attn_k\.weight is \[12, 48\], expected \[48, 48\]"),
        ({"llama__feed_forward_length": 161}, r"ffn_gate\.weight is \[160, 48\], expected \[161, 48\]"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, r"lacks llama\.attention\.layer_norm_rms_epsilon"),
        ({"llama__attention__layer_norm_rms_epsilon": 0.0}, r"norm_eps is 0\.0"),
        ({"llama__rope__freq_base": None}, r"has no rope_theta, and a wrong one breaks the model silently"),
        ({"llama__rope__freq_base": "much"}, r"llama\.rope\.freq_base is 'much'; a number was expected"),
        ({"llama__vocab_size": 300}, r"token_embd\.weight is \[320, 48\], expected \[300, 48\]"),
        ({"tokenizer__ggml__model": None}, r"holds no vocabulary: pass tokenizer_path"),
        ({"tokenizer__ggml__model": "gpt2"}, r"vocabulary of the kind 'gpt2', not llama \(Sent.*: pass tokenizer_path"),
    ],
)  # fmt: skip
def test_wrong_metadata(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"changed\.gguf.*{message}"):
        open_checkpoint(write(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"llama__vocab_size": None},
        {"llama__rope__dimension_count": None},
        {"llama__context_length": None},
        {"llama__rope__scaling__type": "none"},
        {"llama__expert_count": 0},
        {"llama__attention__value_length": 6},
        {"llama__tensor_data_layout": "Meta AI original pth"},
        {"general__name": "a name that says nothing", "other__key": [1, 2]},
        {"split__count": 1},
    ],
)
def test_metadata_that_changes_nothing(tmp_path: Path, changes: dict[str, Any], path: Path) -> None:
    changed, plain = open_checkpoint(write(tmp_path, **changes)), open_checkpoint(path)
    assert changed.args == plain.args
    assert torch.equal(changed.read("norm.weight"), plain.read("norm.weight"))


def test_head_count_kv_may_be_missing(tmp_path: Path) -> None:
    args = ModelArgs(dim=48, n_layers=2, n_heads=8, vocab_size=320, multiple_of=40, rope_theta=1e4)
    path = gguf.write_gguf(tmp_path / "mha.gguf", args, values={"llama.attention.head_count_kv": None})
    assert open_checkpoint(path).args.kv_heads == 8


def test_rope_theta_from_the_caller(tmp_path: Path, path: Path) -> None:
    lacking = write(tmp_path, llama__rope__freq_base=None)
    assert open_checkpoint(lacking, rope_theta=5e5).args.rope_theta == 5e5
    with pytest.raises(CheckpointError, match=r"rope_theta 500000\.0 was given, but .*model\.gguf says 10000\.0"):
        open_checkpoint(path, rope_theta=5e5)


def test_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has the architecture 'gemma2'; llama or gemma was expected"):
        open_checkpoint(gguf.write_gguf(tmp_path / "gemma2.gguf", name="gemma2"))


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    for tensors, message in (
        ({"blk.1.ffn_up.weight": None}, r"lacks blk\.1\.ffn_up\.weight; its metadata asks for 30 tensors"),
        ({"output_norm.weight": None}, r"lacks output_norm\.weight"),
        ({"blk.1.attn_q.bias": np.ones(48, np.float32)}, r"holds 'blk\.1\.attn_q\.bias', which"),
        ({"blk.1.attn_q.weight": np.ones((48, 40), np.float32)}, r"attn_q\.weight is \[48, 40\], expected \[48, 48\]"),
        ({"output_norm.weight": np.ones((48, 1), np.float32)}, r"output_norm\.weight is \[48, 1\], expected \[48\]"),
    ):
        path = gguf.write_gguf(tmp_path / "model.gguf", tensors=tensors)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_scaled_frequencies_are_refused_and_ones_are_not(tmp_path: Path) -> None:
    name = "rope_freqs.weight"
    path = gguf.write_gguf(tmp_path / "ones.gguf", tensors={name: np.ones(3, np.float32)})
    assert "rope_freqs.weight" not in open_checkpoint(path).names()
    for factors, message in (
        (np.array([1, 1, 8], np.float32), r"scales its rotary frequencies by rope_freqs\.weight"),
        (np.ones(6, np.float32), r"rope_freqs\.weight is \[6\], expected \[3\]"),
    ):
        path = gguf.write_gguf(tmp_path / "scaled.gguf", tensors={name: factors})
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = gguf.write_gguf(tmp_path / "f64.gguf", tensors={"output.weight": np.ones((320, 48))})
    with pytest.raises(CheckpointError, match=r"'output\.weight' is F64, which this package does not read; .* Q6_K"):
        open_checkpoint(path)


def test_truncated_files(path: Path) -> None:
    size = path.stat().st_size
    for length in (size - 4096, size // 2, 5000, 100, 20, 7, 4):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match=r"model\.gguf \(\d+ bytes\) cannot be read as GGUF.*truncated"):
            open_checkpoint(path)


def test_a_file_that_shrinks_later(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"model\.gguf became shorter after it was opened"):
        checkpoint.read("output.weight")  # the last one


def test_without_the_package_blocks_are_refused_and_plain_types_are_not(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = gguf.write_gguf(tmp_path / "blocks.gguf", gguf.ARGS, kind="Q8_0")
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "gguf":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(CheckpointError, match=r'the weights are Q8_0; .*pip install "codellama\[gguf\]"'):
        open_checkpoint(blocks)
    assert torch.equal(open_checkpoint(path).read("output.weight"), WEIGHTS["output.weight"])


def test_a_tokenizer_beside_the_file(tmp_path: Path, path: Path) -> None:
    other = tmp_path / "tokenizer.model"
    other.write_bytes(tiny.tokenizer_bytes(size=312))
    with pytest.raises(CheckpointError, match=r"tokenizer has 312 pieces.*has 320 rows"):
        open_checkpoint(path, other)
    other.write_bytes(tiny.tokenizer_bytes())
    bare = write(tmp_path, tokenizer__ggml__model="gpt2")
    assert open_checkpoint(bare, other).tokenizer().model_bytes == tiny.tokenizer_bytes()


@pytest.mark.parametrize("alignment", [8, 256])
def test_other_alignments(tmp_path: Path, alignment: int) -> None:
    checkpoint = open_checkpoint(write(tmp_path, general__alignment=alignment))
    assert all(torch.equal(checkpoint.read(name), WEIGHTS[name]) for name in WEIGHTS)
