"""llama.cpp's own routes: what its clients send, and what they read."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from codellama.generation.request import Delta, TokenScore
from codellama.prompts import infilling_prompt_tokens
from codellama.server.app import make_app
from codellama.server.settings import Settings
from codellama.tokenizer import Tokenizer
from tests.support.scripted import ScriptedService

SCRIPT = (
    Delta("Hi", (5,), (TokenScore(-0.5, ((5, -0.5), (6, -1.5))),), n_reused=2),
    Delta(":\n```", (6, 7), (TokenScore(-0.25), TokenScore(-0.125)), n_reused=2),
    Delta("", finish_reason="stop", stopped_by="py", n_reused=2),
)


@pytest.fixture
def service(tokenizer: Tokenizer) -> ScriptedService:
    return ScriptedService(tokenizer, SCRIPT)


@pytest.fixture
def client(service: ScriptedService) -> TestClient:
    return TestClient(
        make_app(service, Settings(model_id="codellama-tiny")), "http://localhost", raise_server_exceptions=False
    )


def events(text: str) -> list[Any]:
    blocks = text.removesuffix("\n\n").split("\n\n")
    return [json.loads(block.removeprefix("data: ")) for block in blocks if not block.startswith(":")]


def test_a_completion(client: TestClient, service: ScriptedService, tokenizer: Tokenizer) -> None:
    sent = {"prompt": "x = 1", "n_predict": 7, "repeat_penalty": 1.25, "seed": 3, "stop": ["py"], "top_k": 40}
    body = client.post("/completion", json={**sent, "n_probs": 2, "return_tokens": True}).json()
    (prompt,) = service.submitted
    assert prompt.tokens == tokenizer.encode("x = 1", bos=True, eos=False)
    params = prompt.params
    assert (params.max_gen_len, params.repetition_penalty, params.stop, params.top_k, prompt.seed) == (
        7, 1.25, ("py",), 40, 3,
    )  # fmt: skip
    assert (body["content"], body["tokens"], body["stop"]) == ("Hi:\n```", [5, 6, 7], True)
    assert (body["stop_type"], body["stopping_word"], body["has_new_line"]) == ("word", "py", True)
    assert (body["tokens_predicted"], body["tokens_evaluated"], body["tokens_cached"]) == (3, len(prompt.tokens), 2)
    assert body["timings"]["prompt_n"] == len(prompt.tokens) - 2
    assert body["timings"]["predicted_n"] == 3
    first = body["completion_probabilities"][0]
    assert (first["id"], first["logprob"]) == (5, -0.5)
    assert [(rival["id"], rival["logprob"]) for rival in first["top_logprobs"]] == [(5, -0.5), (6, -1.5)]
    assert (body["model"], body["generation_settings"]["n_predict"]) == ("codellama-tiny", 7)


def test_a_stream_has_no_done_and_never_goes_on_after_a_newline(client: TestClient) -> None:
    response = client.post("/completion", json={"prompt": "x", "stream": True})
    chunks = events(response.text)
    assert [chunk["content"] for chunk in chunks] == ["Hi", ":\n", "```", ""]
    assert [chunk["tokens"] for chunk in chunks] == [[5], [6, 7], [], []]
    assert [chunk["stop"] for chunk in chunks] == [False] * 3 + [True]
    assert chunks[-1]["stop_type"] == "word"
    assert "tokens_predicted" in chunks[0]
    assert "completion_probabilities" not in chunks[0]


@pytest.mark.parametrize(
    ("end", "kind"),
    [(Delta("", finish_reason="length"), "limit"), (Delta("", finish_reason="stop"), "eos")],
)
def test_how_it_ended(client: TestClient, service: ScriptedService, end: Delta, kind: str) -> None:
    service.script = [Delta("a", (5,)), end]
    body = client.post("/completion", json={"prompt": "x"}).json()
    assert (body["stop_type"], body["stopping_word"]) == (kind, "")


def test_prompts_of_all_kinds(client: TestClient, service: ScriptedService, tokenizer: Tokenizer) -> None:
    text = tokenizer.encode("x = 1", bos=True, eos=False)
    for prompt, expected in (
        (text, [text]),
        (["x = 1", 5, "y"], [[*text, 5, *tokenizer.encode("y", bos=False, eos=False)]]),
        (["x = 1", [5, 6]], [text, [5, 6]]),
        (
            "<PRE> a <SUF>b <MID>",
            [infilling_prompt_tokens(tokenizer, "a", "b")],
        ),
    ):
        service.submitted.clear()
        answer = client.post("/completion", json={"prompt": prompt}).json()
        assert [made.tokens for made in service.submitted] == expected
        assert isinstance(answer, list) == (len(expected) > 1)
        if isinstance(answer, list):
            assert [one["index"] for one in answer] == [0, 1]
    assert client.post("/completion", json={"prompt": []}).status_code == 400
    assert client.post("/completion", json={"prompt": [10**6]}).status_code == 400


def test_any_seed(client: TestClient, service: ScriptedService) -> None:
    for _ in range(2):
        client.post("/completion", json={"prompt": "x", "seed": -1})
    one, other = (prompt.seed for prompt in service.submitted)
    assert one != other


def test_infilling(client: TestClient, service: ScriptedService, tokenizer: Tokenizer) -> None:
    gap = {"input_prefix": "def f():\n", "input_suffix": "\r\nx", "n_predict": 4}
    assert client.post("/infill", json=gap).json()["content"] == "Hi:\n```"
    gap["prompt"] = "  re"
    gap["input_extra"] = [{"filename": "a.py", "text": "A = 1"}]
    assert client.post("/infill", json=gap).status_code == 200
    plain, begun = service.submitted
    assert plain.tokens == infilling_prompt_tokens(tokenizer, "def f():\n", "\r\nx")
    commented = infilling_prompt_tokens(tokenizer, "# a.py\n# A = 1\n\ndef f():\n", "\r\nx")
    assert begun.tokens == [*commented, *tokenizer.encode_infilling("  re")]
    assert (begun.before, begun.after) == ("def f():\n  re", "\r\nx")
    assert plain.params.stop_tokens == begun.params.stop_tokens == {tokenizer.eot_id, tokenizer.eos_id}
    assert client.post("/infill", json={"input_prefix": "a"}).status_code == 400


def test_biases_and_schemas(client: TestClient, service: ScriptedService) -> None:
    sent = {"prompt": "x", "logit_bias": [[5, 1.5], ["6", False], [10**6, 1]], "json_schema": {"type": "integer"}}
    assert client.post("/completion", json=sent).status_code == 200
    (prompt,) = service.submitted
    assert dict(prompt.params.logit_bias) == {5: 1.5, 6: -100}
    assert prompt.params.grammar is not None
    assert "integer" in prompt.params.grammar.source
    refused = client.post("/completion", json={"prompt": "x", "logit_bias": [[5]]})
    assert "pairs" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_lone_surrogate_to_stop_at_comes_back(client: TestClient, stream: bool) -> None:
    body = json.dumps({"prompt": "x", "stop": ["\ud800"], "stream": stream})
    response = client.post("/completion", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200
    assert events(response.text.removeprefix("data: "))[-1]["generation_settings"]["stop"] == ["\ud800"]
