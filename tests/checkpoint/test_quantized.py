"""Folders of codes: they load as the source with quantize= does, on any number of ranks, and become numbers again."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.load import run_processes, write_random
from codellama import Llama
from codellama.checkpoint import load_model, open_checkpoint
from codellama.checkpoint.convert import convert
from codellama.checkpoint.info import info
from codellama.checkpoint.layout import is_matrix
from codellama.checkpoint.meta_writer import write_meta
from codellama.checkpoint.quantized import WEIGHTS, QuantizedCheckpoint
from codellama.checkpoint.verify import verify
from codellama.config import ModelArgs, RuntimeArgs
from codellama.errors import CheckpointError, QuantizationError
from codellama.layers import Held
from codellama.memory import plan_budget
from codellama.model import Transformer
from codellama.parallel import Parallel
from codellama.quantization import Quantization
from tests.fuzz_headers import fuzz
from tests.support import tiny
from tests.support.gguf import write_gguf

CPU = torch.device("cpu")
ARGS = ModelArgs(
    dim=128, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=tiny.VOCAB, multiple_of=96, rope_theta=1e4
)  # hidden_dim 384
WIDE = ModelArgs(dim=512, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=tiny.VOCAB, multiple_of=512, rope_theta=1e4)
KINDS = ["int8", "int4", "int4-g64", "int4-g128"]


def held(model: Transformer) -> dict[str, list[torch.Tensor]]:
    """What a rank multiplies by, as numbers, and its parameters."""
    found = {name: layer.dense() for name, layer in model.named_modules() if isinstance(layer, Held)}
    return {**found, **dict(model.named_parameters())}  # type: ignore[dict-item]


def assert_same(one: Transformer, other: Transformer) -> None:
    found, expected = held(one), held(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name  # type: ignore[arg-type]


def make_source(folder: Path, format: str, args: ModelArgs) -> Path:
    if format == "meta":
        return tiny.tiny_checkpoint(folder, 2, args, dtype=torch.bfloat16)
    if format == "huggingface":
        return tiny.tiny_huggingface(folder, args, dtype=torch.bfloat16)
    return write_gguf(folder, args=args, weights=tiny.random_weights(args, dtype=torch.float16), kind="Q8_0")


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("format", ["meta", "huggingface", "gguf"])
@pytest.mark.parametrize("piece_bytes", [1, 2**25])
def test_it_loads_as_the_source_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, name: str, piece_bytes: int
) -> None:
    monkeypatch.setattr("codellama.checkpoint.convert.PIECE_BYTES", piece_bytes)
    source = make_source(tmp_path / "source", format, ARGS)
    convert(source, tmp_path / "codes", quantize=name)
    original, stored = open_checkpoint(source), open_checkpoint(tmp_path / "codes")
    assert (stored.format_name, stored.args.dim, stored.args.rope_theta) == ("quantized", 128, 1e4)
    assert original.quantization is None
    for size in (1, 2, 4):
        for rank in range(size):
            parallel = Parallel(rank, size)
            expected = load_model(original, parallel, CPU, torch.float32, quantization=Quantization.parse(name))
            assert_same(load_model(stored, parallel, CPU, torch.float32), expected)


@pytest.mark.parametrize("name", KINDS)
def test_numbers_of_any_part_are_those_of_the_codes(tmp_path: Path, name: str) -> None:
    convert(tiny.tiny_checkpoint(tmp_path / "source", 1, WIDE), tmp_path / "codes", quantize=name)
    stored = open_checkpoint(tmp_path / "codes")
    model = load_model(stored, Parallel(), CPU, torch.float32)
    weights = tiny.random_weights(WIDE)
    for key, tensor in weights.items():
        if not is_matrix(key):
            assert torch.equal(stored.read(key), tensor), key
            continue
        layer = model.get_submodule(key.removesuffix(".weight"))
        assert isinstance(layer, Held)
        assert torch.equal(stored.read(key), layer.dense()), key
        assert 0.002 < (layer.dense() - tensor).norm() / tensor.norm() < 0.13
        assert torch.equal(stored.read(key, 0, 5, 9), layer.dense()[5:9])
        assert torch.equal(stored.read(key, 1, 31, 97), layer.dense()[:, 31:97])
    assert torch.equal(stored.read("tok_embeddings.weight", 1, 3, 9), weights["tok_embeddings.weight"][:, 3:9])


def test_back_to_plain_numbers(tmp_path: Path) -> None:
    convert(tiny.tiny_checkpoint(tmp_path / "source", 1, ARGS), tmp_path / "codes", quantize="int4", dtype="bfloat16")
    stored = open_checkpoint(tmp_path / "codes")
    assert stored.read("norm.weight").dtype == torch.bfloat16
    convert(tmp_path / "codes", tmp_path / "meta", model_parallel_size=2)
    convert(tmp_path / "codes", tmp_path / "hf", format="huggingface", dtype="float16")
    for name in stored.names():
        assert torch.equal(open_checkpoint(tmp_path / "meta").read(name), stored.read(name)), name
        assert torch.equal(open_checkpoint(tmp_path / "hf").read(name), stored.read(name).half()), name


def test_commands_take_it(tmp_path: Path) -> None:
    convert(tiny.tiny_checkpoint(tmp_path / "source", 1, ARGS), tmp_path / "codes", quantize="int4", dtype="bfloat16")
    report = verify(tmp_path / "codes", full=True)
    assert report.ok
    assert [row.found for row in report.rows if row.check == "matrices"] == [
        "codes of int4; their numbers are looked at"
    ]
    assert {row.subject for row in report.rows if row.check == "md5"} == {WEIGHTS, "tokenizer.model"}
    found = info(tmp_path / "codes", 64, 3, "float32")
    assert (found.format, found.dtypes, found.quantization) == (
        "quantized",
        ("bfloat16", "int4"),
        Quantization("int4", 32),
    )
    runtime = RuntimeArgs(max_seq_len=64, max_batch_size=3)
    assert found.budgets[2] == plan_budget(ARGS, runtime, 2, 4, 4, found.quantization)
    assert "int4, the rest float32, 3 rows" in found.describe()
    assert info(tmp_path / "source", 64, 3, "float32", quantize="int4").budgets == found.budgets


def test_a_generator_is_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny.tiny_checkpoint(tmp_path / "source", 1, ARGS)
    convert(source, tmp_path / "codes", quantize="int8")
    caplog.set_level("INFO")
    prompts = [[1, 5, 9, 30], [1, 7]]
    with Llama.build(source, max_seq_len=64, dtype="float32", device="cpu", quantize="int8") as llama:
        expected = llama.generate(prompts, 12, temperature=0)
    lines = [record.message for record in caplog.records if "memory per rank" in record.message]
    for quantize in (None, "int8"):
        with Llama.build(tmp_path / "codes", max_seq_len=64, dtype="float32", device="cpu", quantize=quantize) as llama:
            assert llama.generate(prompts, 12, temperature=0) == expected
    again = [record.message for record in caplog.records if "memory per rank" in record.message][1:]
    assert {line.split(" = ")[0] for line in again} == {lines[0].split(" = ")[0]}
    assert lines[0].startswith("int8, ")


def test_what_is_refused(tmp_path: Path) -> None:
    source = tiny.tiny_checkpoint(tmp_path / "source", 1, ARGS)
    convert(source, tmp_path / "codes", quantize="int8")
    with pytest.raises(QuantizationError, match=r"quantize is 'int4', but these weights are stored as int8: leave"):
        Llama.build(tmp_path / "codes", quantize="int4", device="cpu")
    with pytest.raises(QuantizationError, match="codes is quantized already, as int8"):
        convert(tmp_path / "codes", tmp_path / "target", quantize="int8")
    with pytest.raises(QuantizationError, match="quantize is 'int3'"):
        convert(source, tmp_path / "target", quantize="int3")
    for arguments in (
        {"format": "huggingface", "quantize": "int8"},
        {"format": "meta", "quantize": "int8"},
        {"format": "quantized"},
    ):
        with pytest.raises(ValueError, match="codes are a format of their own: pass quantize alone"):
            convert(source, tmp_path / "target", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only Meta's layout has a file for each rank"):
        convert(source, tmp_path / "target", quantize="int8", model_parallel_size=2)
    convert(source, tmp_path / "g128", quantize="int4-g128")
    with pytest.raises(QuantizationError, match=r"groups of 128 do not divide wo \(64 inputs\), w2 \(192 inputs\)"):
        load_model(open_checkpoint(tmp_path / "g128"), Parallel(0, 2), CPU, torch.float32)
    assert info(tmp_path / "g128").budgets.keys() == {1}
    odd = tiny.tiny_checkpoint(tmp_path / "odd")
    with pytest.raises(QuantizationError, match="groups of 32 do not divide"):
        convert(odd, tmp_path / "target", quantize="int4")
    weights = tiny.random_weights(ARGS)
    weights["layers.1.feed_forward.w2.weight"][3, 4] = float("nan")
    write_meta(tmp_path / "nan", ARGS, ((k, [w]) for k, w in weights.items()), 1, tiny.tokenizer_bytes())
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.w2\.weight holds NaN or infinity"):
        convert(tmp_path / "nan", tmp_path / "target", quantize="int4")
    assert not list(tmp_path.glob("target*"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the table of the header; the data stay."""
    path = folder / WEIGHTS
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end])
    change(table)
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def rename(table: dict[str, Any], old: str, new: str) -> None:
    table[new] = table.pop(old)


