"""What nobody should send, on real sockets: each is refused with an error of ours or answered, and the rest goes on."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from socket import SHUT_WR

import pytest

from tests.support import hostile
from tests.support.hostile import GOOD, connected, content, exchange, post, read_all, status
from tests.support.serving import ENDLESS, RUNTIME, Serving, wait_until


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    serving = Serving()
    with serving as client:
        client.close()
        yield serving


@pytest.fixture(scope="module")
def port(serving: Serving) -> int:
    return serving.port


@pytest.fixture(scope="module")
def answer(port: int) -> str:
    return text(exchange(port, post(GOOD)))


def text(response: bytes) -> str:
    found: str = json.loads(content(response))["choices"][0]["text"]
    return found


def test_the_cases_are_of_this_context() -> None:
    assert RUNTIME.max_seq_len == hostile.MAX_SEQ_LEN


@pytest.mark.parametrize("name", hostile.COMPLETIONS)
def test_a_hostile_body(port: int, name: str) -> None:
    body, expected = hostile.COMPLETIONS[name]
    began = time.monotonic()
    response = exchange(port, post(body))
    assert status(response) == expected
    if expected == 400:
        assert json.loads(content(response))["error"].keys() == {"message", "type", "param", "code"}
        assert time.monotonic() - began < 10  # hundredths of a second, and tenths for a million items


def test_a_body_of_10_mb_is_refused_and_the_refusal_is_seen(port: int) -> None:
    body = b'{"prompt":"%s"}' % (b"a" * 10 * 2**20)
    assert status(exchange(port, post(body))) == 413
    without_length = post(hostile.chunked(body, 2**16), b"Transfer-Encoding: chunked")
    assert b"4194304 bytes" in content(exchange(port, without_length))


def test_a_body_without_a_length_in_chunks_of_one_byte(port: int, answer: str) -> None:
    assert text(exchange(port, post(hostile.chunked(GOOD, 1), b"Transfer-Encoding: chunked"))) == answer


def test_one_byte_at_a_time(port: int, answer: str) -> None:
    with connected(port) as connection:
        for byte in post(GOOD):
            connection.sendall(bytes([byte]))
        assert text(read_all(connection)) == answer


@pytest.mark.parametrize(
    "request_",
    [
        b"\x00\xff\r\n\r\n",
        post(GOOD, b"Content-Length: -5"),
        post(GOOD, b"Content-Length: 5", b"Content-Length: 6"),
        post(b"zz\r\n", b"Transfer-Encoding: chunked"),
    ],
)
def test_what_is_no_http(port: int, request_: bytes) -> None:
    assert status(exchange(port, request_)) == 400


def test_http_1_0_and_expect(port: int, answer: str) -> None:
    assert text(exchange(port, post(GOOD, version=b"1.0"))) == answer
    continued, _, response = exchange(port, post(GOOD, b"Expect: 100-continue")).partition(b"\r\n\r\n")
    assert (status(continued), text(response)) == (100, answer)


def test_requests_in_a_row_on_one_connection(port: int, answer: str) -> None:
    response = exchange(port, post(GOOD, close=False) * 5 + post(GOOD))
    assert response.count(b"HTTP/1.1 200 OK") == 6
    assert response.count(json.dumps(answer).encode()) == 6


def test_a_wrong_method_names_the_right_one(port: int) -> None:
    response = exchange(port, b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert status(response) == 405
    assert b"\r\nallow: POST\r\n" in response


def test_a_body_that_is_not_declared_as_json(port: int) -> None:
    response = exchange(port, post(GOOD).replace(b"application/json", b"text/plain"))
    assert (status(response), b"application/json" in content(response)) == (400, True)


def test_half_closed_and_cut_requests_leave_nothing_behind(serving: Serving, port: int) -> None:
    whole = post(GOOD, close=False)
    for cut in (1, len(whole) // 2, len(whole) - 1, len(whole)):
        with connected(port) as connection:
            connection.sendall(whole[:cut])
            connection.shutdown(SHUT_WR)
            read_all(connection)
    wait_until(lambda: not serving.busy, 10)
    assert status(exchange(port, post(GOOD))) == 200


def test_200_connections_at_once(port: int, answer: str) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(connected(port)) for _ in range(200)]
        assert text(exchange(port, post(GOOD))) == answer
        for connection in idle:
            connection.sendall(post(GOOD))
        statuses = [status(read_all(connection)) for connection in idle]
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= 64 + RUNTIME.max_batch_size


def test_200_abandoned_requests_then_one(serving: Serving, port: int, answer: str) -> None:
    n_before = len(serving.service.requests)
    hostile.abandon(port, 200, 0.2, json.dumps(ENDLESS).encode())
    began = time.monotonic()
    while status(response := exchange(port, post(GOOD))) == 503:  # the queue is full until their end is noticed
        time.sleep(0.05)
    assert text(response) == answer
    # Those that were let in would go on for a minute; `make soak` measures how soon it is on an idle machine.
    assert time.monotonic() - began < 20
    wait_until(lambda: not serving.busy, 5)
    reasons = [request.finish_reason for request in serving.service.requests[n_before:]]
    assert sorted(map(str, reasons)) == ["cancelled"] * (len(reasons) - 1) + ["length"]  # which is ours
    assert len(reasons) > 1


def test_refusals_do_not_delay_others(port: int) -> None:
    wrong = hostile.COMPLETIONS["a million ids and a text"][0]
    with ThreadPoolExecutor(2) as pool:
        refused = [pool.submit(exchange, port, post(wrong)) for _ in range(2)]
        began = time.monotonic()
        assert status(exchange(port, post(GOOD))) == 200
        waited = time.monotonic() - began
        assert [status(future.result()) for future in refused] == [400, 400]
    assert waited < 10
