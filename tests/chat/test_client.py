"""The client: whole characters, both ways to leave, and what is said when a server fails."""

import threading
import time

import pytest

from codellama.chat.client import KEY_VARIABLE, Answer, Model, Sampling, Server, ServerError
from codellama.server import settings
from tests.support.endpoint import Endpoint, serving_endpoint

TEXT = ["안녕하세요, ", "코드\u2028", "🦙", "\r\n", "끝"]
ASKED = [{"role": "user", "content": "?"}]


def ask(endpoint: Endpoint) -> Answer:
    return Server(endpoint.url).answer("m", ASKED, Sampling())


def test_a_text_comes_whole_however_it_is_cut() -> None:
    with serving_endpoint(pieces=TEXT, cut=1) as endpoint:
        answer = ask(endpoint)
        pieces = [piece for piece in answer if piece]
    assert pieces == TEXT
    assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == ("stop", 9, 2)


def test_the_request_is_the_protocols() -> None:
    with serving_endpoint() as endpoint:
        list(Server(endpoint.url + "/", "secret").answer("m", ASKED, Sampling(0.5, 0.9, 7, 3)))
        list(Server(endpoint.url).fill("m", "a", "b", Sampling()))
    streams = {"stream": True, "stream_options": {"include_usage": True}}
    chat = {"model": "m", "messages": ASKED, "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": 3, **streams}
    gap = {"model": "m", "prompt": "a", "suffix": "b", "temperature": 0.2, "top_p": 0.95, "max_tokens": 512, **streams}
    assert endpoint.asked == [("/v1/chat/completions", chat), ("/v1/completions", gap)]
    assert endpoint.keys == ["Bearer secret", None]
    assert KEY_VARIABLE == settings.KEY_VARIABLE


def test_closing_hangs_up() -> None:
    with serving_endpoint(pieces=["a"], waits=threading.Event()) as endpoint:
        answer = ask(endpoint)
        assert next(piece for piece in answer if piece) == "a"
        began = time.monotonic()
        assert next(answer) == ""  # a silent server is no reason to wait
        answer.close()
        assert endpoint.hung_up.wait(5)
        assert time.monotonic() - began < 3
        assert list(answer) == []


def test_an_answer_is_read_on_from_another_thread() -> None:
    with serving_endpoint(pieces=["a", "b"], waits=threading.Event()) as endpoint:
        answer = ask(endpoint)
        assert next(piece for piece in answer if piece) == "a"
        rest: list[str] = []
        assert endpoint.waits is not None
        endpoint.waits.set()
        thread = threading.Thread(target=lambda: rest.extend(answer))
        thread.start()
        thread.join(10)
    assert "".join(rest) == "b"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"status": 400, "fault": {"error": {"message": "too long"}}}, "status 400: too long"),
        ({"status": 401, "fault": {"error": {"message": "no key"}}}, r"another key \(no key\).*--api_key_file"),
        ({"status": 404, "fault": {"detail": "Not Found"}}, "does not exist.*Does the base URL end with /v1"),
        ({"status": 502, "fault": "<html>bad gateway</html>"}, "status 502: <html>bad"),
        ({"ends": b""}, "hung up before the answer was whole"),
        ({"ends": b'data: {"error": {"message": "out of memory"}}\n\n'}, "gave up: out of memory"),
        ({"ends": b"data: {oops\n\n"}, "not JSON"),
        ({"ends": b'data: {"choices": [3]}\n\n'}, "sent something that was not understood"),
        ({"ends": b"data: [1]\n\n"}, "answered with a list; an object was expected"),
    ],
)
def test_failures_are_told(options: dict[str, object], told: str) -> None:
    with serving_endpoint(**options) as endpoint, pytest.raises(ServerError, match=told):
        list(ask(endpoint))


def test_no_server() -> None:
    with serving_endpoint() as endpoint:
        server = Server(endpoint.url)
    with pytest.raises(ServerError, match=r"No server answers at .*/models"):
        server.models()
    with pytest.raises(ServerError, match=r"No server answers at .*/chat/completions"):
        list(server.answer("m", ASKED, Sampling()))


def test_models_and_counts() -> None:
    with serving_endpoint(models=[{"id": "a", "max_model_len": 64}, {"id": "b", "max_model_len": "many"}]) as endpoint:
        server = Server(endpoint.url)
        assert server.models() == [Model("a", 64), Model("b", None)]
        assert server.count_tokens("one two three", "a") == 3
        endpoint.tokens_per_word = None
        assert server.count_tokens("one", "a") is None
        endpoint.tokens_per_word = 1
        assert server.count_tokens("one", "a") is None  # a server without the route is not asked again
        endpoint.models = []
        with pytest.raises(ServerError, match="names no models"):
            server.models()
