"""The benchmarks, on models so small that they end at once: what they measure is plausible, and pages hold it."""

import asyncio
import contextlib
import importlib
import inspect
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu, gpu, pages, parts, peers, start
from benchmarks.attention import attention
from benchmarks.context import context
from benchmarks.kernels import kernels
from benchmarks.machine import RandomCheckpoint, n_weights, prefill_work, random_model, shape_args, weight_bytes
from benchmarks.serving import measure, percentile, write_random
from codellama.assembly import DEMO
from codellama.checkpoint import open_checkpoint
from codellama.errors import CodeLlamaError
from codellama.tokenizer import Tokenizer
from tests.server.test_serve import Serving


@pytest.mark.slow
def test_the_serving_benchmark_measures_every_load() -> None:
    sizes = {"streams": 2, "requests": 3, "prompt": 8, "new_tokens": 4, "long": 40, "history": 60}
    arguments: dict[str, Any] = dict(sizes)
    with Serving() as client:
        rows = asyncio.run(measure(f"{client.base_url}/v1", Tokenizer(DEMO / "tokenizer.model"), arguments))
        client.close()
    assert [(row["load"], row["requests"]) for row in rows] == [("1 at once", 2), ("2 at once", 2)] * 2 + [
        ("poisson", 3)
    ]
    assert all(0 < row["first_p50_ms"] <= row["first_p95_ms"] <= row["first_p99_ms"] for row in rows)
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert arguments["second_turn"]["prompt"] > arguments["second_turn"]["cached"] > sizes["history"]
    assert arguments["behind_long"]["short_s"] > 0


@pytest.mark.parametrize(("percent", "value"), [(50, 3), (95, 4), (99, 4), (0, 1)])
def test_percentile(percent: float, value: float) -> None:
    assert percentile([4, 1, 3, 2], percent) == value


