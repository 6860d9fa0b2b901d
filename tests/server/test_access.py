"""What is told of requests: ids, the log, Prometheus; and who may ask from where, for how long."""

import logging
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from codellama.assembly import assemble
from codellama.config import RuntimeArgs
from codellama.errors import GrammarError
from codellama.generation.request import Delta
from codellama.server.app import make_app
from codellama.server.banner import write_banner
from codellama.server.settings import KEY_VARIABLE, Settings, find_key
from codellama.tokenizer import Tokenizer
from tests.support.scripted import ScriptedService

SECRET = "nobody must read this"
CHAT = {"messages": [{"role": "user", "content": SECRET}]}
SCRIPT = (
    Delta("Hi", (5,), n_reused=3),
    Delta(" there", (6, 7), n_reused=3),
    Delta("", finish_reason="stop", n_reused=3),
)


@pytest.fixture
def service(tokenizer: Tokenizer) -> ScriptedService:
    return ScriptedService(tokenizer, SCRIPT)


def samples(client: TestClient) -> dict[tuple[str, str], float]:
    """Read /metrics with Prometheus's own parser: values by name and each of the labels."""
    text = client.get("/metrics").text
    return {
        (sample.name, label): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        for label in sample.labels.values()
    }


def test_a_line_for_each_request_without_its_words(service: ScriptedService, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "codellama")
    client = TestClient(make_app(service, Settings()), "http://localhost")
    given = client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    drawn = client.get("/v1/models", headers={"x-request-id": "no id"}).headers["x-request-id"]
    assert client.get("/health").status_code == 200
    chat, models = caplog.messages
    n_prompt = len(service.submitted[0].tokens)
    assert chat.startswith(f"id=mine-1 testclient POST /v1/chat/completions 200 prompt={n_prompt} cached=3 generated=3")
    assert "first=0." in chat
    assert "end=stop" in chat
    assert models.startswith(f"id={drawn} testclient GET /v1/models 200 total=")
    assert SECRET not in caplog.text


@pytest.mark.parametrize("path", ["/v1/models/x%0Aid=forged", "/v1/models/x%20200%1B%5B2J", "/v1/models/%C3%A9"])
def test_a_path_cannot_forge_a_line(service: ScriptedService, caplog: pytest.LogCaptureFixture, path: str) -> None:
    caplog.set_level(logging.INFO, "codellama")
    TestClient(make_app(service, Settings()), "http://localhost").get(path, headers={"x-request-id": b"caf\xe9"})
    (line,) = caplog.messages
    assert line.isascii()
    assert line.isprintable()
    assert line.split()[2:4] == ["GET", path]


def test_our_own_mistake_has_a_status_and_an_id(
    service: ScriptedService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "codellama")
    monkeypatch.setattr(service, "submit", lambda *_: 1 / 0)
    client = TestClient(make_app(service, Settings()), "http://localhost", raise_server_exceptions=False)
    failed = client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine"})
    assert (failed.status_code, failed.headers["x-request-id"]) == (500, "mine")
    assert failed.json()["error"]["message"] == "the server failed; its log says why"
    assert caplog.messages[0].startswith("id=mine testclient POST /v1/chat/completions 500 ")
    assert samples(client)["codellama:http_requests_total", "500"] == 1


def test_words_are_logged_where_they_may_be(service: ScriptedService, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "codellama")
    client = TestClient(make_app(service, Settings(log_prompts=True)), "http://localhost")
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert SECRET in caplog.text
    assert "text=' there'" in caplog.text


def test_metrics(service: ScriptedService) -> None:
    client = TestClient(make_app(service, Settings(model_id="m")), "http://localhost", raise_server_exceptions=False)
    for _ in range(2):
        client.post("/v1/chat/completions", json={**CHAT, "n": 2})
    client.post("/v1/chat/completions", json={})
    found = samples(client)
    n_prompt = len(service.submitted[0].tokens)
    assert found["vllm:prompt_tokens_total", "m"] == 2 * n_prompt
    assert found["vllm:generation_tokens_total", "m"] == 12
    assert found["vllm:request_success_total", "stop"] == 4
    assert found["vllm:time_to_first_token_seconds_count", "m"] == 2
    assert found["vllm:inter_token_latency_seconds_count", "m"] == 8  # two tokens in the second piece of each answer
    assert found["vllm:e2e_request_latency_seconds_count", "m"] == 2
    assert found["codellama:http_requests_total", "400"] == 1
    assert (found["vllm:num_requests_running", "m"], found["vllm:num_requests_waiting", "m"]) == (0, 0)


