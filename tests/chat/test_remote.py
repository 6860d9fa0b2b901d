"""Chats with a server: what is sent, and every way in which an answer can come or fail to."""

import socket
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from codellama import cli
from codellama.chat.dialogue import Conversation, Settings
from codellama.chat.model import TooLongError
from codellama.chat.remote import RemoteError, RemoteModel, events, find_key
from codellama.chat.terminal import Terminal
from tests.support.chat_server import ChatServer, sse
from tests.support.scripted_chat import ScriptedScreen
from tests.support.serving import Serving

DIALOG: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "안녕?"}]
GREEDY = Settings(temperature=0)
HANGUL = "한글은 글자마다 세 바이트다 👩‍💻\u2028\x85끝"


def ask(server: ChatServer, settings: Settings = GREEDY, **options: Any) -> list[str]:
    model = RemoteModel(server.url, **options)
    try:
        return list(model.stream(DIALOG, settings))
    finally:
        model.end()


def test_what_is_sent() -> None:
    with ChatServer((200, sse("a", "b")), (200, sse("c"))) as server:
        assert ask(server) == ["a", "b"]
        assert ask(server, Settings(top_p=0.5, max_gen_len=9, seed=4), key="secret", name="second") == ["c"]
    first, second = server.bodies()
    common = {"messages": DIALOG, "stream": True}
    assert first == common | {"model": "first", "temperature": 0, "top_p": 0.95}
    assert second == common | {"model": "second", "temperature": 0.2, "top_p": 0.5, "max_tokens": 9, "seed": 4}
    assert [headers.get("Authorization") for _, headers, _ in server.asked] == [None] * 2 + ["Bearer secret"] * 2
    assert {path for path, _, _ in server.asked} == {"/v1/models", "/v1/chat/completions"}


def test_hangul_stays_whole_however_its_bytes_are_cut() -> None:
    whole = b"".join([b": a comment\n\n", *sse(HANGUL)]).replace(b"\n\n", b"\r\n\r\n")
    for size in (1, 2, 5):
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        texts = [choice["delta"].get("content") for event in events(pieces) for choice in event["choices"]]
        assert texts == [HANGUL, None]
    with ChatServer((200, [bytes([byte]) for byte in whole])) as server:
        assert ask(server) == [HANGUL]