def test_the_random_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    write_random(tmp_path, "tiny", torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.n_words == checkpoint.args.vocab_size == 8192
    assert tokenizer.decode([8000, 8001]) == "<8000><8001>"
    text = "def f(x):\n    return x"
    assert tokenizer.encode(text, bos=True, eos=False) == Tokenizer(DEMO / "tokenizer.model").encode(
        text, bos=True, eos=False
    )


CPU = torch.device("cpu")


def last_line(output: str) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(output.splitlines()[-1])
    return line


def test_random_weights_are_the_same_each_time_and_in_part() -> None:
    weights = RandomCheckpoint(shape_args("tiny"), torch.float32, CPU)
    whole = weights.read("layers.0.feed_forward.w1.weight")
    assert torch.equal(weights.read("layers.0.feed_forward.w1.weight", 0, 8, 24), whole[8:24])
    room = torch.empty_like(whole)
    assert weights.read("layers.0.feed_forward.w1.weight", 0, 0, None, out=room) is room
    assert torch.equal(room, whole)
    assert weights.read("layers.0.feed_forward.w1.weight", 1, 8, 24, out=room).shape == (whole.shape[0], 16)
    assert not torch.equal(weights.read("layers.1.feed_forward.w1.weight"), whole)
    assert float(whole.std()) == pytest.approx(0.02, rel=0.05)


def test_work_is_counted_from_the_architecture() -> None:
    model = random_model("tiny", torch.float32, CPU)
    assert n_weights(model.args) * 4 == weight_bytes(model)
    # One token: each weight once, and attention to itself in 2 layers of 4 heads of 16.
    assert prefill_work(model.args, 1) == 2 * n_weights(model.args) + 2 * 2 * 64


@pytest.mark.slow
def test_peers_alternate_and_agree(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The engines of this environment; llama.cpp is named as missing where an interpreter lacks it."""
    engines = "ours,ours-float32,transformers-float32,llama.cpp-f16"
    absent = tmp_path / "python"  # an interpreter without any package
    absent.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    absent.chmod(0o755)
    peers.peers("tiny", engines, "cpu", prompt=20, new_tokens=5, rows=2, rounds=2, llama_cpp_python=str(absent))
    line = last_line(capsys.readouterr().out)
    assert [row["engine"] for row in line["rows"]] == ["ours", "ours-float32", "transformers-float32"]
    assert list(line["arguments"]["missing"]) == ["llama.cpp-f16"]
    assert "not installed" in line["arguments"]["missing"]["llama.cpp-f16"]
    assert line["arguments"]["equal_in_float32"] is True
    assert all(row["prefill_best"] >= row["prefill"] > 0 for row in line["rows"])
    assert all(row["decode_best"] >= row["decode"] > 0 for row in line["rows"])
    assert [row["same_first"] for row in line["rows"][1:]] == [1, 1]
    ours, exact, theirs = line["rows"]
    assert exact["weights_GB"] == theirs["weights_GB"]
    assert ours["rows"] > 0
    ratio = line["findings"]["decode, ours by the best of the peers' 16 and 32 bits"]
    assert ratio == pytest.approx(ours["decode"] / theirs["decode"])


def test_peers_that_differ_are_refused() -> None:
    same, other = {"tokens": [[1, 2]]}, {"tokens": [[1, 3]]}
    assert peers.equal_in_float32({"ours-float32": [same], "transformers-float32": [same]}) is True
    assert peers.equal_in_float32({"ours-float32": [same]}) is None
    with pytest.raises(CodeLlamaError, match="equal tokens were expected"):
        peers.equal_in_float32({"ours-float32": [same], "transformers-float32": [other]})


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="engines has 'vllm'"):
        peers.choose("ours,vllm", CPU)


def test_the_ratio_is_by_the_best_peer() -> None:
    table = [
        {"engine": name, "prefill": p, "prefill_best": p, "decode": d, "decode_best": 2 * d, "rows": rows}
        for name, p, d, rows in (
            ("ours", 60, 9, 27), ("transformers-bfloat16", 40, 12, None), ("llama.cpp-f16", 80, 10, None),
        )
    ]  # fmt: skip
    found = peers.ratios(table)
    assert found["prefill, ours by the best of the peers' 16 and 32 bits"] == 60 / 80
    assert found["decode, ours by the best of the peers' 16 and 32 bits (best runs)"] == 18 / 24
    assert found["decode, ours: all rows by one"] == 3
    assert len(found) == 5


def function_of(run: pages.Run) -> Callable[..., None]:
    function: Callable[..., None] = getattr(importlib.import_module(f"benchmarks.{run.module}"), run.module)
    return function


def test_the_list_for_gpus_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that runs a model in its own process, here in this one; each section holds what its command reported."""

    def here(run: pages.Run) -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            function_of(run)(**run.flags)
        return last_line(printed.getvalue())

    monkeypatch.setattr(pages, "one", here)
    page = tmp_path / "page.md"
    sizes = {"prefill": 24, "long": 40, "new_tokens": 4}
    words = "decode,context,prefill,long"
    gpu.gpu("cpu", "tiny", "float32", **sizes, only=words, output=str(page), tests=False)
    lines = {line["title"]: line for line in pages.read_lines(page)}
    assert list(lines) == ["Decode by rows", "Decode by context", "Prefill by length", "A long prompt"]
    assert [row["batch"] for row in lines["Decode by rows"]["rows"]] == [1, 8, 64]
    assert [row["prompt"] for row in lines["A long prompt"]["rows"]] == [40]
    rows = lines["Decode by rows"]["rows"]
    assert all(row["of_bandwidth"] > 0 for row in rows)
    assert f"| {rows[0]['batch']} | {rows[0]['context']} |" in page.read_text()


@pytest.mark.parametrize(
    "known",
    [gpu.runs("cuda", "7b", "bfloat16", 8192, 100_000, 128), cpu.runs("953m", "207m", 8192, 100_000, 5, "python")],
)
def test_lists_give_flags_that_there_are(known: Mapping[str, Sequence[pages.Run]]) -> None:
    for run in (run for several in known.values() for run in several):
        assert run.flags.keys() <= inspect.signature(function_of(run)).parameters.keys(), run.title


def test_the_parts_of_a_prompt_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    parts.parts("tiny", "float32", "cpu", prompts=(16, 48), rounds=1)
    line = last_line(capsys.readouterr().out)
    assert [row["prompt"] for row in line["rows"]] == [16, 48]
    for row in line["rows"]:
        assert row["engine_s"] == pytest.approx(row["by_sum"] * (row["products_s"] + row["attention_s"]))
        assert row["engine_s"] > 0


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        gpu.gpu()


def test_everything_for_gpus_is_known() -> None:
    known = gpu.runs("cuda", "7b", "bfloat16", 8192, 100_000, 128)
    assert known.keys() >= {"decode", "context", "prefill", "long", "peers", "start"}
    assert gpu.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def line_of(title: str, **changes: Any) -> Mapping[str, Any]:
    machine = {"commit": "abc", "python": "3", "torch": "2", "hardware": "a CPU", "threads": 1}
    return {"benchmark": "x", **machine, "arguments": {"n": 1}, "rows": [{"a": 1.5}], "title": title, **changes}


def test_a_page_keeps_other_sections_and_notes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    pages.write_page(page, "a machine", [line_of("One"), line_of("Two")], {"driver": "7"})
    page.write_text(page.read_text().replace("None yet.", "Tried: nothing."))
    found = [line_of("Two", rows=[{"a": 2.5}]), {"benchmark": "x", "title": "Three", "failed": "no memory"}]
    pages.write_page(page, "a machine", pages.merged(pages.read_lines(page), found), {})
    text = page.read_text()
    assert [line["title"] for line in pages.read_lines(page)] == ["One", "Two", "Three"]
    assert text.count("## Two") == 1
    assert "| 2.5 |" in text
    assert "It failed: no memory" in text
    assert text.endswith("Tried: nothing.\n")


def test_a_benchmark_that_fails_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    good = pages.Run("Good", "prefill", {"shape": "tiny", "prompts": [8, 16], "repeats": 1})
    wrong, found = pages.run_all([pages.Run("Wrong", "absent"), good])
    assert '{"benchmark": "prefill"' in capfd.readouterr().out
    assert wrong["title"] == "Wrong"
    assert "No module named benchmarks.absent" in wrong["failed"]
    assert found["command"] == "python -m benchmarks.prefill --shape tiny --prompts 8,16 --repeats 1"
    assert [row["prompt"] for row in found["rows"]] == [8, 16]


def test_paths_of_a_machine_are_not_shown() -> None:
    run = pages.Run("Peers", "peers", {"shape": "tiny", "llama_cpp_python": "/home/me/python", "engines": ["a", "b"]})
    assert run.words("p") == [
        "p", "-m", "benchmarks.peers", "--shape", "tiny", "--llama_cpp_python", "/home/me/python", "--engines", "a,b",
    ]  # fmt: skip
    assert run.shown() == "python -m benchmarks.peers --shape tiny --llama_cpp_python PATH --engines a,b"


def test_the_start_is_taken_apart() -> None:
    parts = start.times(None, "def f(x):")
    assert list(parts) == ["interpreter", "import torch", "import codellama", "build", "first token", "total"]
    assert parts["total"] == pytest.approx(sum(parts.values()) / 2)
    assert all(seconds > 0 for seconds in parts.values())


def test_plots_have_the_same_bytes_each_time(tmp_path: Path) -> None:
    from benchmarks.plots import draw

    speeds = [{"batch": n, "context": 8, "tokens_per_s": 9.0 * n, "ms_per_step": 4.0} for n in (1, 2, 4)]
    lengths = [{"batch": 1, "context": n, "tokens_per_s": 9.0, "ms_per_step": 4.0 + n} for n in (8, 16, 64)]
    prompts = [{"dtype": "bfloat16", "prompt": n, "tokens_per_s": 500.0 / n} for n in (8, 64)]
    table = [
        {"engine": name, "prefill": 80.0, "prefill_best": 90.0, "decode": 7.0, "decode_best": 7.5}
        for name in ("ours", "transformers-float32", "llama.cpp-q4_0")
    ]
    kinds = {"quantize": None, "dtype": "bfloat16"}
    lines = [
        line_of("Peers", benchmark="peers", arguments={"prompt": 512, "new_tokens": 32}, rows=table),
        line_of("Rows", benchmark="decode", arguments=kinds, rows=speeds),
        line_of("Context", benchmark="decode", arguments=kinds, rows=lengths),
        line_of("Prefill", benchmark="prefill", arguments={"quantize": "int8"}, rows=prompts),
    ]
    page = tmp_path / "page.md"
    pages.write_page(page, "a machine", lines, {})
    once = {path.name: path.read_bytes() for path in draw(page, tmp_path)}
    again = {path.name: path.read_bytes() for path in draw(page, tmp_path)}
    assert list(once) == ["page-peers.svg", "page-rows.svg", "page-context.svg"]
    assert once == again
    assert b"llama.cpp-q4_0" in once["page-peers.svg"]
    assert b"int8" in once["page-context.svg"]
    assert max(map(len, once.values())) < 60_000


def test_attention_and_long_contexts_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    attention(rows=(1, 2), lengths=16, chunks=8, heads=4, kv_heads=2, head_dim=16, rounds=1)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["case"] for row in found["rows"]] == ["decode", "decode", "ragged", "chunk"] * 2
    context(lengths=200, dim=64, dtype="float32", cache_dtype="int8", rounds=1)
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["s"] > 0
    assert row["ratio"] == pytest.approx(row["s"] / (row["linears_s"] + row["attention_s"]))


def test_the_benchmark_of_kernels_measures_each(capsys: pytest.CaptureFixture[str]) -> None:
    kernels(shape=(64, 128), rows=(1, 40), megabytes=1, repeats=1)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {(row["candidate"], row["rows"]) for row in rows} >= {(f"{bits} torch", 1) for bits in ("int8", "int4")}
    assert all(row["ms"] > 0 and 0 < row["of_bandwidth"] < 100 for row in rows)
    with pytest.raises(ValueError, match="inputs in multiples of 32"):
        kernels(shape=(64, 100))
