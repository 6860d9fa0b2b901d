"""The examples: they run as scripts, alone and under torchrun, with prompts of one's own, and refuse unknown flags."""

import inspect
import io
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codellama import Llama
from tests.support.pages import check_page, examples_of
from tests.test_docs import check

ROOT = Path(__file__).parents[1]
EXAMPLES = ("example_completion.py", "example_infilling.py", "example_instructions.py")


def function(name: str) -> Callable[..., Any]:
    main = runpy.run_path(str(ROOT / name))["main"]
    assert callable(main)
    return main


def run(monkeypatch: pytest.MonkeyPatch, name: str, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *args])
    runpy.run_path(str(ROOT / name), run_name="__main__")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_prints_its_prompts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_folder: Path, name: str
) -> None:
    run(monkeypatch, name, "--ckpt_dir", str(tiny_folder), "--max_gen_len", "4", "--max_seq_len", "1024")
    out = capsys.readouterr().out
    assert out.count("─" * 40) >= 3
    assert "\033[1m" in out


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_prompt_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_folder: Path, name: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("mine = <FILL>\n")
    flags = ("--ckpt_dir", str(tiny_folder), "--max_gen_len", "3", "--temperature", "0")
    run(monkeypatch, name, *flags, "--prompt_file", str(tmp_path / "own.py"))
    assert capsys.readouterr().out.count("mine = ") == 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_prompt_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_folder: Path, name: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"mine = <FILL>\n")))
    run(monkeypatch, name, "--ckpt_dir", str(tiny_folder), "--max-gen-len=3", "--temperature=0", "--prompt_file", "-")
    assert capsys.readouterr().out.count("mine = ") == 1


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, flag: str) -> None:
    run(monkeypatch, name, flag)
    printed = capsys.readouterr()
    assert printed.err == ""
    check_page(printed.out, function(name))
    assert f"Usage: {name} [flags]" in printed.out
    assert all(f" {name}" in example for example in examples_of(printed.out))
    check("\n".join(examples_of(printed.out)))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_misspelled_flag_fails_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(Llama, "build", lambda *_, **__: pytest.fail("something was loaded"))
    for flag in inspect.signature(function(name)).parameters:
        wrong = f"--{flag[:-2]}{flag[-1]}"
        with pytest.raises(SystemExit) as caught:
            run(monkeypatch, name, wrong, "x")
        assert caught.value.code == 2
        first = f"{wrong} is no flag of {name}; did you mean --{flag}?"
        assert capsys.readouterr() == ("", f"{first}\nSee {name} --help.\n")


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_seq_len", "abc"], "--max_seq_len is 'abc'; an integer was expected"),
        (["--top_p"], "--top_p needs a value"),
        (["--top_p", "1", "--top_p", "1"], "--top_p is given twice"),
        (["CodeLlama-7b"], "'CodeLlama-7b' is a word too many"),
    ],
)
def test_a_wrong_command_line_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, words: list[str], message: str
) -> None:
    monkeypatch.setattr(Llama, "build", lambda *_, **__: pytest.fail("something was loaded"))
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, name, *words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(SystemExit, match=f"{name}: nowhere does not exist"):
        run(monkeypatch, name, "--ckpt_dir", "nowhere")


@pytest.mark.parametrize("name", EXAMPLES)
def test_prompts_and_values_are_checked_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(Llama, "build", lambda *_, **__: pytest.fail("something was loaded"))
    (tmp_path / "binary").write_bytes(b"\xff")
    for words, message in (
        (["--prompt_file", str(tmp_path / "absent")], "absent cannot be read: No such file"),
        (["--prompt_file", str(tmp_path / "binary")], "binary is not UTF-8 text"),
        (["--temperature", "-1"], "temperature is -1"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, name, *words)


def test_infilling_checks_the_gap_before_anything_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Llama, "build", lambda *_, **__: pytest.fail("something was loaded"))
    (tmp_path / "two").write_text("<FILL> <FILL>")
    with pytest.raises(SystemExit, match="holds 2 <FILL> markers; exactly one was expected"):
        run(monkeypatch, "example_infilling.py", "--prompt_file", str(tmp_path / "two"))


def test_an_example_is_short_and_uses_the_public_api() -> None:
    for name in EXAMPLES:
        text = (ROOT / name).read_text()
        assert len(text.splitlines()) <= 60, name
        assert "from codellama." not in text, name


@pytest.mark.slow
def test_under_torchrun_one_rank_prints(tiny_folder: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", EXAMPLES[0], "--ckpt_dir",
        str(tiny_folder), "--max_gen_len", "3",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("─" * 40) == 4
    assert done.stderr.count("memory per rank") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_under_torchrun_world_rank_0_reads_the_prompt(tiny_folder: Path, name: str) -> None:
    """From standard input, which can be read only once."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", name, "--ckpt_dir", str(tiny_folder),
        "--max_gen_len", "3", "--prompt_file", "-",
    ]  # fmt: skip
    done = subprocess.run(
        command, input="mine = <FILL>\n", cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mine = ") == 1
