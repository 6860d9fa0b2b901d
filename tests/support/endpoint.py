"""A server with OpenAI's protocol and nothing behind it: it says what its test wrote down."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Endpoint:
    """What is answered, and what was asked.

    Attributes:
        pieces: texts of the events of the next answers.
        cut: bytes in a piece of a stream; small ones come apart in the middle of characters.
        waits: the stream goes on when this is set.
        status: of the next answers; other than 200, the body is the fault.
        ends: events at the end, as they stand on the wire.
        tokens_per_word: how /tokenize counts; None has no such route.
        asked: path and body of each request, but for those to /tokenize; keys: what came with each.
        hung_up: set when a client left before its stream was written.
    """

    url: str = ""
    pieces: list[str] = field(default_factory=lambda: ["An ", "answer."])
    cut: int = 10_000
    waits: threading.Event | None = None
    status: int = 200
    fault: Any = ""
    ends: bytes = (
        b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
        b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'
    )
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "scripted", "max_model_len": 2048}])
    tokens_per_word: int | None = 1
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Return what the last chat was."""
        messages: list[dict[str, str]] = self.asked[-1][1]["messages"]
        return messages


@contextmanager
def serving_endpoint(**options: Any) -> Iterator[Endpoint]:
    """Serve within a block."""
    endpoint = Endpoint(**options)

    class Handler(_Handler):
        said = endpoint

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        if endpoint.waits is not None:
            endpoint.waits.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    said: Endpoint

    def do_GET(self) -> None:
        self._answer(200, {"data": self.said.models}) if self.path == "/v1/models" else self._answer(404, {})

    def do_POST(self) -> None:
        said = self.said
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said.keys.append(self.headers["Authorization"])
        if self.path == "/tokenize":
            if said.tokens_per_word is None:
                return self._answer(404, {"detail": "Not Found"})
            return self._answer(200, {"count": len(body["prompt"].split()) * said.tokens_per_word})
        said.asked.append((self.path, body))
        if said.status != 200:
            return self._answer(said.status, said.fault)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for piece in said.pieces:
                choice = {"text": piece} if self.path == "/v1/completions" else {"delta": {"content": piece}}
                self._write(f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode())
            while said.waits is not None and not said.waits.wait(0.02):
                self._write(b": still here\n\n")
            self._write(said.ends)
        except OSError:
            said.hung_up.set()
        return None

    def _write(self, data: bytes) -> None:
        for start in range(0, len(data), self.said.cut):
            self.wfile.write(data[start : start + self.said.cut])
            self.wfile.flush()

    def _answer(self, status: int, body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
