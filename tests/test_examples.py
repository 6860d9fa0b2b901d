"""The examples: they run as scripts, alone and under torchrun, with prompts of one's own, and refuse unknown flags."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from codellama import Llama

ROOT = Path(__file__).parents[1]
EXAMPLES = ("example_completion.py", "example_infilling.py", "example_instructions.py")


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
def test_a_misspelled_flag_fails_before_anything_loads(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(Llama, "build", lambda **_: pytest.fail("something was loaded"))
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, name, "--ckptdir", "x")
    assert caught.value.code == 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(SystemExit, match="error: nowhere does not exist"):
        run(monkeypatch, name, "--ckpt_dir", "nowhere")


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
