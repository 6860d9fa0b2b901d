"""The command: streams, files, standard input, and flags that fail before anything loads."""

import inspect
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import codellama
from codellama import cli
from codellama.llama import Llama
from tests.support.pages import check_looks, check_page, examples_of
from tests.test_docs import check

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


COMMANDS = pytest.mark.parametrize("command", cli.COMMANDS)
GENERATING = pytest.mark.parametrize("command", ["complete", "infill", "chat"])
FLAG_NAMES = [
    (command, name)
    for command, function in cli.COMMANDS.items()
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and len(name) > 2  # of shorter ones no letter can be left out
]


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command line that must fail with status 2 before anything loads, and return what it says."""
    monkeypatch.setattr(Llama, "build", lambda *_, **__: pytest.fail("something was loaded"))
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *args)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


@pytest.mark.parametrize(("command", "name"), FLAG_NAMES)
def test_a_misspelled_flag_is_named_with_the_one_meant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    wrong = f"--{name[:-2]}{name[-1]}"
    said = refused(monkeypatch, capsys, command, wrong, "1", "--prompt", "x <FILL>")
    first = f"{wrong} is no flag of codellama {command}; did you mean --{name}?"
    assert said == f"{first}\nSee codellama {command} --help.\n"


@GENERATING
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_seq_len"], "--max_seq_len needs a value"),
        (["--prompt", "--seed", "1"], "--prompt needs a value, but --seed follows"),
        (["--max_seq_len", "abc"], "--max_seq_len is 'abc'; an integer was expected"),
        (["--temperature", "warm"], "--temperature is 'warm'; a number was expected"),
        (["--seed", "x"], "--seed is 'x'; an integer or None was expected"),
        (["--seed", "1", "--seed", "1"], "--seed is given twice"),
        (["a.py", "b.py"], "'b.py' is a word too many"),
    ],
)
def test_a_wrong_command_line_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, words: list[str], message: str
) -> None:
    assert refused(monkeypatch, capsys, command, *words).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert"], "SOURCE"),
        (["convert", "a"], "TARGET"),
        (["convert", "a", "b", "c"], "'c' is a word too many"),
        (["convert", "a", "b", "--rope_theta", "big"], "--rope_theta is 'big'; a number"),
        (["verify", "a", "--full", "yes"], "'yes' is a word too many"),
        (["info"], "PATH"),
        (["info", "a", "--max_batch_size", "many"], "--max_batch_size is 'many'; an integer was expected"),
    ],
)
def test_a_wrong_command_line_about_weights_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in refused(monkeypatch, capsys, *words)


def test_a_switch_takes_no_value(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--suffix_first", "True"], ["--no-suffix_first=True"]):
        assert "is a switch, which takes no value" in refused(monkeypatch, capsys, "infill", *words)


def test_a_misspelled_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "complet is no command of codellama; did you mean complete?" in refused(monkeypatch, capsys, "complet")


@pytest.mark.parametrize("flags", [(), ("--suffix_first",), ("--no-suffix_first",), ("--suffix_first=False",)])
def test_the_switch_of_infill(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    checkpoint: tuple[str, str],
    llama: Llama,
    flags: tuple[str, ...],
) -> None:
    run(monkeypatch, "infill", *flags, "--prompt", "def f(x):<FILL>return y", *checkpoint, *FLAGS)
    first = flags == ("--suffix_first",)
    kinds = [
        llama.text_infilling(["def f(x):"], ["return y"], 0, 0.9, 6, suffix_first=suffix_first)[0]["full_text"]
        for suffix_first in (False, True)
    ]
    assert kinds[0] != kinds[1]
    assert capsys.readouterr().out == f"{kinds[first]}\n"


def test_dashes_may_stand_for_underscores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_folder: Path, llama: Llama
) -> None:
    run(monkeypatch, "complete", "--prompt=123", f"--ckpt-dir={tiny_folder}", *FLAGS[:-2], "--max-gen-len", "6")
    (expected,) = llama.text_completion(["123"], temperature=0, max_gen_len=6)
    assert capsys.readouterr().out == f"123{expected['generation']}\n"


@COMMANDS
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, flag: str
) -> None:
    run(monkeypatch, command, flag)
    printed = capsys.readouterr()
    assert printed.err == ""
    check_page(printed.out, cli.COMMANDS[command])
    takes = {"convert": " SOURCE TARGET", "verify": " PATH", "info": " PATH", "serve": "", "evaluate": " TASK"}.get(
        command, " [FILE]"
    )
    assert f"Usage: codellama {command}{takes} [flags]" in printed.out
    examples = examples_of(printed.out)
    assert all(f"codellama {command} " in example for example in examples)
    check("\n".join(examples))


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_help_of_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    run(monkeypatch, *words)
    printed = capsys.readouterr()
    assert printed.err == ""
    check_looks(printed.out)
    for command, function in cli.COMMANDS.items():
        summary = inspect.getdoc(function).partition("\n")[0].rstrip(".")
        assert re.search(rf"^  {command} +{re.escape(summary)}$", printed.out, re.MULTILINE), command
    assert len(examples_of(printed.out)) == len(cli.COMMANDS)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--version")
    assert capsys.readouterr().out == f"codellama {codellama.__version__}\n"


def test_wrong_values_fail_before_anything_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "build", lambda *_, **__: pytest.fail("something was loaded"))
    for flags, message in (
        (("--temperature", "-1"), "temperature is -1"),
        (("--top_p=1.5",), "top_p is 1.5"),
        (("--max_seq_len", "0"), "max_seq_len is 0"),
    ):
        with pytest.raises(SystemExit, match=f"codellama: {message}"):
            run(monkeypatch, "complete", "--prompt", "x", *flags)


PROGRAM = """
import contextlib, io, runpy, shlex, sys
for line in sys.stdin.read().splitlines():
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code, sys.argv = 0, shlex.split(line)
        try:
            if sys.argv[0] == "codellama":
                from codellama.cli import main
                main()
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    heavy = {"torch", "fairscale", "transformers"} & sys.modules.keys()
    print(*[code, bool(said.getvalue()), *sorted(heavy)])
