"""Meta checkpoints: any slice of any sharding, and each way in which a folder can be wrong."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from codellama.checkpoint import open_checkpoint
from codellama.checkpoint.layout import rank_span, shard_dim, tensor_shapes
from codellama.errors import CheckpointError
from tests.support import tiny

WEIGHTS = tiny.random_weights(tiny.ARGS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.tiny_checkpoint(tmp_path / "ckpt", n_shards=2)


def rewrite(folder: Path, index: int, **changes: torch.Tensor | None) -> None:
    """Change tensors of one shard; None removes."""
    path = folder / f"consolidated.{index:02d}.pth"
    state = torch.load(path, weights_only=True)
    for name, tensor in changes.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    torch.save(state, path)


def rewrite_params(folder: Path, **changes: object) -> None:
    path = folder / "params.json"
    params = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in params.items() if value is not None}))


@pytest.mark.parametrize("n_shards", [1, 2, 4])
def test_every_rank_of_every_size_reads_its_slice(tmp_path: Path, n_shards: int) -> None:
    if n_shards > tiny.ARGS.kv_heads:
        args = tiny.ModelArgs(dim=48, n_layers=2, n_heads=8, vocab_size=320, multiple_of=40, rope_theta=1e4)
    else:
        args = tiny.ARGS
    weights = tiny.random_weights(args)
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path, n_shards, args))
    for size in (1, 2, 4, 8):
        for name, tensor in weights.items():
            for rank in range(size):
                span = rank_span(name, args, rank, size)
                read = checkpoint.read(name, *span) if span else checkpoint.read(name)
                expected = tensor.narrow(span[0], span[1], span[2] - span[1]) if span else tensor
                assert torch.equal(read, expected), (name, size, rank)


def test_slices_across_the_other_axis(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name, tensor in WEIGHTS.items():
        if tensor.dim() == 2:
            other = 1 - (shard_dim(name) or 0)
            assert torch.equal(checkpoint.read(name, other, 5, 29), tensor.narrow(other, 5, 24)), name
            assert torch.equal(checkpoint.read(name, 0, 7), tensor[7:]), name


def test_replicated_kv_heads_are_whole_heads() -> None:
    size, head_dim = 8, tiny.ARGS.head_dim
    spans = [rank_span("layers.0.attention.wk.weight", tiny.ARGS, rank, size) for rank in range(size)]
    assert spans == [(0, head * head_dim, (head + 1) * head_dim) for head in (0, 0, 0, 0, 1, 1, 1, 1)]


def test_what_is_read_is_a_copy_and_a_file_that_shrinks_is_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    read = {name: checkpoint.read(name) for name in checkpoint.names()}
    for path in folder.glob("*.pth"):
        os.truncate(path, 0)
    assert all(torch.equal(read[name], WEIGHTS[name]) for name in WEIGHTS)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth has become shorter"):
        checkpoint.read("output.weight", 1, 3, 7)


def test_tensors_that_share_storages_or_lie_crosswise(folder: Path) -> None:
    """`torch.save` keeps views as they are."""
    q, o = "layers.0.attention.wq.weight", "layers.1.attention.wo.weight"
    both = torch.cat([WEIGHTS["norm.weight"], WEIGHTS[q][24:].flatten()])
    crosswise = torch.nn.Parameter(WEIGHTS[o][:, 24:].t().contiguous().t())
    rewrite(folder, 1, **{"norm.weight": both[:48], q: both[48:].view(24, 48), o: crosswise})
    checkpoint = open_checkpoint(folder)
    for name in (q, o, "norm.weight"):
        assert torch.equal(checkpoint.read(name), WEIGHTS[name])
    assert torch.equal(checkpoint.read(o, 1, 30, 41), WEIGHTS[o][:, 30:41])


def test_files_that_differ_in_dtype(folder: Path) -> None:
    rewrite(folder, 1, **{"norm.weight": WEIGHTS["norm.weight"].half()})
    with pytest.raises(CheckpointError, match=r"01\.pth holds norm\.weight as torch\.float16; consolidated\.00"):
        open_checkpoint(folder)


def test_stray_files_and_rope_freqs_are_ignored(folder: Path) -> None:
    (folder / "optimizer.pth").write_bytes(b"something else")
    for index in range(2):
        rewrite(folder, index, **{"rope.freqs": torch.ones(3)})
    assert torch.equal(open_checkpoint(folder).read("norm.weight"), WEIGHTS["norm.weight"])


def test_vocab_size_from_the_tokenizer_and_rope_theta_from_the_caller(folder: Path) -> None:
    rewrite_params(folder, vocab_size=-1, rope_theta=None)
    with pytest.raises(CheckpointError, match=r"no rope_theta.*rope_theta=1000000\.0"):
        open_checkpoint(folder)
    args = open_checkpoint(folder, rope_theta=5e5).args
    assert (args.vocab_size, args.rope_theta) == (320, 5e5)


def test_missing_folder_and_file_for_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path.name} holds no weights in a format .*Meta's layout"):
            open_checkpoint(path)


def test_no_shard_a_gap_between_shards_no_params_no_tokenizer(folder: Path) -> None:
    (folder / "consolidated.00.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"lacks consolidated\.00\.pth"):
        open_checkpoint(folder)
    (folder / "consolidated.02.pth").rename(folder / "consolidated.00.pth")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer at .*tokenizer\.model"):
        open_checkpoint(folder)
    for path in folder.glob("*.pth"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"holds no consolidated\.00\.pth"):
        open_checkpoint(folder)


def test_the_last_shard_is_missing(folder: Path) -> None:
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match="belong to a checkpoint of 2 files: are some missing here"):
        open_checkpoint(folder)


@pytest.mark.parametrize("tensor", [torch.ones(48, 24, dtype=torch.int8), torch.ones(48, 24).to_sparse()])
def test_tensors_that_are_no_dense_floats(folder: Path, tensor: torch.Tensor) -> None:
    rewrite(folder, 1, **{"layers.1.attention.wo.weight": tensor})
    with pytest.raises(CheckpointError, match=r"holds 'layers\.1\.attention\.wo\.weight' as .*; a dense tensor"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>Log in</html>", "HTML page, not weights"),
        (b"\n  <html>", "HTML page, not weights"),
        (b"\x80\x02legacy pickle", "not a PyTorch zip file"),
        (b"", "not a PyTorch zip file"),
        (b"PK\x03\x04" + b"\0" * 2000, "probably truncated"),
    ],
)
def test_wrong_content(folder: Path, content: bytes, message: str) -> None:
    (folder / "consolidated.01.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"consolidated\.01\.pth.*{message}"):
        open_checkpoint(folder)


def test_truncated_file(folder: Path) -> None:
    path = folder / "consolidated.00.pth"
    os.truncate(path, path.stat().st_size * 2 // 3)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth.*truncated"):
        open_checkpoint(folder)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["PAYLOAD"],)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "executed"))
    torch.save({"norm.weight": Payload()}, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="more than tensors") as caught:
        open_checkpoint(folder)
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert not (tmp_path / "executed").exists()


def test_not_a_dict_of_tensors(folder: Path) -> None:
    torch.save([torch.ones(2)], folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="not a dict of tensors with names"):
        open_checkpoint(folder)


def test_missing_extra_and_misshapen_tensors_are_named(folder: Path) -> None:
    rewrite(folder, 1, **{"layers.1.attention.wo.weight": None})
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth lacks layers\.1\.attention\.wo\.weight"):
        open_checkpoint(folder)
    rewrite(folder, 1, **{"layers.1.attention.wo.weight": torch.ones(48, 23), "extra.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"holds 'extra\.weight'"):
        open_checkpoint(folder)
    rewrite(folder, 1, **{"extra.weight": None})
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.wo\.weight is \[48, 23\], expected \[48, 24\]"):
        open_checkpoint(folder)


def test_many_faults_are_counted_not_listed(folder: Path) -> None:
    rewrite_params(folder, dim=96)
    with pytest.raises(CheckpointError, match=r"and \d+ more") as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 800


def test_another_tokenizer_than_the_embedding(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(tiny.tokenizer_bytes(size=312))
    with pytest.raises(CheckpointError, match=r"tokenizer has 312 pieces.*has 320 rows"):
        open_checkpoint(folder, other)
    rewrite_params(folder, vocab_size=-1)
    with pytest.raises(CheckpointError, match=r"312 pieces.*is this the tokenizer\.model"):
        open_checkpoint(folder, other)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[1]", "a JSON object was expected"), ('{"dim": 48, "depth": 2}', "depth")],
)
def test_bad_params(folder: Path, content: str, message: str) -> None:
    (folder / "params.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_no_params(folder: Path) -> None:
    (folder / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks params\.json"):
        open_checkpoint(folder)


def test_checklist_is_right(folder: Path) -> None:
    md5sum = shutil.which("md5sum")
    assert md5sum is not None, "coreutils"
    assert os.system(f"cd {folder} && {md5sum} --check --status checklist.chk") == 0


def test_shapes_are_those_of_the_model() -> None:
    model = tiny.whole_model(tiny.ARGS, WEIGHTS)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == tensor_shapes(tiny.ARGS)
