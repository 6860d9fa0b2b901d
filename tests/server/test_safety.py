"""The hook in the server: what it refuses is in no byte that is sent, and nobody waits for it but who must."""

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from starlette.testclient import TestClient

from codellama.assembly import assemble
from codellama.config import RuntimeArgs, SamplingParams
from codellama.generation.request import Delta
from codellama.prompts import Message
from codellama.safety import keyword_filter
from codellama.server import running
from codellama.server.app import make_app
from codellama.server.safety import SafeService
from codellama.server.service import EngineService
from codellama.server.settings import Settings
from codellama.tokenizer import Tokenizer
from tests.server.test_app import Connection, events
from tests.support.scripted import ScriptedService
from tests.test_safety import Recorder

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
SECRET = keyword_filter(["secret"], "Not\nhere.")
WORDS = (
    Delta("One.\nTw", (5, 6)),
    Delta("o. A ", (7,)),
    Delta("sec", (8,)),
    Delta("ret", (9,)),
    Delta(".\nMore", (10,)),
)


@pytest.fixture
def service(tokenizer: Tokenizer) -> ScriptedService:
    return ScriptedService(tokenizer, WORDS)


def client(service: Any, hook: Any) -> TestClient:
    return TestClient(make_app(service, Settings(safety=hook)), "http://localhost", raise_server_exceptions=False)


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_refused_prompt_is_not_run(service: ScriptedService, stream: bool, kind: str) -> None:
    if kind == "chat":
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": "my secret"}]}
    else:
        path, body = "/v1/completions", {"prompt": "my secret", "echo": True}
    response = client(service, SECRET).post(path, json={**body, "stream": stream})
    assert (response.status_code, "secret" in response.text, service.submitted) == (200, False, [])
    if not stream:
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "content_filter"
        if kind == "chat":
            assert choice["message"] == {"role": "assistant", "content": "Not\nhere.", "refusal": "Not\nhere."}
        else:
            assert (choice["text"], choice["refusal"]) == ("", "Not\nhere.")
        assert response.json()["usage"]["completion_tokens"] == 0
        return
    choices = [chunk["choices"][0] for chunk in events(response.text)]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["content_filter"]
    if kind == "chat":
        assert [choice["delta"] for choice in choices] == [
            {"role": "assistant", "content": ""}, {"refusal": "Not\nhere."}, {"content": "Not\n"}, {"content": "here."},
            {},
        ]  # fmt: skip
    else:
        assert [(choice["text"], choice["refusal"]) for choice in choices] == [("", "Not\nhere.")]


def test_a_stream_ends_before_the_refused_sentence(service: ScriptedService) -> None:
    """The script has no end: the answer ends because it is refused, and its generation is cancelled."""
    sent = {**CHAT, "stream": True, "logprobs": True}
    response = client(service, SECRET).post("/v1/chat/completions", json=sent)
    deltas = [chunk["choices"][0]["delta"] for chunk in events(response.text)]
    content = "".join(delta.get("content", "") for delta in deltas)
    shown = content.removesuffix("Not\nhere.").removesuffix("\n")
    assert shown in ("", "One.", "One.\nTwo. "), "as much as was read before the generation had come to the word"
    assert "sec" not in response.text
    assert sum("refusal" in delta for delta in deltas) == 1
    assert len(service.cancelled) == 2, "when it was refused, and once more when the response was done"


