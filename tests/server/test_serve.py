"""End to end: a real socket, a real client, the demo checkpoint; what comes over HTTP is what the library returns."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import jsonschema_rs
import pytest

from codellama import cli
from codellama.assembly import DEMO
from codellama.errors import NumericalError
from codellama.grammar import Grammar
from codellama.llama import Llama
from tests.support.schemas import SCHEMAS
from tests.support.serving import ENDLESS, Serving, stream, streamed_text, wait_until

DIALOG = [{"role": "user", "content": "Write a function that adds two numbers."}]


@pytest.fixture(scope="module")
def serving() -> Iterator[tuple[Serving, httpx2.Client]]:
    serving = Serving()
    with serving as client:
        yield serving, client
        client.close()


@pytest.fixture
def client(serving: tuple[Serving, httpx2.Client]) -> httpx2.Client:
    return serving[1]


@pytest.fixture(scope="module")
def demo() -> Llama:
    return Llama.build(DEMO, max_seq_len=512, max_batch_size=3, dtype="float32", device="cpu", chunk_size=64)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1, "top_p": 0.9, "seed": 5}])
def test_a_chat_is_the_librarys(client: httpx2.Client, demo: Llama, options: dict[str, Any]) -> None:
    body = {"messages": DIALOG, "max_tokens": 60, **options}
    expected = "".join(demo.stream_chat(DIALOG, max_gen_len=60, **{"top_p": 0.95, **options}))
    chunks = stream(client, "/v1/chat/completions", body)
    assert len(chunks) > 10
    assert streamed_text(chunks) == expected
    whole = client.post("/v1/chat/completions", json=body).json()
    assert whole["choices"][0]["message"]["content"] == expected


def test_json_of_a_schema_is_the_librarys(client: httpx2.Client, demo: Llama) -> None:
    answer_format = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMAS[33]}}
    body = {"messages": DIALOG, "temperature": 1, "top_p": 1, "seed": 3, "n": 2, "response_format": answer_format}
    whole = client.post("/v1/chat/completions", json=body).json()["choices"]
    texts = [choice["message"]["content"] for choice in whole]
    for seed, text in enumerate(texts, start=3):
        options: dict[str, Any] = {
            "temperature": 1,
            "top_p": 1,
            "seed": seed,
            "grammar": Grammar.json_schema(SCHEMAS[33]),
        }
        (expected,) = demo.chat_completion([DIALOG], **options)
        assert text == expected["generation"]["content"]
        assert jsonschema_rs.is_valid(SCHEMAS[33], json.loads(text))
    assert texts[0] != texts[1]
    assert [choice["finish_reason"] for choice in whole] == ["stop", "stop"]
    chunks = stream(client, "/v1/chat/completions", {**body, "n": 1})
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == texts[0]

    cut = {"prompt": "x", "max_tokens": 3, "response_format": answer_format, "logit_bias": {"foo": 0}}
    (choice,) = client.post("/v1/completions", json=cut).json()["choices"]
    assert (choice["finish_reason"], choice["text"].lstrip()[0]) == ("length", "{")


def test_a_schema_that_is_refused_is_400_and_holds_nobody_up(client: httpx2.Client) -> None:
    """Also one that takes minutes, and ends after 2 s: others are answered meanwhile."""
    slow = {"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(25)]}
    for refused, least in (({"not": {}}, 0), (slow, 3)):
        answer_format = {"type": "json_schema", "json_schema": {"schema": refused}}
        body = {"messages": DIALOG, "response_format": answer_format}
        answered = 0
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(client.post, "/v1/chat/completions", json=body)
            while not future.done():
                other = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
                answered += other.status_code == 200
                time.sleep(0.01)
        assert answered >= least
        response = future.result()
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
        assert "the chat: the grammar is refused: " in response.json()["error"]["message"]


def test_a_grammar_that_becomes_too_much_is_told_in_mid_stream(client: httpx2.Client) -> None:
    heavy = {"type": "string", "pattern": "^" + "|".join(f"x.{{0,{n}}}y{n}" for n in range(2000)) + "$"}
    answer_format = {"type": "json_schema", "json_schema": {"schema": heavy}}
    body = {"prompt": "x", "temperature": 1, "seed": 0, "max_tokens": 200, "response_format": answer_format}
    (*_, last) = stream(client, "/v1/completions", body)
    assert "the grammar cannot be followed any further" in last["error"]["message"]


def test_infilling_is_the_librarys(client: httpx2.Client, demo: Llama) -> None:
    prefix, suffix = "def gcd(a, b):\r\n    while b:\r\n        ", "\r\n    return a\r\n"
    (expected,) = demo.text_infilling([prefix], [suffix], temperature=0, max_gen_len=40)
    body = {"prompt": prefix, "suffix": suffix, "temperature": 0, "max_tokens": 40}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected["generation"]
    markers = {**body, "prompt": f"<PRE> {prefix} <SUF>{suffix} <MID>", "suffix": None}
    assert streamed_text(stream(client, "/completions", markers)) == expected["generation"]


def test_log_probabilities_are_the_librarys(client: httpx2.Client, demo: Llama) -> None:
    (expected,) = demo.text_completion(["import os"], temperature=0, max_gen_len=5, top_logprobs=2, echo=True)
    body = {"prompt": "import os", "temperature": 0, "max_tokens": 5, "logprobs": 2, "echo": True}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == expected["generation"]
    found = choice["logprobs"]
    assert found["token_logprobs"][0] == 0
    assert found["token_logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)
    assert [len(found[key]) for key in ("tokens", "top_logprobs", "text_offset")] == [len(expected["tokens"])] * 3


def test_streams_at_once_are_what_each_is_alone(client: httpx2.Client) -> None:
    bodies = [
        {"prompt": prompt, "max_tokens": 40, "temperature": 0.8, "seed": seed}
        for seed, prompt in enumerate(["import ", "def add(a, b):", "class Stack:\n" * 20])
    ]
    alone = [streamed_text(stream(client, "/v1/completions", body)) for body in bodies]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda body: streamed_text(stream(client, "/v1/completions", body)), bodies))
    assert together == alone
    assert len(set(alone)) == 3


def test_usage_tells_what_was_cached(client: httpx2.Client) -> None:
    body = {"prompt": "def tell(usage):\n    return " + "usage + " * 20, "max_tokens": 4, "temperature": 0, "n": 2}
    fresh, again = (client.post("/v1/completions", json=body).json()["usage"] for _ in range(2))
    assert fresh["prompt_tokens"] == again["prompt_tokens"] > 40
    assert fresh["prompt_tokens_details"]["cached_tokens"] < 20, "the second choice's copy is no earlier prompt's"
    assert again["prompt_tokens_details"]["cached_tokens"] == again["prompt_tokens"] - 1
    chunks = stream(client, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert chunks[-1]["usage"] == again


def test_a_client_that_leaves_frees_its_row(serving: tuple[Serving, httpx2.Client]) -> None:
    running, client = serving
    with client.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True, "n": 3}) as response:
        next(line for line in response.iter_lines() if line.startswith("data: "))
    assert running.ends(3) == ["cancelled"] * 3


def test_a_model_that_fails_tells_every_client_and_health() -> None:
    serving = Serving()
    with serving as client:
        assert serving.parts is not None
        serving.parts.model.norm.weight.data.fill_(float("nan"))
        answer = client.post("/v1/chat/completions", json={"messages": DIALOG})
        assert answer.status_code == 500
        assert "NaN" in answer.json()["error"]["message"]
        wait_until(lambda: client.get("/health").status_code == 503)
        assert client.post("/v1/chat/completions", json={"messages": DIALOG}).status_code == 503
        client.close()
    assert isinstance(serving.service.error, NumericalError)


def start(*flags: str) -> tuple[subprocess.Popen[str], str]:
    """Start the command on a free port, and read its address from what it says first."""
    command = [sys.executable, "-m", "codellama", "serve", "--port", "0", "--device", "cpu", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("serving on http://127.0.0.1:")
    return process, line.split()[2]


def test_the_command_ends_with_0_on_sigterm() -> None:
    process, address = start()
    try:
        client = httpx2.Client(base_url=address, timeout=60, trust_env=False)
        wait_until(lambda: client.get("/../health").status_code == 200)
        body = {"prompt": "x", "max_tokens": 2}
        assert client.post("/completions", json=body).json()["usage"]["completion_tokens"] == 2
        client.close()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in errors
    finally:
        process.kill()


@pytest.mark.slow
def test_an_answer_that_outlasts_the_grace_is_cut_and_says_so() -> None:
    process, address = start("--max_seq_len", "60000", "--max_batch_size", "1", "--grace", "2")
    try:
        client = httpx2.Client(base_url=address, timeout=60, trust_env=False)
        wait_until(lambda: client.get("/../health").status_code == 200)
        body = {"prompt": "1, 2, 3, 4, ", "max_tokens": 59000, "temperature": 0, "stream": True}  # repeats itself
        with client.stream("POST", "/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: "))
            next(lines)
            process.send_signal(signal.SIGTERM)
            *_, error, done = lines
        client.close()
        assert "the server was stopped before" in error
        assert done == "data: [DONE]"
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, "Traceback" in errors) == (0, False)
    finally:
        process.kill()


def test_the_command_ends_with_1_without_a_model(tmp_path: Any) -> None:
    process, _ = start("--ckpt_dir", str(tmp_path))
    try:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert str(tmp_path) in errors
        assert "Traceback" not in errors
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"host": "0.0.0.0"}, "can be reached from other machines"),
        ({"host": "example.org"}, "can be reached from other machines"),
        ({"port": 70000}, "port is 70000"),
        ({"max_queue": -1}, "max_queue is -1"),
        ({"api_key": ""}, "api_key is empty"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cli.serve(**flags)
