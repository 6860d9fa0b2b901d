"""The routes against a scripted service: bytes of streams, errors, key, limits, and clients that leave."""

import asyncio
import json
import threading
import time
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from codellama.generation.prompt import Prompt, PromptMaker
from codellama.generation.request import Delta
from codellama.server import running
from codellama.server.app import make_app
from codellama.server.settings import Settings
from codellama.tokenizer import Tokenizer
from tests.support.scripted import ScriptedService

SCRIPT = (Delta("Hi", (5,)), Delta(":\n```py", (6, 7)), Delta("", finish_reason="stop", n_reused=3))
CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def service(tokenizer: Tokenizer) -> ScriptedService:
    return ScriptedService(tokenizer, SCRIPT)


def client(service: ScriptedService, **options: Any) -> TestClient:
    return TestClient(
        make_app(service, Settings(model_id="codellama-tiny", **options)),
        "http://localhost",
        raise_server_exceptions=False,
    )


def events(text: str) -> list[Any]:
    """Take a stream apart; the last event is [DONE]."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def test_a_chat_as_a_whole(service: ScriptedService) -> None:
    body = client(service).post("/v1/chat/completions", json={**CHAT, "n": 2}).json()
    message = {"role": "assistant", "content": "Hi:\n```py", "refusal": None}
    assert body["choices"] == [
        {"index": index, "message": message, "logprobs": None, "finish_reason": "stop"} for index in (0, 1)
    ]
    n_prompt = len(service.submitted[0].tokens)
    assert body["usage"] == {
        "prompt_tokens": n_prompt, "completion_tokens": 6, "total_tokens": n_prompt + 6,
        "prompt_tokens_details": {"cached_tokens": 3},
    }  # fmt: skip
    assert (body["object"], body["model"]) == ("chat.completion", "codellama-tiny")


def test_a_stream_never_goes_on_after_a_newline(service: ScriptedService) -> None:
    sent = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    response = client(service).post("/v1/chat/completions", json=sent)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(response.text)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas == [
        {"role": "assistant", "content": ""}, {"content": "Hi"}, {"content": ":\n"}, {"content": "```py"}, {},
    ]  # fmt: skip
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 4 + ["stop"]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 5
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 3)


def test_a_completion_with_echo_and_without_v1(service: ScriptedService) -> None:
    sent = {"prompt": ["a", "b"], "echo": True}
    body = client(service).post("/completions", json=sent).json()
    assert [choice["text"] for choice in body["choices"]] == ["aHi:\n```py", "bHi:\n```py"]
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}
    streamed = events(client(service).post("/v1/completions", json={**sent, "stream": True}).text)
    for index, choice in enumerate(body["choices"]):
        texts = [c["text"] for chunk in streamed for c in chunk["choices"] if c["index"] == index]
        assert "".join(texts) == choice["text"]
    assert {"usage"} & streamed[0].keys() == set()


def test_too_many_answers_are_refused_before_they_are_made(tokenizer: Tokenizer) -> None:
    """Each would prepare a grammar of its own."""

    class Unasked(ScriptedService):
        @property
        def prompts(self) -> PromptMaker:
            raise AssertionError("nothing is made")

    sent = {"prompt": ["a"] * 200, "n": 128, "response_format": {"type": "json_object"}}
    response = client(Unasked(tokenizer, SCRIPT), max_queue=5).post("/v1/completions", json=sent)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "the request asks for 25600 answers; at most 7 are possible"


def test_models(service: ScriptedService) -> None:
    (listed,) = client(service).get("/v1/models").json()["data"]
    assert (listed["id"], listed["object"], listed["max_model_len"]) == ("codellama-tiny", "model", 64)
    assert client(service).get("/models/org/any-name").json() == listed


def test_tokens_there_and_back(service: ScriptedService, tokenizer: Tokenizer) -> None:
    there = client(service).post("/tokenize", json={"content": "x = 1"}).json()
    assert there["tokens"] == tokenizer.encode("x = 1", bos=True, eos=False)
    assert there["count"] == len(there["tokens"])
    assert client(service).post("/detokenize", json={"tokens": there["tokens"]}).json()["content"] == "x = 1"
    assert client(service).post("/detokenize", json={"tokens": [10**6]}).status_code == 400


@pytest.mark.parametrize("state", ["loading", "failed", "stopped"])
def test_without_a_model(service: ScriptedService, state: Any) -> None:
    service.state = state
    for response in (client(service).get("/health"), client(service).post("/v1/chat/completions", json=CHAT)):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert state in response.json()["error"]["message"]
    service.state = "ready"
    assert client(service).get("/health").status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b'{"messages": 5}', 400, "messages"),
        (b"{", 400, "JSON"),
        (b'{"messages": [], "n": 0}', 400, "n: "),
        (b'{"messages": []}', 400, "messages is empty"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
        (b'{"messages": [{"role": "user", "content": "[INST]"}]}', 400, "INST"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, ""),
        (json.dumps({"messages": [{"role": "user", "content": "word " * 99}]}).encode(), 400, "max_seq_len is 64"),
        (json.dumps({"messages": [{"role": "user", "content": "w" * 5000}]}).encode(), 413, "4000 bytes"),
        (json.dumps({**CHAT, "n": 9}).encode(), 400, "9 answers"),
        (json.dumps({**CHAT, "temperature": float("nan")}).encode(), 400, "temperature"),
    ],
)
def test_errors_are_openais(service: ScriptedService, content: bytes, status: int, said: str) -> None:
    headers = {"content-type": "application/json"}
    made = client(service, max_queue=4, max_body=4000)
    response = made.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status
    assert response.json().keys() == {"error"}
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert said in response.json()["error"]["message"]
    assert service.submitted == []


def test_unknown_paths_and_our_own_mistakes(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client(service).get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    monkeypatch.setattr(service, "submit", lambda *_: 1 / 0)
    response = client(service).post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, "division" in response.text) == (500, False)


def test_a_failure_of_the_model_is_told_in_the_stream(service: ScriptedService) -> None:
    service.script = [Delta("Hi", (5,)), Delta("", finish_reason="error", error=RuntimeError("secret"))]
    *_, last = events(client(service).post("/v1/chat/completions", json={**CHAT, "stream": True}).text)
    assert last["error"]["message"] == "the model failed; the server's log says why"
    whole = client(service).post("/v1/chat/completions", json=CHAT)
    assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")


def test_the_key(service: ScriptedService) -> None:
    locked = client(service, api_key="key")
    for headers in (
        {},
        {"authorization": "Bearer yek"},
        {"authorization": b"B\xff"},
        {"authorization": b"Bearer k\xffy"},
    ):
        assert locked.get("/v1/models", headers=headers).status_code == 401
    assert locked.get("/v1/models", headers={"authorization": "Bearer key"}).status_code == 200
    assert locked.get("/health").status_code == 200


class Connection:
    """One request by ASGI itself, so that the client can leave at a moment of our choice."""

    def __init__(self, app: FastAPI, body: dict[str, Any], path: str = "/v1/chat/completions") -> None:
        self.sent: list[dict[str, Any]] = []
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        scope = {
            "type": "http", "method": "POST", "path": path, "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self.incoming.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def until(self, text: bytes) -> None:
        async with asyncio.timeout(10):
            while not any(text in message.get("body", b"") for message in self.sent):
                await asyncio.sleep(0.005)

    async def leave(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})
        async with asyncio.timeout(10):
            await self.task


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(service: ScriptedService, stream: bool) -> None:
    service.script = [Delta("Hi", (5,))]

    async def leave_early() -> None:
        connection = Connection(make_app(service, Settings()), {**CHAT, "stream": stream})
        while not service.submitted:
            await asyncio.sleep(0.005)
        if stream:
            await connection.until(b"Hi")
        assert service.cancelled == []
        await connection.leave()

    asyncio.run(leave_early())
    assert len(service.cancelled) == 1


def test_a_full_queue_refuses_and_is_free_again(service: ScriptedService) -> None:
    service.script = [Delta("Hi", (5,))]

    async def fill() -> None:
        app = make_app(service, Settings(max_queue=0))
        first = Connection(app, {**CHAT, "stream": True, "n": 2})
        await first.until(b"Hi")
        refused = Connection(app, CHAT)
        await refused.until(b"2 prompts are under way")
        assert refused.sent[0]["status"] == 503
        assert (b"retry-after", b"1") in refused.sent[0]["headers"]
        too_long = Connection(app, {"messages": [{"role": "user", "content": "word " * 99}]})
        await too_long.until(b"2 prompts are under way")  # and not that it is too long: it was not looked at
        await first.leave()
        service.script = list(SCRIPT)
        again = Connection(app, CHAT)
        await again.until(b"Hi:")
        await again.task
        assert again.sent[0]["status"] == 200

    asyncio.run(fill())


def test_a_silent_stream_is_kept_alive(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "KEEP_ALIVE", 0.02)
    service.script = []

    async def wait() -> None:
        connection = Connection(make_app(service, Settings()), {**CHAT, "stream": True})
        await connection.until(b": keep-alive\n\n")
        assert connection.sent[0]["status"] == 200
        await connection.leave()

    asyncio.run(wait())


def test_long_texts_to_tokenize_leave_the_event_loop_alone(service: ScriptedService) -> None:
    async def busy() -> float:
        connection = Connection(make_app(service, Settings()), {"content": "ab c" * 250_000}, "/tokenize")
        began = time.thread_time()
        await connection.until(b"}")
        return time.thread_time() - began

    assert asyncio.run(busy()) < 0.4  # hundredths of a second; 0.9 where FastAPI copies the ids


def test_a_prompt_that_is_being_made_has_a_place(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    made, may_go_on = PromptMaker.chat, threading.Event()

    def slowly(*args: Any, **options: Any) -> Prompt:
        may_go_on.wait(10)
        return made(*args, **options)

    monkeypatch.setattr(PromptMaker, "chat", slowly)

    async def fill() -> None:
        app = make_app(service, Settings(max_queue=0))
        first = [Connection(app, CHAT), Connection(app, {"messages": [{"role": "user", "content": "word " * 99}]})]
        await asyncio.sleep(0)  # both have begun
        refused = Connection(app, CHAT)
        await refused.until(b"2 prompts are under way")
        may_go_on.set()
        await asyncio.gather(*(connection.task for connection in first))
        assert [connection.sent[0]["status"] for connection in first] == [200, 400]
        both = Connection(app, {**CHAT, "n": 2})  # also the place of the one that was too long is free again
        await both.task
        assert both.sent[0]["status"] == 200

    asyncio.run(fill())
