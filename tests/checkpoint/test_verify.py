"""Verification: each kind of fault is found and named, several in one run, and no input ends it."""

import hashlib
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from codellama.checkpoint.convert import convert
from codellama.checkpoint.report import Report
from codellama.checkpoint.verify import verify
from codellama.config import ModelArgs
from tests.support import tiny
from tests.support.tiny import tiny_checkpoint

WK = "layers.1.attention.wk.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "ckpt", n_shards=2)


def change(path: Path, name: str, index: tuple[int | slice, ...], value: float) -> None:
    state = torch.load(path, weights_only=True)
    state[name][index] = value
    torch.save(state, path)


def write_sums(folder: Path) -> None:
    paths = sorted(path for path in folder.iterdir() if path.name != "checklist.chk")
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths]
    (folder / "checklist.chk").write_text("".join(lines))


def faults_of(folder: Path, **options: bool) -> list[tuple[str, str]]:
    report = verify(folder, **options)  # type: ignore[arg-type]
    assert report.ok == (report.faults == [])
    return [(row.subject, row.check) for row in report.faults]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("format", ["meta", "huggingface"])
def test_a_whole_checkpoint(folder: Path, tmp_path: Path, format: str, full: bool) -> None:
    convert(folder, tmp_path / "other", format=format)
    report = verify(tmp_path / "other", full=full)
    assert report.faults == []
    groups = {row.subject: row.found for row in report.rows if row.check == "values"}
    assert len(groups) == 12
    assert groups["layers.N.attention.wk.weight"] == "all 1,728 numbers in 3 tensors looked at"
    sums = [row for row in report.rows if row.check == "md5"]
    assert len(sums) == (3 if format == "meta" else 1)


def test_several_faults_in_one_run(folder: Path) -> None:
    os.truncate(folder / "consolidated.00.pth", 9000)
    with (folder / "params.json").open("a") as file:
        file.write(" ")
    (folder / "tokenizer.model").write_bytes(tiny.tokenizer_bytes(size=312))
    found = faults_of(folder)
    assert found[:1] == [("consolidated.00.pth", "content")]
    assert {subject for subject, check in found if check == "md5"} == {
        "params.json", "tokenizer.model", "consolidated.00.pth",
    }  # fmt: skip


def test_two_truncated_files_and_a_page(tmp_path: Path) -> None:
    args = ModelArgs(dim=48, n_layers=2, n_heads=8, vocab_size=320, multiple_of=40, rope_theta=1e4)
    folder = tiny_checkpoint(tmp_path / "ckpt", 4, args)
    (folder / "checklist.chk").unlink()
    os.truncate(folder / "consolidated.01.pth", 5000)
    os.truncate(folder / "consolidated.02.pth", 0)
    (folder / "consolidated.03.pth").write_text("<html>log in</html>")
    report = verify(folder)
    messages = {row.subject: row.found for row in report.faults}
    assert messages.keys() == {f"consolidated.0{index}.pth" for index in (1, 2, 3)}
    assert "probably truncated" in messages["consolidated.01.pth"]
    assert "(0 bytes) is not a PyTorch zip file" in messages["consolidated.02.pth"]
    assert "HTML page" in messages["consolidated.03.pth"]
    whole = [row for row in report.rows if row.subject == "consolidated.00.pth"]
    assert [(row.check, row.ok) for row in whole] == [("content", True)]