def set_metadata(table: dict[str, Any], **values: str | None) -> None:
    metadata = {**table["__metadata__"], **values}
    table["__metadata__"] = {key: value for key, value in metadata.items() if value is not None}


def set_params(table: dict[str, Any], **values: object) -> None:
    set_metadata(table, params=json.dumps(json.loads(table["__metadata__"]["params"]) | values))


WQ = "layers.0.attention.wq.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: set_metadata(table, format="pt"), "has the format 'pt'; 'codellama.quantized' was expected"),
        (lambda table: table.pop("__metadata__"), "has the format None"),
        (lambda table: set_metadata(table, version="2"), "has the version '2' of its format; '1' can be read"),
        (lambda table: set_metadata(table, more=""), "were expected"),
        (lambda table: set_metadata(table, params=None), "were expected"),
        (lambda table: set_metadata(table, quantize="int3"), "cannot be read: its .*quantize is 'int3'"),
        (lambda table: set_metadata(table, params="{"), "the params of .* is not JSON"),
        (lambda table: set_metadata(table, params="\ud800"), "the params of .* is not JSON"),
        (lambda table: set_params(table, more=1), "as params.json does, but .*does not know: more"),
        (lambda table: set_params(table, n_layers=10**9), "asks for 1000000000 layers, but it holds"),
        (lambda table: set_params(table, multiple_of=11), "what its metadata say: groups of 64 do not divide"),
        (lambda table: set_params(table, n_layers=3), "lacks layers.2.attention.wq.weight.codes; .* and 20 more"),
        (lambda table: set_params(table, n_layers=1), r"holds .*which its metadata have no place for"),
        (lambda table: set_params(table, vocab_size=328), r"tok_embeddings.weight is \[320, 128\], expected \[328"),
        (lambda table: rename(table, f"{WQ}.codes", WQ), f"lacks {WQ}.codes;"),
        (lambda table: set_metadata(table, quantize="int4"), r"scales is \[128, 2\], expected \[128, 4\]"),
        (lambda table: set_metadata(table, quantize="int8"), "zeros'; and 12 more, which its metadata have"),
        (lambda table: table[f"{WQ}.codes"].update(dtype="I8"), f"holds {WQ}.codes as torch.int8; int4-g64"),
        (lambda table: table[f"{WQ}.codes"].update(dtype="I32"), "as 'I32'; BF16, F16, F32, I8, U8 can be read"),
        (lambda table: table[f"{WQ}.zeros"].update(dtype="F16"), f"holds {WQ}.zeros as torch.float16"),
    ],
)  # fmt: skip
def test_damage_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    folder = tmp_path / "codes"
    convert(tiny.tiny_checkpoint(tmp_path / "source", 1, ARGS, dtype=torch.bfloat16), folder, quantize="int4-g64")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)
    assert not verify(folder).ok


