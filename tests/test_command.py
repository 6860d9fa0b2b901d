"""Programs made of functions: their pages, and the status they end with."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codellama.command import run_command
from codellama.errors import CheckpointError
from tests.support.pages import check_looks, check_page, examples_of

ROOT = Path(__file__).parents[1]


def greet(name: str, *, greeting: str = "hello", times: int = 1, loud: bool = False) -> None:
    """Greet somebody.

    This takes a second paragraph, which is long enough to be wrapped when it is printed, since it has many words.

    Args:
        name: of whom to greet.
        greeting (WORD): what is said before the name, which may be a long word or even several words, as one likes
            to say it.
        times: how often.
        loud: with an exclamation mark.

    Examples:
        prog greet you
        prog greet "you all" --greeting welcome --times 3
    """
    sys.stdout.write(f"{greeting} {name}{'!' * loud}\n" * times)


def leave(name: str, *, greeting: str = "bye") -> None:
    """Say good-bye.

    Args:
        greeting (WORD): the word of parting.

    Examples:
        prog leave you
    """
    sys.stdout.write(f"{greeting} {name}\n")


PROGRAM = {"greet": greet, "leave": leave}
PAGE = """\
Greet somebody.

This takes a second paragraph, which is long enough to be wrapped when it is
printed, since it has many words.

Usage: prog greet NAME [flags]

Words:
  NAME  of whom to greet

Flags:
  --greeting WORD  what is said before the name, which may be a long word or
                   even several words, as one likes to say it (default: hello)
  --times N        how often (default: 1)
  --loud           with an exclamation mark (a switch; default: off)
  --help, -h       print this text

Examples:
  prog greet you
  prog greet "you all" --greeting welcome --times 3
"""
OVERVIEW = """\
Greets.

Usage: prog COMMAND [flags]

Commands:
  greet  Greet somebody
  leave  Say good-bye

Flags:
  --version   print the version
  --help, -h  print this text

Examples:
  prog greet you
  prog leave you

prog COMMAND --help explains a command and its flags.
"""


def run(*words: str) -> None:
    run_command(PROGRAM, "prog", about="Greets.", version="1.2", words=words)


@pytest.mark.parametrize("words", [["greet", "--help"], ["greet", "-h"], ["greet", "--tims", "-h"], ["help", "greet"]])
def test_the_page_of_a_command(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    run(*words)
    assert capsys.readouterr() == (PAGE, "")
    check_page(PAGE, greet)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_page_of_a_program(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    run(*words)
    assert capsys.readouterr() == (OVERVIEW, "")
    check_looks(OVERVIEW)
    assert examples_of(OVERVIEW) == ["prog greet you", "prog leave you"]


def test_an_explanation_is_the_functions_own_or_the_first_ones(capsys: pytest.CaptureFixture[str]) -> None:
    run("leave", "--help")
    page = capsys.readouterr().out
    assert "  NAME  of whom to greet\n" in page
    assert "  --greeting WORD  the word of parting (default: bye)\n" in page


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    run("--version")
    assert capsys.readouterr() == ("prog 1.2\n", "")


def test_a_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run("greet", "you", "--times=2", "--loud")
    assert capsys.readouterr().out == "hello you!\nhello you!\n"
    run("leave", "--", "--help")
    assert capsys.readouterr().out == "bye --help\n"


def test_one_function_is_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(greet, "greet.py", words=["you"])
    assert capsys.readouterr().out == "hello you\n"
    run_command(leave_alone, "leave.py", words=["--help"])
    assert capsys.readouterr().out.startswith("Say nothing.\n\nUsage: leave.py [flags]\n\nFlags:\n  --help, -h")


def leave_alone() -> None:
    """Say nothing."""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["great", "you"], "great is no command of prog; did you mean greet?\nSee prog --help."),
        (["--verison"], "--verison is no command of prog; did you mean --version?\nSee prog --help."),
        (["dance"], "dance is no command of prog; the commands are greet, leave\nSee prog --help."),
        (["help", "leaf"], "leaf is no command of prog; did you mean leave?\nSee prog --help."),
        (
            ["leave", "you", "--greting", "x"],
            "--greting is no flag of prog leave; did you mean --greeting?\nSee prog leave --help.",
        ),
    ],
)
def test_a_misspelling_ends_with_2(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"{message}\n")


def test_one_rank_of_a_host_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    run("greet", "--help")
    with pytest.raises(SystemExit) as caught:
        run("great")
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "")


def raises(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("weights are wrong"), "prog: weights are wrong"),
        (ValueError("a value is wrong"), "prog: a value is wrong"),
        (FileNotFoundError(2, "No such file", "x"), "prog: [Errno 2] No such file: 'x'"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_a_status_and_a_line(error: BaseException, code: object) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(raises(error), "prog", words=[])
    assert caught.value.code == code


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(KeyError):
        run_command(raises(KeyError("x")), "prog", words=[])


def process(body: str, **options: Any) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, "-c", f"from codellama import run_command\n{textwrap.dedent(body)}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip


@pytest.mark.parametrize("flush", [True, False])
def test_a_closed_pipe_is_quiet(flush: bool) -> None:
    """Also where the text is still buffered when the function returns."""
    body = f"""
        import sys
        def f():
            sys.stdin.read()
            print("x", flush={flush})
        run_command(f, "prog", words=[])
    """
    running = process(body, stdin=subprocess.PIPE)
    assert running.stdout is not None
    running.stdout.close()
    running.stdout = None
    _, err = running.communicate("", timeout=60)
    assert (running.returncode, err) == (0, "")


def test_an_error_of_ours_ends_a_process_with_1() -> None:
    body = """
        def f():
            raise ValueError("wrong")
        run_command(f, "prog", words=[])
    """
    running = process(body)
    assert (*running.communicate(timeout=60), running.returncode) == ("", "prog: wrong\n", 1)
