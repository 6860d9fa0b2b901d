"""Hugging Face checkpoints: the same bits as Meta's, the same model as transformers'."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from codellama.checkpoint import Checkpoint, load_model, open_checkpoint, write_huggingface
from codellama.checkpoint.huggingface import INDEX, WEIGHTS, HuggingFaceCheckpoint, huggingface_name
from codellama.checkpoint.layout import rank_span, tensor_shapes
from codellama.checkpoint.safetensors_header import header_bytes, place_tensors
from codellama.config import ModelArgs
from codellama.parallel import Parallel
from tests.support import tiny
from tests.support.peers import to_transformers, transformers_model

ARGS = tiny.ARGS
WEIGHTS_OF = {dtype: tiny.random_weights(ARGS, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
IDS = torch.randint(ARGS.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.tiny_huggingface(tmp_path / "ckpt")


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    model = load_model(checkpoint, Parallel(), torch.device("cpu"), torch.float32)
    return model.logits(model(IDS, torch.arange(IDS.shape[1])[None]))


def their_logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", WEIGHTS_OF)
@pytest.mark.parametrize("max_file_bytes", [5e9, 70_000])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype, max_file_bytes: float) -> None:
    checkpoint = open_checkpoint(tiny.tiny_huggingface(tmp_path, dtype=dtype, max_file_bytes=max_file_bytes))
    assert checkpoint.format_name == "huggingface"
    assert checkpoint.args == replace(ARGS, multiple_of=ARGS.hidden_dim)  # the width is stored, not how it came about
    assert {name: checkpoint.shape(name) for name in checkpoint.names()} == tensor_shapes(ARGS)
    for name, tensor in WEIGHTS_OF[dtype].items():
        read = checkpoint.read(name)
        assert read.dtype == dtype
        assert torch.equal(read, tensor), name


@pytest.mark.parametrize("dtype", WEIGHTS_OF)
def test_every_rank_of_every_size_reads_what_it_reads_from_metas_files(tmp_path: Path, dtype: torch.dtype) -> None:
    ours = open_checkpoint(tiny.tiny_huggingface(tmp_path / "hf", dtype=dtype, max_file_bytes=70_000))
    metas = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "meta", n_shards=2, dtype=dtype))
    assert list(ours.names()) == list(metas.names())
    for size in (1, 2, 4, 8):
        for name in ours.names():
            for rank in range(size):
                span = rank_span(name, ARGS, rank, size) or (None, 0, None)
                assert torch.equal(ours.read(name, *span), metas.read(name, *span)), (name, size, rank)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("span", [(0, 6), (6, 12), (1, 2), (3, 11), (5, 7), (7, None), (0, 12), (4, 4)])
def test_slices_need_not_begin_or_end_at_a_head(folder: Path, dim: int, span: tuple[int, int | None]) -> None:
    checkpoint = open_checkpoint(folder)
    start, stop = span
    for name, tensor in WEIGHTS_OF[torch.float32].items():
        if tensor.dim() > dim:
            expected = tensor[start:stop] if dim == 0 else tensor[:, start:stop]
            assert torch.equal(checkpoint.read(name, dim, start, stop), expected), name


def test_what_is_read_is_a_copy_that_holds_nothing_else(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    parts = {name: checkpoint.read(name, 0, 2, 5) for name in checkpoint.names()}
    assert {part.untyped_storage().nbytes() - part.nbytes for part in parts.values()} == {0}
    (folder / WEIGHTS).write_bytes(bytes((folder / WEIGHTS).stat().st_size))
    assert all(torch.equal(part, WEIGHTS_OF[torch.float32][name][2:5]) for name, part in parts.items())


def test_a_slice_of_a_large_file_costs_no_more_than_itself(tmp_path: Path) -> None:
    """The file has 3 GB of zeros that take no room on the disk."""
    args = ModelArgs(dim=48, n_layers=1, n_heads=8, vocab_size=320, multiple_of=5_000_000, rope_theta=1e4)
    tiny.tiny_huggingface(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"intermediate_size": args.hidden_dim, "num_hidden_layers": 1, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {huggingface_name(name): shape for name, shape in tensor_shapes(args).items()}
    entries = place_tensors((name, shape, torch.float32) for name, shape in shapes.items())
    with (tmp_path / WEIGHTS).open("wb") as file:
        begin = file.write(header_bytes(entries))
        file.truncate(begin + max(entry.end for entry in entries.values()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    assert checkpoint.read("layers.0.feed_forward.w1.weight", 0, 4_000_000, 4_001_000).shape == (1000, 48)
    assert checkpoint.read("layers.0.feed_forward.w2.weight", 0, 40, 41).shape == (1, 5_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 150_000  # KB


@pytest.mark.parametrize("shard_bytes", ["50GB", "100KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_is_read(tmp_path: Path, shard_bytes: str, tied: bool) -> None:
    weights = dict(WEIGHTS_OF[torch.float32])
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    theirs = transformers_model(ARGS, weights, tied)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_bytes)
    assert (tmp_path / INDEX).is_file() == (shard_bytes == "100KB")
    tiny.tiny_tokenizer(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in weights.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    torch.testing.assert_close(logits(checkpoint), their_logits(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", WEIGHTS_OF)
@pytest.mark.parametrize("max_file_bytes", [5e9, 70_000])
def test_transformers_reads_what_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], dtype: torch.dtype, max_file_bytes: float
) -> None:
    tiny.tiny_huggingface(tmp_path, dtype=dtype, max_file_bytes=max_file_bytes)
    theirs, loading = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {key for key, found in loading.items() if found} == set()
    assert "arning" not in capfd.readouterr().err
    assert theirs.dtype == dtype
    assert theirs.config.rope_parameters == {"rope_theta": ARGS.rope_theta, "rope_type": "default"}
    state = theirs.state_dict()
    for name, tensor in to_transformers(ARGS, WEIGHTS_OF[dtype]).items():
        assert torch.equal(state[name], tensor), name
    ours = logits(open_checkpoint(tmp_path))
    torch.testing.assert_close(ours, their_logits(theirs.float()), atol=1e-4, rtol=0)


def test_files_are_filled_up_to_the_limit(tmp_path: Path) -> None:
    tiny.tiny_huggingface(tmp_path, max_file_bytes=70_000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in WEIGHTS_OF[torch.float32].values())
    sizes = [(tmp_path / file).stat().st_size for file in files]
    assert max(sizes) < 70_000 + 2000
    assert len(files) < 2 * sum(sizes) / 70_000


def test_tensors_may_come_in_any_order_and_leave_memory_as_they_go(tmp_path: Path) -> None:
    """A generator of 1.2 GB, made as it goes: the peak grows by a few tensors of 60 MB."""
    args = ModelArgs(dim=1920, n_layers=5, n_heads=8, vocab_size=320, multiple_of=7936, rope_theta=1e4)
    shapes = dict(reversed(tensor_shapes(args).items()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensors = ((name, torch.full(shape, float(rank))) for rank, (name, shape) in enumerate(shapes.items()))
    write_huggingface(tmp_path, args, tensors, tiny.tokenizer_bytes(), torch.bfloat16, 4e8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000  # KB
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 5e8
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    for rank, name in enumerate(shapes):
        assert checkpoint.read(name, 0, 3, 4).unique().tolist() == [rank]


def test_other_dtypes_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is torch\.float64; torch\.bfloat16, "):
        tiny.tiny_huggingface(tmp_path / "none", dtype=torch.float64)
    assert list(tmp_path.iterdir()) == []


def test_files_may_be_links_to_a_cache(tmp_path: Path) -> None:
    """As in the folders of snapshots that the Hugging Face Hub's client makes."""
    tiny.tiny_huggingface(tmp_path / "blobs", max_file_bytes=70_000)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(Path("..") / "blobs" / path.name)
    checkpoint = open_checkpoint(tmp_path / "snapshot")
    assert torch.equal(checkpoint.read("norm.weight"), WEIGHTS_OF[torch.float32]["norm.weight"])


def test_unused_frequencies_of_old_files_are_ignored(tmp_path: Path) -> None:
    theirs = transformers_model(ARGS, WEIGHTS_OF[torch.float32])
    frequencies = {"model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    theirs.save_pretrained(tmp_path, state_dict=theirs.state_dict() | frequencies)
    tiny.tiny_tokenizer(tmp_path)
    assert torch.equal(open_checkpoint(tmp_path).read("norm.weight"), WEIGHTS_OF[torch.float32]["norm.weight"])


def test_tied_in_the_description_but_not_in_the_files(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(open_checkpoint(folder).read("output.weight"), WEIGHTS_OF[torch.float32]["output.weight"])