def test_a_hook_that_keeps_up_reads_every_sentence(service: ScriptedService) -> None:
    read = threading.Semaphore(0)

    def check(messages: Sequence[Message]) -> str | None:
        if messages[-1]["role"] == "assistant":
            read.release()
        return SECRET(messages)

    def submit(prompt: Any, on_delta: Any) -> Any:
        def run() -> None:
            for delta in WORDS:
                on_delta(delta)
                if delta in WORDS[:2]:
                    assert read.acquire(timeout=20)

        threading.Thread(target=run, daemon=True).start()

    service.submit = submit  # type: ignore[method-assign]
    response = client(service, check).post("/v1/chat/completions", json={**CHAT, "stream": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in events(response.text)]
    assert deltas[1:] == [
        {"content": "One.\n"}, {"content": "Two. "}, {"refusal": "Not\nhere."}, {"content": "\n"}, {"content": "Not\n"},
        {"content": "here."}, {},
    ]  # fmt: skip


def test_a_whole_answer_that_is_refused_is_nowhere(service: ScriptedService) -> None:
    service.script = [*WORDS, Delta("", finish_reason="stop")]
    hook = Recorder(lambda text: "secret" in text)
    made = client(service, hook)
    response = made.post("/v1/chat/completions", json={**CHAT, "logprobs": True})
    (choice,) = response.json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("No.", "content_filter")
    assert choice["logprobs"]["content"] == []
    assert "One" not in response.text
    assert hook.answers == ["One.\nTwo. A secret.\nMore"], "asked once"
    response = made.post("/v1/completions", json={"prompt": "def", "suffix": "end", "echo": True})
    assert [choice[key] for choice in response.json()["choices"] for key in ("text", "refusal")] == ["", "No."]
    assert hook.asked[2] == [{"role": "user", "content": "defend"}]


def test_what_is_allowed_is_unchanged(service: ScriptedService) -> None:
    service.script = [*WORDS, Delta("", finish_reason="stop")]
    for path, body in {"/v1/chat/completions": CHAT, "/v1/completions": {"prompt": "a", "echo": True, "n": 2}}.items():
        free = client(service, None).post(path, json=body).json()["choices"]
        assert client(service, Recorder()).post(path, json=body).json()["choices"] == free
        streamed = events(client(service, Recorder()).post(path, json={**body, "stream": True}).text)
        for choice in free:
            pieces = [c for chunk in streamed for c in chunk["choices"] if c["index"] == choice["index"]]
            text = "".join(p["text"] if "text" in p else p["delta"].get("content", "") for p in pieces)
            assert text == (choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize("where", ["user", "assistant"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_hook_that_raises_lets_nothing_through(
    service: ScriptedService, stream: bool, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(messages: Sequence[Message]) -> None:
        if messages[-1]["role"] == where:
            raise ValueError(f"bad text: {messages}")

    service.script = [*WORDS, Delta("", finish_reason="stop")]
    with caplog.at_level(logging.DEBUG):
        response = client(service, fail).post("/v1/chat/completions", json={**CHAT, "stream": stream})
    error = events(response.text)[-1] if stream else response.json()
    assert response.status_code == (200 if stream else 500)
    assert error["error"]["message"] == "the safety check failed; the server's log says where"
    assert "One" not in response.text
    logged = [record for record in caplog.records if record.name == "codellama.server.safety"]
    assert "raised ValueError in fail, line" in logged[-1].getMessage()
    assert not any("hello" in record.getMessage() or record.exc_info for record in caplog.records)


def test_a_slow_hook_holds_up_nobody_else(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "KEEP_ALIVE", 0.02)
    service.script = [Delta("Hi.", (5,), finish_reason="stop")]
    busy, go_on = threading.Event(), threading.Event()

    def check(messages: Sequence[Message]) -> None:
        if messages[0]["content"] == "slow":
            busy.set()
            assert go_on.wait(20)

    async def meet() -> None:
        app = make_app(service, Settings(safety=check))
        slow = Connection(app, {"messages": [{"role": "user", "content": "slow"}], "stream": True})
        await asyncio.to_thread(busy.wait, 20)
        await slow.until(b": keep-alive")
        assert service.submitted == []
        quick = Connection(app, CHAT)
        await quick.until(b"Hi.")
        await quick.task
        go_on.set()
        await slow.until(b"[DONE]")
        await slow.task
        assert any(b"Hi." in message.get("body", b"") for message in slow.sent)

    asyncio.run(meet())


def test_a_client_that_leaves_while_the_hook_reads_starts_nothing(service: ScriptedService) -> None:
    busy, go_on = threading.Event(), threading.Event()

    def check(messages: Sequence[Message]) -> None:
        busy.set()
        assert go_on.wait(20)

    async def leave() -> None:
        connection = Connection(make_app(service, Settings(safety=check)), {**CHAT, "stream": True})
        await asyncio.to_thread(busy.wait, 20)
        await connection.leave()
        go_on.set()

    asyncio.run(leave())
    wait_until(lambda: not any(thread.name == "safety" for thread in threading.enumerate()))
    assert service.submitted == []


def test_a_hook_that_hangs_takes_no_more_than_its_places(service: ScriptedService) -> None:
    service.script = [Delta("Hi.", (5,), finish_reason="stop")]
    go_on = threading.Event()

    async def hang() -> None:
        hangs = Settings(max_queue=1, safety=lambda messages: None if go_on.wait(20) else "no")
        app = make_app(service, hangs)
        for _ in range(3):
            connection = Connection(app, {**CHAT, "stream": True})
            await connection.until(b"assistant")
            await connection.leave()
        refused = Connection(app, CHAT)
        await refused.until(b"the safety check is busy")
        assert refused.sent[0]["status"] == 503
        await refused.task
        go_on.set()
        await asyncio.to_thread(wait_until, lambda: not any(t.name == "safety" for t in threading.enumerate()))
        again = Connection(app, {**CHAT, "n": 3})
        await again.until(b"Hi.")
        await again.task

    asyncio.run(hang())


def test_a_thread_that_cannot_start_gives_its_place_back(
    service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    places = threading.BoundedSemaphore(1)
    safe = SafeService(service, lambda messages: None, places, stream=False)
    prompt = service.prompts.text("x", SamplingParams())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            safe.submit(prompt, print)
    assert places.acquire(blocking=False)


def test_a_hook_that_exits_and_our_own_mistakes_are_told(
    service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = client(service, lambda messages: sys.exit(3)).post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, "safety check failed" in response.text) == (500, True)
    monkeypatch.setattr(service, "submit", lambda *_: 1 / 0)
    response = client(service, Recorder()).post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, "division" in response.text) == (500, False)


def test_a_failure_of_the_model_is_still_told(service: ScriptedService) -> None:
    service.script = [Delta("Hi", (5,)), Delta("", finish_reason="error", error=RuntimeError("secret"))]
    response = client(service, Recorder()).post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert events(response.text)[-1]["error"]["message"] == "the model failed; the server's log says why"
    assert "Hi" not in response.text
    service.state = "stopped"
    assert client(service, Recorder()).post("/v1/chat/completions", json=CHAT).status_code == 503


def test_the_demo_is_read_and_stopped() -> None:
    runtime = RuntimeArgs(max_seq_len=512, max_batch_size=2, chunk_size=64)
    service = EngineService(
        lambda: assemble(None, None, runtime, None, "cpu", "float32", None, None, None, False), runtime, lambda: None
    )
    service.start()
    try:
        wait_until(lambda: service.status().state == "ready")
        asked = "Write a function that adds two numbers."
        body = {"messages": [{"role": "user", "content": asked}], "max_tokens": 60, "temperature": 0}
        free = client(service, None).post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        hook = Recorder()
        response = client(service, hook).post("/v1/chat/completions", json={**body, "stream": True})
        content = "".join(c["choices"][0]["delta"].get("content", "") for c in events(response.text))
        assert (content, hook.answers[-1]) == (free, free)
        assert len(hook.answers) > 1, "it has several lines"
        first = hook.answers[0]
        forbidden = free[len(first) :].split()[0]
        refuse = Recorder(lambda text: forbidden in text.removeprefix(first))
        response = client(service, refuse).post(
            "/v1/chat/completions", json={**body, "stream": True, "max_tokens": 400}
        )
        choices = [chunk["choices"][0] for chunk in events(response.text)]
        content = "".join(choice["delta"].get("content", "") for choice in choices)
        assert content.removesuffix("No.").rstrip("\n") in (first.rstrip("\n"), "")
        assert choices[-1]["finish_reason"] == "content_filter"
        parts = service._parts
        assert parts is not None
        wait_until(lambda: not parts.engine._scheduler.busy)
    finally:
        service.stop()


def test_json_stays_json(service: ScriptedService) -> None:
    """A refusal may hold anything that is text."""
    refuse = Recorder(lambda text: True)
    response = client(service, lambda messages: refuse(messages) and 'é "\n').post("/v1/chat/completions", json=CHAT)
    assert json.loads(response.content)["choices"][0]["message"]["refusal"] == 'é "\n'