def test_an_answer_that_takes_too_long(service: ScriptedService) -> None:
    service.script = [Delta("Hi", (5,))]
    client = TestClient(make_app(service, Settings(timeout=0.05)), "http://localhost")
    whole = client.post("/v1/chat/completions", json=CHAT)
    assert (whole.status_code, whole.headers["x-should-retry"]) == (504, "false")
    assert "longer than 0.05 seconds" in whole.json()["error"]["message"]
    streamed = client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    *_, error, done = streamed.text.strip().split("\n\n")
    assert "longer than 0.05 seconds" in error
    assert done == "data: [DONE]"
    assert len(service.cancelled) == 2


def test_pages_of_other_origins(service: ScriptedService) -> None:
    asking = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    closed = TestClient(make_app(service, Settings(api_key="k")), "http://localhost")
    assert "access-control-allow-origin" not in closed.options("/v1/chat/completions", headers=asking).headers
    opened = TestClient(make_app(service, Settings(api_key="k", cors=("http://localhost:3000",))), "http://localhost")
    asking["access-control-request-headers"] = "authorization,content-type"
    allowed = opened.options("/v1/chat/completions", headers=asking)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "http://localhost:3000"
    refused = opened.post("/v1/chat/completions", json=CHAT, headers={"origin": "http://localhost:3000"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://localhost:3000")
    asking["origin"] = "http://evil.example"
    assert "access-control-allow-origin" not in opened.options("/v1/chat/completions", headers=asking).headers


def test_where_a_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("from-file \nsecond line\n")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert find_key(None, None) is None
    assert find_key("flag", None) == "flag"
    assert find_key(None, str(file)) == "from-file"
    monkeypatch.setenv(KEY_VARIABLE, "from-environment")
    assert find_key(None, None) == "from-environment"
    assert find_key("flag", None) == "flag"
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(ValueError, match="is set and empty"):
        find_key(None, None)
    with pytest.raises(ValueError, match="one was expected"):
        find_key("flag", str(file))
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        find_key(None, str(file))


@pytest.mark.parametrize(
    "wrong", [{"timeout": 0.0}, {"timeout": float("nan")}, {"cors": ("localhost:3000",)}, {"api_key": "schlüssel"}]
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="was expected"):
        Settings(**wrong)  # type: ignore[arg-type]


def test_the_banner_can_be_pasted_and_shows_no_key() -> None:
    runtime = RuntimeArgs(max_seq_len=64, max_batch_size=2)
    parts = assemble(None, None, runtime, None, "cpu", "float32", None, None, None, False)
    banner = write_banner(parts, Settings(host="0.0.0.0", api_key="secret"), "0.0.0.0", 8123)
    assert "http://127.0.0.1:8123/v1" in banner
    assert "secret" not in banner
    assert f'-H "Authorization: Bearer ${KEY_VARIABLE}"' in banner
    assert "curl http://[::1]:80/v1/" in write_banner(parts, Settings(), "::1", 80)
    parts.engine.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("LOCALHOST", 200), ("named.example:80", 200),
        ("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403), ("[evil", 403),
    ],
)  # fmt: skip
def test_a_page_whose_name_leads_here_may_not_ask(service: ScriptedService, host: str, status: int) -> None:
    closed = make_app(service, Settings(allowed_hosts=("named.example",)))
    assert TestClient(closed).get("/v1/models", headers={"host": host}).status_code == status
    for open_to_all in (Settings(api_key="k"), Settings(host="0.0.0.0")):
        headers = {"host": host, "authorization": "bearer k"}
        assert TestClient(make_app(service, open_to_all)).get("/v1/models", headers=headers).status_code == 200


def test_a_dead_end_of_a_grammar_is_the_requests_own_fault(service: ScriptedService) -> None:
    service.script = [Delta("", finish_reason="error", error=GrammarError("nothing may follow"))]
    client = TestClient(make_app(service, Settings(model_id="m")), "http://localhost")
    answer = client.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "nothing may follow")
    assert not any(name.startswith("vllm:request_success") for name, _ in samples(client))
