"""The command: who answers, what is refused, and what the page is told."""

import inspect
import sys
from typing import Any

import pytest

from codellama import cli, printing
from codellama.chat import screen, web
from codellama.chat.rich_screen import RichScreen
from codellama.llama import Llama


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["codellama", "chat", *words])
    cli.main()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the page is opened with."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(web.open_page)  # what the page itself takes
    monkeypatch.setattr(
        web, "open_page", lambda *given, **named: calls.append(dict(signature.bind(*given, **named).arguments))
    )
    return calls


def test_the_page_is_told_what_to_serve(monkeypatch: pytest.MonkeyPatch, opened: list[dict[str, Any]]) -> None:
    run(monkeypatch, "--web")
    run(
        monkeypatch, "--web", "--ckpt_dir", "weights", "--max_seq_len", "4096", "--seed", "1", "--dtype", "float32",
        "--port", "9000", "--no-browser",
    )  # fmt: skip
    run(monkeypatch, "--web", "--base_url", "http://127.0.0.1:1/v1", "--api_key_file", "key")
    flags = {"ckpt_dir": "weights", "max_seq_len": 4096, "seed": 1, "dtype": "float32"}
    assert opened == [
        {"base_url": None, "api_key_file": None, "flags": {}, "port": 8501, "headless": False},
        {"base_url": None, "api_key_file": None, "flags": flags, "port": 9000, "headless": True},
        {"base_url": "http://127.0.0.1:1/v1", "api_key_file": "key", "flags": {}, "port": 8501, "headless": False},
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--web", "--prompt", "x"], "--prompt is set in the page itself"),
        (["--web", "a.txt"], "FILE is set in the page itself"),
        (["--web", "--temperature", "0"], "--temperature is set in the page itself"),
        (["--base_url", "http://x/v1", "--ckpt_dir", "y"], "--ckpt_dir loads a model here, but with --base_url"),
        (["--base_url", "http://x/v1", "--max_seq_len", "9"], "--max_seq_len loads a model here"),
        (["--api_key_file", "key"], "--api_key_file is about the server of a --base_url"),
        (["--port", "1"], "--port is about the page; give --web, too"),
        (["--no-browser"], "--no-browser is about the page"),
        (["--base_url", "x", "--prompt", "y"], "base_url is 'x'; an address such as"),
        (["--base_url", "http://x/v1", "--api_key_file", "/nowhere/key", "--prompt", "y"], "No such file"),
        (["--prompt", "x", "--max_gen_len", "-1"], "max_gen_len is -1"),
        (["--prompt", " "], "the question is empty"),
        (["--prompt", "", "--base_url", "http://x/v1"], "the question is empty"),
    ],
)
def test_a_flag_without_effect_is_refused(
    monkeypatch: pytest.MonkeyPatch, opened: list[dict[str, Any]], words: list[str], message: str
) -> None:
    monkeypatch.setattr(Llama, "build", lambda *_, **__: pytest.fail("something was loaded"))
    with pytest.raises(SystemExit, match=f"codellama: .*{message}"):
        run(monkeypatch, *words)
    assert opened == []


@pytest.mark.parametrize("flags", [("--web",), ("--base_url", "http://127.0.0.1:1/v1")])
def test_one_process_asks_a_server(
    monkeypatch: pytest.MonkeyPatch, opened: list[dict[str, Any]], flags: tuple[str, ...]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=f"{flags[0]} takes one process"):
        run(monkeypatch, *flags, "--prompt", "x")
    assert opened == []


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "codellama.chat.remote", raising=False)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(SystemExit, match=r"httpx2 is not installed; --base_url needs pip install 'codellama\[chat\]'"):
        run(monkeypatch, "--base_url", "http://127.0.0.1:1/v1", "--prompt", "x")


@pytest.mark.parametrize(
    ("term", "is_terminal", "installed", "rich"),
    [
        ("xterm", True, True, True),
        ("dumb", True, True, False),
        ("xterm", False, True, False),
        ("xterm", True, False, False),
    ],
)
def test_the_screen_is_what_the_terminal_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, term: str, is_terminal: bool, installed: bool, rich: bool
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal, raising=False)
    if not installed:
        monkeypatch.setattr(screen, "_RICH", ("rich", "a_package_that_nobody_has"))
    assert isinstance(screen.choose_screen(alone=True), RichScreen) == rich


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_a_terminal_would_obey_is_no_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    """The answer to one question is shown like those of a chat; a pipe gets it as it is."""
    obeyed = "a\x1b[2J\tb\r\n한글\x9b"
    harmless = "a\N{REPLACEMENT CHARACTER}[2J\tb\n한글\N{REPLACEMENT CHARACTER}"
    assert printing.without_controls(obeyed) == harmless
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    for pieces in ([obeyed, "b"], ["b", obeyed]):
        printing.show(iter(pieces), is_first=True)
        shown = "".join(harmless if is_terminal and piece == obeyed else piece for piece in pieces)
        assert capsys.readouterr().out == f"{shown}\n"


def test_where_the_history_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    for state, folder in (("/s", "/s"), ("", "/home/x/.local/state"), ("relative", "/home/x/.local/state")):
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert str(screen.history_file()) == f"{folder}/codellama/history"
