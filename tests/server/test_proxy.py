"""The proxy before stand-ins for replicas: real sockets, no model."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codellama.server.guard import Guard
from codellama.server.proxy import Proxy

METRICS = """# HELP answers_total Answers.
# TYPE answers_total counter
answers_total{{kind="chat"}} {count}
# HELP rows Rows.
# TYPE rows gauge
rows {count}
"""


class StandIn:
    """A replica: it remembers what it was asked, and answers by path."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.status = 200
        self.asked: list[Scope] = []
        self.bodies: list[bytes] = []
        self.open = 0
        self.go_on = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        message = await receive()
        self.asked.append(scope)
        self.bodies.append(message.get("body", b""))
        self.open += 1
        try:
            await self._answer(scope["path"], receive, send)
        finally:
            self.open -= 1

    async def _answer(self, path: str, receive: Receive, send: Send) -> None:
        if path == "/health":
            await reply(send, self.status, b'{"status": "as it is"}')
        elif path == "/metrics":
            await reply(send, 200, METRICS.format(count=self.count).encode())
        elif path == "/busy":
            await reply(send, 503, b'{"error": {"message": "busy"}}', (b"retry-after", b"7"), (b"x-hop", b"1"))
        elif path in ("/stream", "/break"):
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"connection", b"x-private")]
            await send({"type": "http.response.start", "status": 200, "headers": [*headers, (b"x-private", b"1")]})
            await piece(send, b"data: 1\n\n")
            await self._wait(receive)
            if path == "/break":
                await piece(send, b"data: {")
                await asyncio.sleep(0.1)
                raise ConnectionError("gone in mid-event")
            await piece(send, b"data: 2\n\ndata: [DONE]\n\n", more=False)
        else:
            await self._wait(receive)
            await reply(send, 200, b"done")

    async def _wait(self, receive: Receive) -> None:
        """Wait until the test or the client lets go; the client has gone without a word where it does."""
        gone = asyncio.create_task(receive())
        while not self.go_on.is_set() and not gone.done():
            await asyncio.sleep(0.01)
        if gone.done():
            raise ConnectionError("the client has gone")
        gone.cancel()


async def reply(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await piece(send, body, more=False)


async def piece(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


@contextmanager
def served(*apps: ASGIApp) -> Iterator[list[str]]:
    """Run each app on a server in a thread; gives their addresses."""
    servers = [
        uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="auto", timeout_graceful_shutdown=5))
        for app in apps
    ]
    threads = [threading.Thread(target=server.run) for server in servers]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(server.started for server in servers))
    ports = [server.servers[0].sockets[0].getsockname()[1] for server in servers]
    try:
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        for server in servers:
            server.should_exit = True
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


def wait_until(condition: Any, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


class Setting:
    def __init__(self, proxy: Proxy, replicas: list[StandIn], client: httpx2.Client, address: str) -> None:
        self.proxy, self.replicas, self.client, self.address = proxy, replicas, client, address


@pytest.fixture
def setting() -> Iterator[Setting]:
    replicas = [StandIn(3), StandIn(4)]
    proxy = Proxy(2)
    with served(*replicas, Guard(proxy, "outer")) as (first, second, address):
        headers = {"Authorization": "Bearer outer"}
        with httpx2.Client(base_url=address, headers=headers, trust_env=False, timeout=20) as client:
            answer = client.post("/v1/completions", json={})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["message"] == "the model is not ready: it is loading"
            assert client.get("/health").status_code == 503
            proxy.open([first, second], "inner")
            yield Setting(proxy, replicas, client, address)
        for replica in replicas:
            replica.go_on.set()


def test_what_is_asked_arrives_and_only_the_key_is_another(setting: Setting) -> None:
    for replica in setting.replicas:
        replica.go_on.set()
    headers = {
        "X-Mine": "ä".encode(),
        "Connection": "close, X-Private",
        "X-Private": "1",
        "TE": "trailers",
        "Accept": "a/b",
    }
    body = b"x" * 300_000
    answer = setting.client.put("/a%2Fb/c%20d?q=1&q=%C3%A4", content=body, headers=headers)
    assert (answer.status_code, answer.content) == (200, b"done")
    assert len(answer.headers.get_list("date")) == 1
    (asked,) = [scope for replica in setting.replicas for scope in replica.asked]
    assert asked["method"] == "PUT"
    assert (asked["raw_path"], asked["query_string"]) == (b"/a%2Fb/c%20d", b"q=1&q=%C3%A4")
    got = dict(asked["headers"])
    assert got[b"authorization"] == b"Bearer inner"
    assert got[b"x-mine"] == "ä".encode()
    assert got[b"accept"] == b"a/b"
    assert got[b"content-length"] == b"300000"
    assert setting.address == f"http://{got[b'host'].decode()}"  # a redirect must not lead to an inner port
    assert {b"x-private", b"te"}.isdisjoint(got)


def test_a_wrong_key_reaches_no_replica(setting: Setting) -> None:
    answers = [setting.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}) for key in ("inner", "x")]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert [replica.asked for replica in setting.replicas] == [[], []]