def test_a_real_server_answers_like_its_model(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    serving = Serving()
    with serving as client:
        client.close()
        url = f"http://127.0.0.1:{serving.port}/v1"
        model = RemoteModel(url)
        assert model.context == 2048
        pieces = list(model.stream(DIALOG, Settings(temperature=0, max_gen_len=24)))
        assert serving.parts is not None
        exact = len(serving.parts.prompts.chat(DIALOG, serving.service.requests[0].params).tokens)
        assert exact <= (model.count(DIALOG) or 0) <= exact + 20
        with pytest.raises(TooLongError):
            list(model.stream([{"role": "user", "content": "x " * 3000}], GREEDY))
        with pytest.raises(RemoteError, match="contains"):
            list(model.stream([{"role": "user", "content": "[INST]"}], GREEDY))
        model.end()
        words = ["chat", "--base_url", url, "--prompt", "안녕?", "--system", "be brief", "--max_gen_len", "24"]
        monkeypatch.setattr(sys, "argv", ["codellama", *words, "--temperature", "0"])
        cli.main()
        monkeypatch.setattr(sys, "argv", ["codellama", "chat", "--base_url", url, "--prompt", "[INST]"])
        with pytest.raises(SystemExit, match=r"codellama: .*status 400: .*contains \[INST\]"):
            cli.main()
    assert len(pieces) > 1
    assert capsys.readouterr().out == "".join(pieces) + "\n"


@pytest.mark.parametrize(
    ("status", "pieces", "kind", "message"),
    [
        (400, [b'{"error": {"message": "no", "code": "context_length_exceeded"}}'], TooLongError, "no"),
        (400, [b'{"error": {"message": "maximum context length is 5"}}'], TooLongError, "is 5"),
        (400, [b'{"error": {"message": "bad role"}}'], RemoteError, "status 400: bad role"),
        (401, [b'{"error": {"message": "who?"}}'], RemoteError, "who.*--api_key_file.*OPENAI_API_KEY"),
        (500, [b"<html>"], RemoteError, "status 500: '<html>'"),
        (503, [b'{"error": "loading"}'], RemoteError, "status 503: 'loading'"),
        (200, [*sse("a")[:1], b'data: {"error": {"message": "a rank died"}}\n'], RemoteError, "broke off: a rank died"),
        (200, sse("a")[:1], RemoteError, "closed the connection before its end"),
        (200, [b"data: {oops\n"], RemoteError, "which is no JSON"),
        (200, [b"data: 3\n"], RemoteError, "an object was expected"),
        (200, [b'data: {"choices": 3}\n'], RemoteError, "choices with texts were expected"),
        (200, [b'data: {"choices": ["a"]}\n'], RemoteError, "choices with texts were expected"),
        (200, [b'data: {"choices": [{"delta": {"content": 3}}]}\n'], RemoteError, "choices with texts were expected"),
    ],
)
def test_a_failure_says_what_it_is(status: int, pieces: list[bytes], kind: type[Exception], message: str) -> None:
    with ChatServer((status, pieces)) as server, pytest.raises(kind, match=message):
        ask(server)


def test_an_event_without_choices_is_passed_over() -> None:
    with ChatServer((200, [b'data: {"choices": null}\n\n', *sse("a")])) as server:
        assert ask(server) == ["a"]


@pytest.mark.parametrize("reply", [b"<html>", b"[]", b"{}"])
def test_a_server_that_has_something_else_at_tokenize(monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
    with ChatServer(context=100) as server:
        model = RemoteModel(server.url)
        monkeypatch.setattr(model._client, "post", lambda *_, **__: httpx2.Response(200, content=reply))
        assert model.count(DIALOG) is None
        assert model.context is None
        model.end()


def test_leaving_ends_the_answer() -> None:
    with ChatServer((200, [*sse("a")[:1], *([b": still there\n\n", 0.02] * 500)])) as server:
        model = RemoteModel(server.url)
        pieces = model.stream(DIALOG, GREEDY)
        assert next(pieces) == "a"
        pieces.close()
        assert server.gone.wait(5)
        model.end()


def test_old_turns_are_left_out_by_the_servers_count() -> None:
    long = "x" * 10
    with ChatServer(*[(200, sse("ok"))] * 3, context=100) as server:
        screen = ScriptedScreen(*[long] * 3)
        Terminal(Conversation(), RemoteModel(server.url), screen).run()
        assert [len(body["messages"]) for body in server.bodies()] == [1, 3, 3]
        assert screen.answers == ["ok"] * 3
        assert len(screen.warned) == 1
        asked = [{"model": "first", "prompt": text, "content": text} for text in (long, "ok")]
        assert server.bodies("/tokenize") == asked  # in the words of vLLM and of llama.cpp, and each text once


def test_a_server_that_cannot_count() -> None:
    with ChatServer(context=None) as server:
        server.models["data"][0]["max_model_len"] = 100
        model = RemoteModel(server.url)
        assert model.count(DIALOG) is None
        assert model.count(DIALOG) is None
        assert len(server.bodies("/tokenize")) == 1
        model.end()


@pytest.mark.parametrize(
    ("status", "models", "name", "message"),
    [
        (200, {"data": [{"id": "a"}]}, "b", "has no model 'b'; it has a"),
        (200, {"data": []}, None, "has no model"),
        (200, {"models": []}, None, "does the address end with /v1"),
        (200, {"data": [{"name": "a"}]}, None, "does the address end with /v1"),
        (404, {}, None, "status 404"),
    ],
)
def test_a_server_without_such_a_model(status: int, models: Any, name: str | None, message: str) -> None:
    with ChatServer() as server:
        server.models, server.models_status = models, status
        with pytest.raises(RemoteError, match=message):
            RemoteModel(server.url, name=name)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setattr(
        sys, "argv", ["codellama", "chat", "--base_url", f"http://127.0.0.1:{port}/v1", "--prompt", "x"]
    )
    with pytest.raises(SystemExit, match=r"codellama: nobody answers at .*; codellama serve starts a server"):
        cli.main()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x/v1", "http:///v1"])
def test_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="an address such as"):
        RemoteModel(url)


def test_where_the_key_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CODELLAMA_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert find_key(None) is None
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    assert find_key(None) == "theirs"
    monkeypatch.setenv("CODELLAMA_API_KEY", "ours")
    assert find_key(None) == "ours"
    file = tmp_path / "key"
    file.write_text(" filed \nmore\n")
    assert find_key(str(file)) == "filed"
    file.write_text("\nfiled\n")
    with pytest.raises(ValueError, match="is empty; a key was expected"):
        find_key(str(file))


def test_a_key_that_no_request_can_bring_is_told_and_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("Schlüssel")
    with pytest.raises(ValueError, match=r"the first line of .*key holds a letter that no request can bring") as told:
        find_key(str(tmp_path / "key"))
    assert "Schl" not in str(told.value)
    monkeypatch.setenv("CODELLAMA_API_KEY", "a\nb")
    with pytest.raises(ValueError, match=r"^CODELLAMA_API_KEY holds a letter"):
        find_key(None)
    monkeypatch.setenv("CODELLAMA_API_KEY", " ours\n")
    assert find_key(None) == "ours"


def test_a_proxy_is_not_asked_about_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with ChatServer((200, sse("a"))) as server:
        assert ask(server) == ["a"]