"""


def test_help_and_refusals_load_no_torch() -> None:
    lines = ["codellama", "codellama --version", "codellama --help", "codellama complet"]
    ends = ["0", "0", "0", "2"]
    examples = [f"example_{name}.py" for name in ("completion", "infilling", "instructions")]
    for program in [*(f"codellama {command}" for command in cli.COMMANDS), *examples]:
        lines += [f"{program} --help", f"{program} --tempratur 1", f"{program} --max_seq_len abc", f"{program} --seed"]
        ends += ["0", "2", "2", "2"]
    lines += [f"{example} --prompt_file nowhere" for example in examples]
    lines += ["codellama complete nowhere", "codellama infill --prompt x", "codellama chat --prompt x --top_p 2"]
    ends += [f"{example}: nowhere cannot be read: No such file or directory" for example in examples]
    ends += [
        "codellama: nowhere cannot be read: No such file or directory",
        "codellama: the text holds 0 <FILL> markers; exactly one was expected",
        "codellama: top_p is 2; a finite number in [0, 1] was expected",
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input="\n".join(lines), cwd=Path(__file__).parents[1],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    spoken = [f"{end} {end in ('0', '2')}" for end in ends]  # what ends with a message prints it only at the very end
    assert dict(zip(lines, done.stdout.splitlines(), strict=True)) == dict(zip(lines, spoken, strict=True))


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


def test_weights_are_converted_verified_and_described(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path
) -> None:
    theirs, two = str(tmp_path / "theirs"), str(tmp_path / "two")
    run(monkeypatch, "convert", str(tiny_folder), theirs, "--format", "huggingface")
    run(monkeypatch, "convert", theirs, two, "--model_parallel_size", "2")
    for source in (str(tiny_folder), theirs, two):
        run(monkeypatch, "complete", "--prompt", "[1, 2]", "--ckpt_dir", source, *FLAGS)
    outputs = capsys.readouterr().out.splitlines()
    assert len(outputs) >= 3
    assert outputs[: len(outputs) // 3] * 3 == outputs
    run(monkeypatch, "info", two, "--max_seq_len", "100")
    described = capsys.readouterr().out
    assert "format       meta" in described
    assert "4 rows of 100 tokens" in described
    run(monkeypatch, "verify", two)
    assert "consolidated.01.pth" in capsys.readouterr().out
    codes = str(tmp_path / "codes")
    run(monkeypatch, "convert", two, codes, "--quantize", "int8", "--dtype", "bfloat16")
    run(monkeypatch, "complete", "--prompt", "[1, 2]", "--ckpt_dir", codes, *FLAGS)
    run(monkeypatch, "verify", codes)
    assert "codes of int8" in capsys.readouterr().out
    run(monkeypatch, "info", codes, "--dtype", "bfloat16")
    held = capsys.readouterr().out
    assert "stored as    bfloat16, int8" in held
    run(monkeypatch, "info", two, "--dtype", "bfloat16", "--quantize", "int8")
    assert held[held.index("runs as") :] == (text := capsys.readouterr().out)[text.index("runs as") :]
    with pytest.raises(SystemExit, match="quantize is 'int4', but these weights are stored as int8"):
        run(monkeypatch, "complete", "--prompt", "x", "--ckpt_dir", codes, "--quantize", "int4", *FLAGS)
    with pytest.raises(SystemExit, match="quantize is 'int2'; one of int8"):
        run(monkeypatch, "convert", two, str(tmp_path / "no"), "--quantize", "int2")


def test_a_fault_in_weights_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    with (broken / "consolidated.00.pth").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "verify", str(broken))
    assert caught.value.code == 1
    assert "truncated" in capsys.readouterr().out


def test_a_target_that_exists_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="exists already, and nothing is overwritten"):
        run(monkeypatch, "convert", str(tiny_folder), str(tmp_path))
