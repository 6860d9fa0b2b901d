"""Conversion: equal bits whatever the way, a file like PyTorch's own, and nothing left where it fails."""

import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from codellama.checkpoint import open_checkpoint
from codellama.checkpoint.convert import convert
from codellama.checkpoint.meta_writer import write_meta
from codellama.config import ModelArgs
from codellama.errors import CheckpointError, ParallelSizeError
from tests.support import tiny

ARGS = ModelArgs(
    dim=48, n_layers=3, n_heads=8, n_kv_heads=4, vocab_size=320, multiple_of=40, rope_theta=5e5, norm_eps=1e-6
)  # hidden_dim 160
WEIGHTS = tiny.random_weights(ARGS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.tiny_checkpoint(tmp_path / "source", args=ARGS)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("piece_bytes", [1, 3000, 2**25])
def test_there_and_back_in_pieces_of_any_size(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    """One file, two, four, Hugging Face, and one again: the bytes are those of the beginning."""
    monkeypatch.setattr("codellama.checkpoint.convert.PIECE_BYTES", piece_bytes)
    monkeypatch.setattr("codellama.checkpoint.meta_writer.PIECE_BYTES", 2 * piece_bytes)
    at = source
    for number, size in enumerate((2, 4, 1)):
        convert(at, tmp_path / f"{number}", format="meta", model_parallel_size=size)
        at = tmp_path / f"{number}"
        assert len(list(at.glob("*.pth"))) == size
        assert_equal(weights_of(at), WEIGHTS)
    assert bytes_of(at) == bytes_of(source)
    convert(tmp_path / "1", tmp_path / "hf", format="huggingface")
    assert_equal(weights_of(tmp_path / "hf"), WEIGHTS)
    convert(tmp_path / "hf", tmp_path / "back", format="meta")
    written = open_checkpoint(tmp_path / "back")
    assert (written.args.hidden_dim, written.args.rope_theta, written.args.norm_eps) == (160, 5e5, 1e-6)
    for name in ("consolidated.00.pth", "tokenizer.model"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_each_file_holds_its_slices(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "two", format="meta", model_parallel_size=2)
    second = torch.load(tmp_path / "two" / "consolidated.01.pth", weights_only=True)
    assert torch.equal(second["tok_embeddings.weight"], WEIGHTS["tok_embeddings.weight"][:, 24:])
    assert torch.equal(second["layers.2.attention.wk.weight"], WEIGHTS["layers.2.attention.wk.weight"][12:])
    assert torch.equal(second["layers.1.feed_forward.w2.weight"], WEIGHTS["layers.1.feed_forward.w2.weight"][:, 80:])
    assert torch.equal(second["norm.weight"], WEIGHTS["norm.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_file_reads_as_one_of_torch_save(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = tiny.random_weights(ARGS, dtype=dtype)
    tensors = ((name, [tensor]) for name, tensor in weights.items())
    write_meta(tmp_path / "written", ARGS, tensors, 1, tiny.tokenizer_bytes())
    path = tmp_path / "written" / "consolidated.00.pth"
    mapped = torch.load(path, mmap=True, weights_only=True)
    for state in (mapped, torch.load(path, weights_only=True), torch.load(path, weights_only=False)):
        assert_equal(state, weights)
    assert {tensor.data_ptr() % 64 for tensor in mapped.values()} == {0}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    torch.save(mapped, tmp_path / "again.pth")
    assert_equal(torch.load(tmp_path / "again.pth", weights_only=True), weights)


def test_dtypes(source: Path, tmp_path: Path) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    convert(source, tmp_path / "meta", format="meta", model_parallel_size=2, dtype="bfloat16")
    assert_equal(weights_of(tmp_path / "meta"), halves)
    convert(source, tmp_path / "hf", format="huggingface", dtype=torch.bfloat16)
    assert_equal(weights_of(tmp_path / "hf"), halves)
    convert(tmp_path / "meta", tmp_path / "wide", format="meta", dtype="float32")
    assert_equal(weights_of(tmp_path / "wide"), {name: tensor.float() for name, tensor in halves.items()})


def test_mixed_dtypes_are_kept_or_widened(tmp_path: Path) -> None:
    weights = {name: tensor.half() if tensor.dim() == 2 else tensor for name, tensor in WEIGHTS.items()}
    tensors = ((name, [tensor]) for name, tensor in weights.items())
    write_meta(tmp_path / "mixed", ARGS, tensors, 1, tiny.tokenizer_bytes())
    convert(tmp_path / "mixed", tmp_path / "meta", format="meta", model_parallel_size=2)
    assert_equal(weights_of(tmp_path / "meta"), weights)
    convert(tmp_path / "mixed", tmp_path / "hf", format="huggingface")
    assert_equal(weights_of(tmp_path / "hf"), {name: tensor.float() for name, tensor in weights.items()})


@pytest.mark.parametrize("format", ["meta", "huggingface"])
def test_a_number_too_large_for_the_dtype(tmp_path: Path, format: str) -> None:
    weights = dict(WEIGHTS)
    weights["layers.1.attention.wq.weight"] = weights["layers.1.attention.wq.weight"].clone()
    weights["layers.1.attention.wq.weight"][7, 3] = -70000.0
    write_meta(
        tmp_path / "large", ARGS, ((name, [tensor]) for name, tensor in weights.items()), 1, tiny.tokenizer_bytes()
    )
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.wq\.weight holds 70000, too large for .*float16"):
        convert(tmp_path / "large", tmp_path / "target", format=format, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


@pytest.mark.parametrize("failure", [RuntimeError("in the middle"), KeyboardInterrupt()])
@pytest.mark.parametrize("format", ["meta", "huggingface"])
def test_nothing_is_left_of_an_interrupted_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, format: str
) -> None:
    read = type(open_checkpoint(source)).read
    seen = []

    def fail_late(self: object, name: str, *span: int) -> torch.Tensor:
        if name == "layers.2.attention.wo.weight" and span[-1] > 1:
            seen.extend(path.name for path in tmp_path.iterdir())
            raise failure
        return read(self, name, *span)  # type: ignore[arg-type]

    monkeypatch.setattr("codellama.checkpoint.meta.MetaCheckpoint.read", fail_late)
    with pytest.raises(type(failure)):
        convert(source, tmp_path / "target", format=format)
    assert "target" not in seen, "it has another name until it is whole"
    assert len(seen) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 100,000 bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("format", ["meta", "huggingface"])
@pytest.mark.usefixtures("source", "small_files")
def test_a_disk_that_fills_up(tmp_path: Path, format: str) -> None:
    with pytest.raises(CheckpointError, match=r"target could not be written .* needs .* MB in"):
        convert(tmp_path / "source", tmp_path / "target", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_too_little_room_is_found_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    monkeypatch.setattr("pathlib.Path.mkdir", None)
    with pytest.raises(CheckpointError, match=r"target needs 1\.\d+ MB, but 1 MB are free"):
        convert(source, tmp_path / "target", format="meta")


def test_what_is_refused(source: Path, tmp_path: Path) -> None:
    before = bytes_of(source)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link"):
        with pytest.raises(CheckpointError, match=f"{name} exists already, and nothing is overwritten"):
            convert(source, tmp_path / name, format="meta")
    for target in (source / "inner", source, tmp_path / "there" / ".." / "source" / "inner"):
        with pytest.raises(CheckpointError, match="which is only read"):
            convert(source, target, format="meta")
    with pytest.raises(CheckpointError, match="there is no folder"):
        convert(source, tmp_path / "nowhere" / "target", format="meta")
    with pytest.raises(ValueError, match="format is 'pth'; one of meta, huggingface, quantized was expected"):
        convert(source, tmp_path / "target", format="pth")
    with pytest.raises(ValueError, match="dtype is 'int8'; one of bfloat16"):
        convert(source, tmp_path / "target", format="meta", dtype="int8")
    with pytest.raises(ValueError, match="only Meta's layout has a file for each rank"):
        convert(source, tmp_path / "target", format="huggingface", model_parallel_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "source", "there"]
    assert bytes_of(source) == before


@pytest.mark.parametrize(
    ("size", "message"), [(8, "n_kv_heads 4"), (3, "n_heads 8, n_kv_heads 4, hidden_dim 160"), (0, "1 to 100")]
)
def test_a_number_of_files_that_does_not_divide(source: Path, tmp_path: Path, size: int, message: str) -> None:
    with pytest.raises(ParallelSizeError, match=message):
        convert(source, tmp_path / "target", format="meta", model_parallel_size=size)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


PEAK = """
import resource, sys
from codellama.checkpoint.convert import convert
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))
before = peak()
convert(sys.argv[1], sys.argv[2], format=sys.argv[3], model_parallel_size=int(sys.argv[4]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("format", "size", "limit"), [("meta", 2, 250), ("huggingface", 1, 420)])
def test_memory_stays_small(tmp_path: Path, format: str, size: int, limit: int) -> None:
    """A checkpoint of 600 MB whose largest tensors have 84; Hugging Face's writer holds one of them, and copies."""
    args = ModelArgs(dim=2048, n_layers=3, n_heads=16, vocab_size=320, multiple_of=20480, rope_theta=1e4)
    shapes = tiny.tensor_shapes(args)
    zeros = ((name, [torch.zeros(1, dtype=torch.bfloat16).expand(shape)]) for name, shape in shapes.items())
    write_meta(tmp_path / "source", args, zeros, 1, tiny.tokenizer_bytes())
    assert (tmp_path / "source" / "consolidated.00.pth").stat().st_size > 600e6
    command = [sys.executable, "-c", PEAK, str(tmp_path / "source"), str(tmp_path / "target"), format, str(size)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1"})
    assert int(run.stdout) < limit