def test_missing_files(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()
    (folder / "params.json").unlink()
    report = verify(folder)
    found = " ".join(row.found for row in report.faults)
    assert "lacks params.json" in found
    assert "lacks consolidated.00.pth" in found
    assert {row.subject for row in report.faults if "lists it, but" in row.found} == {
        "consolidated.00.pth", "params.json",
    }  # fmt: skip


def test_bad_sums_and_a_bad_list(folder: Path) -> None:
    with (folder / "checklist.chk").open("a") as file:
        file.write("0123  params.json\n\nd41d8cd98f00b204e9800998ecf8427e  ../outside\n")
    assert faults_of(folder) == [("checklist.chk", "content")] * 2
    write_sums(folder)
    change(folder / "consolidated.01.pth", "norm.weight", (3,), 1.25)
    report = verify(folder)
    (fault,) = report.faults
    assert (fault.subject, fault.check) == ("consolidated.01.pth", "md5")
    assert hashlib.md5((folder / "consolidated.01.pth").read_bytes()).hexdigest() in fault.found
    (folder / "checklist.chk").write_bytes(b"\xff\xfe\x00")
    assert faults_of(folder) == [("checklist.chk", "content")]


@pytest.mark.parametrize("listed", [True, False])
def test_a_file_that_is_a_copy_of_another(folder: Path, listed: bool) -> None:
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    (folder / "checklist.chk").unlink()
    if listed:
        write_sums(folder)
    report = verify(folder)
    (fault,) = report.faults
    assert (fault.subject, fault.check) == ("consolidated.01.pth", "copies")
    assert "the same bytes as consolidated.00.pth" in fault.found


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite(folder: Path, value: float) -> None:
    change(folder / "consolidated.01.pth", WK, (4, 7), value)
    change(folder / "consolidated.00.pth", "output.weight", (slice(0, 2), 0), value)
    write_sums(folder)
    report = verify(folder)
    messages = {row.subject: row.found for row in report.faults}
    assert messages.keys() == {WK, "output.weight"}
    assert f"{WK} holds 1 values of NaN or infinity among 576" in messages[WK]
    assert "output.weight holds 2 values" in messages["output.weight"]


def test_a_sample_sees_the_ends_and_full_sees_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codellama.checkpoint.verify.SAMPLE_VALUES", 1)
    monkeypatch.setattr("codellama.checkpoint.verify.SAMPLE_PLACES", 3)
    monkeypatch.setattr("codellama.checkpoint.verify.PIECE_BYTES", 1000)
    (folder / "checklist.chk").unlink()
    found = []
    for row in range(320):
        if row in (0, 319) or row % 40 == 5:
            bad = folder.parent / f"bad{row}"
            shutil.copytree(folder, bad)
            change(bad / f"consolidated.0{row // 160}.pth", "output.weight", (row % 160, 47), float("nan"))
            assert faults_of(bad, full=True) == [("output.weight", "values")]
            found.append((row, faults_of(bad)))
    assert found[0] == (0, [("output.weight", "values")])
    assert found[-1] == (319, [("output.weight", "values")])
    assert [row for row, faults in found if not faults], "a sample of 5 rows of 320 misses some of 8"


def test_a_tensor_of_zeros(folder: Path) -> None:
    for index in (0, 1):
        change(folder / f"consolidated.0{index}.pth", WK, (slice(None),), 0.0)
    write_sums(folder)
    report = verify(folder)
    (fault,) = report.faults
    assert f"{WK} is zero in all 576 values" in fault.found


def test_shapes_and_vocabulary(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(tiny.tokenizer_bytes(size=312))
    (fault,) = verify(folder, tokenizer_path=other).faults
    assert "the tokenizer has 312 pieces" in fault.found
    state = torch.load(folder / "consolidated.01.pth", weights_only=True)
    torch.save({**state, WK: torch.ones(6, 47)}, folder / "consolidated.01.pth")
    write_sums(folder)
    (fault,) = verify(folder).faults
    assert (fault.subject, fault.check) == ("consolidated.01.pth", "content")
    assert f"{WK} is [6, 47], expected [6, 48]" in fault.found


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    for path, message in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "holds no weights in a format")):
        (fault,) = verify(path).faults
        assert message in fault.found
    assert not verify(tmp_path / "file").ok
    (fault,) = verify(tmp_path, checkpoint_format="pickle").faults
    assert "checkpoint_format is 'pickle'" in fault.found


def test_nothing_ends_it(tmp_path: Path) -> None:
    """Random damage to random files: a report each time, and a fault where an md5 sum says so."""
    rng = random.Random(5)
    whole = tiny_checkpoint(tmp_path / "whole", 2)
    names = ["params.json", "tokenizer.model", "consolidated.00.pth", "consolidated.01.pth"]
    for round in range(60):
        bad = tmp_path / f"bad{round}"
        shutil.copytree(whole, bad)
        damaged = set(rng.sample(names, rng.randrange(1, 4)))
        for name in damaged:
            content = bytearray((bad / name).read_bytes())
            for _ in range(rng.randrange(1, 30)):
                content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
            if rng.random() < 0.3:
                del content[rng.randrange(len(content)) :]
            (bad / name).write_bytes(content)
        report = verify(bad, full=True)
        changed = {name for name in damaged if (bad / name).read_bytes() != (whole / name).read_bytes()}
        assert {row.subject for row in report.faults if row.check == "md5"} == changed
        assert report.format().count("\n") >= len(report.rows)


def test_the_table() -> None:
    report = Report()
    report.add("a.pth", "content", "12 B")
    assert report.ok
    report.add("longer.pth", "md5", "other", ok=False)
    report.add("again.pth", "md5", "other", ok=False)
    assert report.format() == (
        "ok     a.pth       content  12 B\nFAULT  longer.pth  md5      other\n1 fault in 2 checks"
    )
