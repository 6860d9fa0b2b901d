"""What starts the page: values are checked first, and nothing is left behind however it ends."""

import signal
import socket
from pathlib import Path

import httpx2
import pytest

from codellama.chat import web
from codellama.chat.web import open_page
from codellama.errors import CodeLlamaError
from tests.support.endpoint import serving_endpoint
from tests.support.launching import Launched, runs
from tests.support.serving import wait_until

URL = "http://127.0.0.1:1/v1"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"base_url": "127.0.0.1:8000"}, "an address such as http"),
        ({"base_url": "file:///x"}, "an address such as http"),
        ({"base_url": "http://me:secret@host/v1"}, "a key belongs into --api_key_file"),
        ({"base_url": URL, "flags": {"ckpt_dir": "x", "seed": None}}, "--ckpt_dir is for a server of our own"),
        ({"base_url": URL, "port": 70_000}, "port is 70000"),
    ],
)
def test_wrong_values(arguments: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        open_page(**arguments)  # type: ignore[arg-type]
    assert "secret@" not in str(caught.value)


def test_wrong_keys(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_page(URL, str(tmp_path / "none"))
    (tmp_path / "empty").write_text("\nkey")
    with pytest.raises(ValueError, match=r"the first line of .* is empty"):
        open_page(URL, str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("base_url", "ours", "expected"), [(URL, None, "theirs"), (URL, "ours", "ours"), (None, None, None)]
)
def test_the_page_brings_the_key_that_the_terminal_brings(
    monkeypatch: pytest.MonkeyPatch, base_url: str | None, ours: str | None, expected: str | None
) -> None:
    class Started(Exception):
        pass

    def start(name: str, words: list[str], environment: dict[str, str]) -> None:
        assert environment.get("CODELLAMA_API_KEY") == expected
        raise Started

    monkeypatch.setattr(web, "Child", start)
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    monkeypatch.delenv("CODELLAMA_API_KEY", raising=False)
    if ours is not None:
        monkeypatch.setenv("CODELLAMA_API_KEY", ours)
    with pytest.raises(Started):
        open_page(base_url, headless=True)


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CodeLlamaError, match="with its --base_url"):
        open_page(URL)


def test_a_port_that_is_taken_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a model was loaded for nothing, and a browser was opened on whatever is there."""
    monkeypatch.setattr(web, "Child", lambda *_: pytest.fail("something was started"))
    with socket.create_server((web.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CodeLlamaError, match=f"cannot listen on port {port} .*--port chooses another one"):
            open_page(port=port, headless=True)


def test_a_server_that_does_not_start_is_told() -> None:
    with Launched(flags={"max_seq_len": 0}) as launched:
        assert launched.process.wait(60) == 1
    assert "max_seq_len" in launched.told
    assert "failed: the server ended by itself, with status 1" in launched.told


def test_the_key_is_on_no_command_line_and_a_killed_page_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a-secret-key\n")
    with (
        serving_endpoint() as endpoint,
        Launched(base_url=endpoint.url, api_key_file=str(tmp_path / "key")) as launched,
    ):
        page, server = launched.ready()
        assert server == endpoint.url
        assert httpx2.get(page, trust_env=False).status_code == 200
        (child,) = launched.children
        command, environment = (Path(f"/proc/{child}/{name}").read_text() for name in ("cmdline", "environ"))
        assert "a-secret-key" not in command
        assert {"CODELLAMA_API_KEY=a-secret-key", f"CODELLAMA_BASE_URL={endpoint.url}"} <= set(environment.split("\0"))
        assert "--browser.gatherUsageStats=false" in command
        assert launched.end(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: not runs(child), 20)
