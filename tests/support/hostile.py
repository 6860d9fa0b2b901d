"""Requests that nobody should send, and sockets that behave badly."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

GOOD = json.dumps({"prompt": "import os", "max_tokens": 2, "temperature": 0}).encode()
MAX_SEQ_LEN = 2048  # of tests.support.serving.RUNTIME
TOO_DEEP = 50_000


def _prompt(value: Any, **more: Any) -> bytes:
    return json.dumps({"prompt": value, "max_tokens": 2, **more}).encode()


COMPLETIONS: dict[str, tuple[bytes, int]] = {
    "NaN": (b'{"prompt":"a","temperature":NaN}', 400),
    "Infinity": (b'{"prompt":"a","top_p":-Infinity}', 400),
    "1e999": (b'{"prompt":"a","max_tokens":1e999}', 400),
    "an integer of 5000 digits": (b'{"prompt":"a","max_tokens":%s}' % (b"9" * 5000), 400),
    "a seed of 30 digits": (b'{"prompt":"a","seed":%s}' % (b"9" * 30), 400),
    "a fraction": (b'{"prompt":"a","max_tokens":1.5}', 400),
    "a null": (b"null", 400),
    "a list": (b"[]", 400),
    "nothing": (b"", 400),
    "half of it": (GOOD[:-1], 400),
    "deep lists": (b'{"prompt":%s%s}' % (b"[" * TOO_DEEP, b"]" * TOO_DEEP), 400),
    "deep objects": (b'{"prompt":"a","x":%s1%s}' % (b'{"a":' * TOO_DEEP, b"}" * TOO_DEEP), 400),
    "bytes that are no UTF-8": (b'{"prompt":"\xff\xfe"}', 400),
    "a lone surrogate": (b'{"prompt":"\\ud800"}', 400),
    "a lone surrogate after the gap": (b'{"prompt":"a","suffix":"\\udfff"}', 400),
    "a lone surrogate as a model": (b'{"prompt":"a","model":"\\ud800","max_tokens":1}', 200),
    "a lone surrogate to stop at": (b'{"prompt":"a","stop":"\\ud800","max_tokens":2}', 200),
    "NUL": (b'{"prompt":"a\\u0000b","stop":"\\u0000","max_tokens":2}', 200),
    "a stop string of a million characters": (_prompt("a", stop="x" * 1_000_000), 200),
    "64 long stop strings": (_prompt("a", stop=["x" * 30_000] * 64), 200),
    "an empty prompt": (_prompt(""), 200),
    "no prompt": (b'{"max_tokens":1}', 200),
    "no ids": (_prompt([[]]), 400),
    "ids and texts": (_prompt([1, "a"]), 400),
    "an id outside": (_prompt([10**9]), 400),
    "a negative id": (_prompt([-1]), 400),
    "the whole context": (_prompt([1] + [5] * (MAX_SEQ_LEN - 1)), 400),
    "the whole context and nothing more": (_prompt([1] + [5] * (MAX_SEQ_LEN - 1), max_tokens=0), 200),
    "all but one of the context": (_prompt([1] + [5] * (MAX_SEQ_LEN - 2), max_tokens=9), 200),
    "more than the context": (_prompt([1] + [5] * MAX_SEQ_LEN, max_tokens=0), 400),
    "max_tokens 0": (_prompt("a", max_tokens=0), 200),
    "max_tokens 0 in a stream": (_prompt("a", max_tokens=0, stream=True), 200),
    "max_tokens negative": (_prompt("a", max_tokens=-1, stop=" "), 200),
    "too many prompts": (_prompt(["a"] * 100_000), 400),
    "a million ids and a text": (_prompt(["a"] + [1] * 1_000_000), 400),
    "a million texts and an id": (_prompt([1] + ["a"] * 500_000), 400),
    "markers again and again": (_prompt("<PRE> " + "a <SUF>" * 20_000 + " <MID>"), 400),
}


def post(body: bytes, *headers: bytes, version: bytes = b"1.1", close: bool = True) -> bytes:
    """Write a request to /v1/completions."""
    lines = [b"POST /v1/completions HTTP/" + version, b"Host: localhost", b"Content-Type: application/json", *headers]
    if not any(header.lower().startswith((b"transfer-encoding", b"content-length")) for header in headers):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, *[b"Connection: close"] * close, b"", body])


def chunked(body: bytes, size: int) -> bytes:
    """Write a body without a length, in chunks."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port)) as made:
        made.settimeout(30)
        yield made


def read_all(connection: socket.socket) -> bytes:
    """Read until the other side closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def exchange(port: int, request: bytes) -> bytes:
    """Send bytes and read until the other side closes."""
    with connected(port) as connection:
        connection.sendall(request)
        return read_all(connection)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def content(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


def abandon(port: int, n: int, seconds: float, body: bytes) -> None:
    """Send n requests at once, and close them all after some seconds, whatever has come."""
    with contextlib.ExitStack() as stack:
        for _ in range(n):
            stack.enter_context(connected(port)).sendall(post(body))
        time.sleep(seconds)