@pytest.mark.parametrize("target", ["@127.0.0.1:9/", "http://127.0.0.1:9/v1/models", "//127.0.0.1:9/", "/v1/%zz"])
def test_no_target_leads_elsewhere(setting: Setting, target: str) -> None:
    """Whatever stands in the request's first line, it is asked of a replica or refused; nobody else sees the key."""
    for replica in setting.replicas:
        replica.go_on.set()
    host, port = setting.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        lines = [f"GET {target} HTTP/1.1", "Host: x", "Authorization: Bearer outer", "Connection: close", "", ""]
        connection.sendall("\r\n".join(lines).encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    status = int(answer.split()[1])
    n_asked = sum(len(replica.asked) for replica in setting.replicas)
    assert (status, n_asked) in [(200, 1), (400, 0)]


def test_errors_pass_through_with_their_headers(setting: Setting) -> None:
    answer = setting.client.get("/busy")
    assert (answer.status_code, answer.headers["retry-after"], answer.headers["x-hop"]) == (503, "7", "1")
    assert answer.json() == {"error": {"message": "busy"}}


def test_pieces_come_as_they_are_made(setting: Setting) -> None:
    with setting.client.stream("POST", "/stream", json={}) as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == b"data: 1\n\n"  # while the rest is not there yet
        for replica in setting.replicas:
            replica.go_on.set()
        assert b"".join(pieces) == b"data: 2\n\ndata: [DONE]\n\n"
        assert "x-private" not in answer.headers


def test_the_least_busy_replica_is_asked(setting: Setting) -> None:
    first, second = setting.replicas
    with (
        setting.client.stream("POST", "/stream", json={"same": 1}) as one,
        setting.client.stream("POST", "/stream", json={"same": 1}) as two,
        setting.client.stream("POST", "/stream", json={"same": 1}) as three,
    ):
        assert {first.open, second.open} == {1, 2}
        lines = setting.client.get("/metrics").text.splitlines()
        assert "codellama_replicas 2.0" in lines
        busy = [f'codellama_replica_requests_in_flight{{replica="{i}"}} {setting.replicas[i].open}.0' for i in (0, 1)]
        assert set(busy) <= set(lines)
        for replica in setting.replicas:
            replica.go_on.set()
        assert [answer.read().count(b"data") for answer in (one, two, three)] == [3, 3, 3]
    wait_until(lambda: setting.client.get("/metrics").text.count('_in_flight{replica="0"} 0.0') == 1)
    for _ in range(5):  # one conversation stays where it was
        setting.client.post("/whole", content=b"hello" * 100)
    assert sorted(replica.bodies.count(b"hello" * 100) for replica in setting.replicas) == [0, 5]


def test_metrics_of_all_are_one_page(setting: Setting) -> None:
    lines = setting.client.get("/metrics").text.splitlines()
    assert [line for line in lines if line.startswith(("answers", "rows"))] == [
        'answers_total{kind="chat",replica="0"} 3.0',
        'answers_total{kind="chat",replica="1"} 4.0',
        'rows{replica="0"} 3.0',
        'rows{replica="1"} 4.0',
    ]
    assert [line for line in lines if line.startswith("# TYPE")].count("# TYPE rows gauge") == 1


@pytest.mark.parametrize("path", ["/stream", "/whole"])
def test_a_client_that_leaves_ends_the_request_there_at_once(setting: Setting, path: str) -> None:
    async def leave() -> None:
        async with httpx2.AsyncClient(base_url=setting.address, trust_env=False) as client:
            work = asyncio.create_task(client.post(path, json={}, headers={"Authorization": "Bearer outer"}))
            while not any(replica.open for replica in setting.replicas):
                await asyncio.sleep(0.01)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    asyncio.run(leave())
    wait_until(lambda: not any(replica.open for replica in setting.replicas), 5)


def test_health_is_that_of_all(setting: Setting) -> None:
    assert setting.client.get("/health", headers={"Authorization": ""}).json() == {"status": "ok", "replicas": 2}
    setting.replicas[1].status = 503
    answer = setting.client.get("/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "as it is"})


def test_a_replica_that_breaks_off_is_told(setting: Setting) -> None:
    for replica in setting.replicas:
        replica.go_on.set()
    answer = setting.client.post("/break", json={})
    first, half, error, done, end = answer.text.split("\n\n")
    assert (first, half, done, end) == ("data: 1", "data: {", "data: [DONE]", "")
    message = json.loads(error.removeprefix("data: "))["error"]["message"]
    assert message.startswith("replica ")
    assert message.endswith(" cannot be reached")


def test_a_replica_that_is_not_there_is_told() -> None:
    proxy = Proxy(1)
    with served(Guard(proxy)) as (address,), httpx2.Client(base_url=address, trust_env=False, timeout=20) as client:
        proxy.open(["http://127.0.0.1:9"], "inner")
        answers = [client.post("/v1/completions", json={}), client.get("/health")]
        assert [answer.status_code for answer in answers] == [503, 503]
        messages = [answer.json()["error"]["message"] for answer in answers]
        assert messages == ["replica 0 cannot be reached"] * 2
        assert client.get("/metrics").status_code == 200


def test_when_all_is_over_every_answer_says_so(setting: Setting) -> None:
    found: list[Message | httpx2.Response] = []
    whole = threading.Thread(target=lambda: found.append(setting.client.post("/whole", json={})))
    with setting.client.stream("POST", "/stream", json={}) as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == b"data: 1\n\n"
        whole.start()
        wait_until(lambda: sum(replica.open for replica in setting.replicas) == 2)
        setting.proxy.fail("a process is gone")
        event, done, _ = b"".join(pieces).split(b"\n\n")
    whole.join(20)
    assert json.loads(event.removeprefix(b"data: "))["error"]["message"] == "a process is gone"
    assert done == b"data: [DONE]"
    (response,) = found
    assert isinstance(response, httpx2.Response)
    assert (response.status_code, response.json()["error"]["message"]) == (503, "a process is gone")
    assert setting.client.get("/health").status_code == 503
    assert setting.client.post("/whole", json={}).status_code == 503
