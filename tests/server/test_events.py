"""The exact bytes of streams: ids and times are fixed by the test, all else is what a client reads."""

import asyncio
import json
from typing import Any

import pytest

from codellama.generation.request import Delta, TokenScore
from codellama.server import running
from codellama.server.answers import Answer
from codellama.server.app import make_app
from codellama.server.settings import Settings
from codellama.tokenizer import Tokenizer
from tests.server.test_app import Connection
from tests.support.scripted import ScriptedService

HEAD = '"id":"ID","created":7,"model":"m"'
CHAT = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
COMPLETION = {"prompt": "x", "stream": True}
USAGE = {"stream_options": {"include_usage": True}}


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every answer the same id and time."""
    begin = Answer.__init__

    def begin_fixed(self: Answer, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self._head = {"id": "ID", "created": 7, "model": "m"}

    monkeypatch.setattr(Answer, "__init__", begin_fixed)


@pytest.fixture
def service(tokenizer: Tokenizer, fixed: None) -> ScriptedService:
    pieces = (Delta("a", (5,)), Delta("\nb\n\n", (6,)), Delta("", (7,)), Delta('"é🦙"', (8,)))
    return ScriptedService(tokenizer, (*pieces, Delta("!", (9,), finish_reason="length")))


def read(service: ScriptedService, path: str, body: dict[str, Any], until: bytes = b"[DONE]") -> str:
    """Ask and return all bytes of the answer, up to a text, after which the client leaves."""

    async def ask() -> str:
        connection = Connection(make_app(service, Settings(model_id="m")), body, path)
        await connection.until(until)
        await connection.leave()
        return b"".join(message.get("body", b"") for message in connection.sent).decode()

    return asyncio.run(ask())


def chat(delta: str, finish: str = "null", usage: str = "", logprobs: str = "null") -> str:
    choice = f'{{"index":0,"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}'
    return f'data: {{"object":"chat.completion.chunk",{HEAD},"choices":[{choice}]{usage}}}\n\n'


def text(piece: str, finish: str = "null", usage: str = "", logprobs: str = "null") -> str:
    choice = f'{{"index":0,"text":"{piece}","logprobs":{logprobs},"finish_reason":{finish}}}'
    return f'data: {{"object":"text_completion",{HEAD},"choices":[{choice}]{usage}}}\n\n'


PIECES = ["a", "\\n", "b\\n", "\\n", '\\"é🦙\\"', "!"]


def test_a_chat(service: ScriptedService) -> None:
    expected = [chat('{"role":"assistant","content":""}'), *(chat(f'{{"content":"{piece}"}}') for piece in PIECES)]
    expected += [chat("{}", '"length"'), "data: [DONE]\n\n"]
    assert read(service, "/v1/chat/completions", CHAT) == "".join(expected)


def test_a_chat_with_usage(service: ScriptedService) -> None:
    found = read(service, "/v1/chat/completions", {**CHAT, **USAGE})
    null = ',"usage":null'
    expected = [chat('{"role":"assistant","content":""}', usage=null)]
    expected += [chat(f'{{"content":"{piece}"}}', usage=null) for piece in PIECES] + [chat("{}", '"length"', null)]
    chunks = "".join(expected)
    assert found.startswith(chunks)
    *_, last, done, end = found.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert last.startswith(f'data: {{"object":"chat.completion.chunk",{HEAD},"choices":[],"usage":{{"prompt_tokens":')
    n = len(service.submitted[0].tokens)
    usage = json.loads(last.removeprefix("data: "))["usage"]
    assert [usage[f"{kind}_tokens"] for kind in ("prompt", "completion", "total")] == [n, 5, n + 5]
    assert found.count("\n\n") == len(expected) + 2


def test_a_completion(service: ScriptedService) -> None:
    expected = [": keep-alive\n\n", *map(text, PIECES), text("", '"length"'), "data: [DONE]\n\n"]
    assert read(service, "/v1/completions", COMPLETION) == "".join(expected)


def test_log_probabilities_come_with_the_first_piece_of_their_delta(service: ScriptedService) -> None:
    score = TokenScore(-0.5, ((5, -0.5),))
    service.script = [Delta("a\nb", (5,), (score,)), Delta("", (), (), finish_reason="stop")]
    found = read(service, "/v1/completions", {**COMPLETION, "logprobs": 1})
    spelled = service.tokenizer.token_bytes(5).decode(errors="replace")
    scores = (
        f'{{"tokens":["{spelled}"],"token_logprobs":[-0.5],"top_logprobs":[{{"{spelled}":-0.5}}],"text_offset":[0]}}'
    )
    assert text("a\\n", logprobs=scores) + text("b") + text("", '"stop"') in found


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
def test_a_failure_in_mid_stream(service: ScriptedService, path: str, body: dict[str, Any]) -> None:
    service.script = [Delta("a", (5,)), Delta("", finish_reason="error", error=RuntimeError("secret"))]
    found = read(service, path, body)
    error = '{"message":"the model failed; the server\'s log says why","type":"server_error","param":null,"code":null}'
    told = chat('{"content":"a"}') if "chat" in path else text("a")
    assert found.endswith(told + f'data: {{"error":{error}}}\n\ndata: [DONE]\n\n')


def test_silence(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "KEEP_ALIVE", 0.01)
    service.script = []
    begin = chat('{"role":"assistant","content":""}')
    found = read(service, "/v1/chat/completions", CHAT, until=b": keep-alive\n\n")
    assert found.startswith(begin + ": keep-alive\n\n")
    assert found.removeprefix(begin).replace(": keep-alive\n\n", "") == ""