def test_files_that_are_missing_or_cut(tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    convert(tiny.tiny_checkpoint(tmp_path / "source", 1, ARGS), folder, quantize="int8")
    stored = open_checkpoint(folder)
    size = (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, size - 100_000)
    with pytest.raises(CheckpointError, match=r"quantized\.safetensors has become shorter"):
        load_model(stored, Parallel(), CPU, torch.float32)
    with pytest.raises(CheckpointError, match="probably truncated"):
        open_checkpoint(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer at"):
        open_checkpoint(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"lacks quantized\.safetensors"):
        QuantizedCheckpoint(folder)


def test_mutated_headers(tmp_path: Path) -> None:
    results = fuzz("quantized", tmp_path, 300)
    assert len(results) > 10


CONVERT = """
import sys
from benchmarks.load import memory
from codellama.checkpoint.convert import convert
before = memory("VmHWM")
convert(sys.argv[1], sys.argv[2], quantize="int4")
print(memory("VmHWM") - before)
"""


def test_memory_is_that_of_a_piece_while_converting_and_of_the_codes_while_loading(tmp_path: Path) -> None:
    """A file of 120 MB; of its codes, some tensors are read ahead."""
    assert write_random(tmp_path / "source", 0.13) > 115e6
    command = [sys.executable, "-c", CONVERT, str(tmp_path / "source"), str(tmp_path / "codes")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 80e6
    alone = run_processes(tmp_path / "codes", 1)
    assert 30 < alone["weights_MB"] < 50
    assert alone["above_MB"] < 40
