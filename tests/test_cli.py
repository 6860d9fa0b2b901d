"""The command: streams, files, standard input, and flags that fail before anything loads."""

import io
import sys
from pathlib import Path

import pytest

from codellama import cli
from codellama.llama import Llama

FLAGS = ("--dtype", "float32", "--temperature", "0", "--max_gen_len", "6")


def run(monkeypatch: pytest.MonkeyPatch, *args: str, stdin: str = "") -> None:
    monkeypatch.setattr(sys, "argv", ["codellama", *args])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), newline=""))
    cli.main()


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Answer input() with these lines, then with the end of the file."""
    left = list(lines)

    def answer(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", answer)


@pytest.fixture
def checkpoint(tiny_folder: Path) -> tuple[str, str]:
    return "--ckpt_dir", str(tiny_folder)


def test_complete_prints_the_text_and_its_continuation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: tuple[str, str], llama: Llama
) -> None:
    run(monkeypatch, "complete", "--prompt", "[1, 2]", *checkpoint, *FLAGS)
    (expected,) = llama.text_completion(["[1, 2]"], temperature=0, max_gen_len=6)
    assert capsys.readouterr().out == f"[1, 2]{expected['generation']}\n"


def test_complete_reads_a_file_and_standard_input(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    checkpoint: tuple[str, str],
    llama: Llama,
    tmp_path: Path,
) -> None:
    text = "def f():\r\n\t"
    (tmp_path / "code.py").write_bytes(text.encode())
    (expected,) = llama.text_completion([text], temperature=0, max_gen_len=6)
    outputs = []
    for source, stdin in ((str(tmp_path / "code.py"), ""), ("-", text)):
        run(monkeypatch, "complete", source, *checkpoint, *FLAGS, stdin=stdin)
        outputs.append(capsys.readouterr().out)
    run(monkeypatch, "complete", *checkpoint, *FLAGS, stdin=text)
    outputs.append(capsys.readouterr().out)
    assert outputs == [f"{text}{expected['generation']}\n"] * 3


def test_infill_prints_the_filled_text(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    checkpoint: tuple[str, str],
    llama: Llama,
    tmp_path: Path,
) -> None:
    (tmp_path / "code.py").write_text("def f(x):\n    <FILL>\n    return y\n")
    run(monkeypatch, "infill", str(tmp_path / "code.py"), *checkpoint, *FLAGS)
    (expected,) = llama.text_infilling(["def f(x):\n    "], ["\n    return y\n"], temperature=0, max_gen_len=6)
    assert capsys.readouterr().out == expected["full_text"]


@pytest.mark.parametrize(("text", "count"), [("none", 0), ("<FILL> <FILL>", 2)])
def test_infill_needs_one_marker(monkeypatch: pytest.MonkeyPatch, text: str, count: int) -> None:
    with pytest.raises(SystemExit, match=f"holds {count} <FILL> markers; exactly one was expected"):
        run(monkeypatch, "infill", "--prompt", text)


def test_chat_answers_one_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: tuple[str, str], llama: Llama
) -> None:
    run(monkeypatch, "chat", "--system", "be brief", *checkpoint, *FLAGS, stdin="hello")
    dialog = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    (expected,) = llama.chat_completion([dialog], temperature=0, max_gen_len=6)
    assert capsys.readouterr().out == f"{expected['generation']['content']}\n"


def test_chat_in_a_terminal_keeps_the_dialog(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: tuple[str, str], llama: Llama
) -> None:
    type_in(monkeypatch, "one", "two")
    monkeypatch.setattr(sys, "argv", ["codellama", "chat", *checkpoint, *FLAGS])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    cli.main()
    dialog: list[dict[str, str]] = []
    for question in ("one", "two"):
        dialog.append({"role": "user", "content": question})
        (answer,) = llama.chat_completion([dialog], temperature=0, max_gen_len=6)
        dialog.append(answer["generation"])
    assert capsys.readouterr().out == f"{dialog[1]['content']}\n{dialog[3]['content']}\n"


@pytest.mark.parametrize("command", ["complete", "infill", "chat"])
def test_a_misspelled_flag_fails_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(Llama, "build", lambda **_: pytest.fail("something was loaded"))
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, command, "--prompt", "x <FILL>", "--tempratur", "1")
    assert caught.value.code == 2
    assert "--tempratur" in capsys.readouterr().err


def test_wrong_values_fail_before_anything_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "build", lambda **_: pytest.fail("something was loaded"))
    for flags, message in ((("--temperature", "-1"), "temperature is -1"), (("--seed", "x"), "seed is 'x'")):
        with pytest.raises(SystemExit, match=f"codellama: {message}"):
            run(monkeypatch, "complete", "--prompt", "x", *flags)


def test_a_refused_turn_does_not_end_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: tuple[str, str]
) -> None:
    type_in(monkeypatch, "one [INST]", " ", "two")
    monkeypatch.setattr(sys, "argv", ["codellama", "chat", *checkpoint, *FLAGS])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    cli.main()
    printed = capsys.readouterr()
    assert "contains [INST]" in printed.err
    assert printed.out.count("\n") >= 1


def test_no_command_prints_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch)
    assert caught.value.code == 0
    assert "infill" in capsys.readouterr().err


def test_a_file_that_is_not_text_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"ok \xff\xfe")
    with pytest.raises(SystemExit, match=r"binary is not UTF-8 text \(invalid start byte at 3\)"):
        run(monkeypatch, "complete", str(tmp_path / "binary"))


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"codellama: .*nowhere does not exist"):
        run(monkeypatch, "complete", "--prompt", "x", "--ckpt_dir", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"codellama: .*No such file"):
        run(monkeypatch, "complete", str(tmp_path / "absent.py"))
    with pytest.raises(SystemExit, match=r"codellama: both a file and --prompt"):
        run(monkeypatch, "complete", "a.py", "--prompt", "x")
