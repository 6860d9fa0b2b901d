"""An OpenAI-compatible server that follows a script, byte by byte: what the chat sends is kept, what it gets is set."""

import json
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def sse(*texts: str, end: bool = True) -> list[bytes]:
    """An answer as a stream of events, one for each text, its letters not escaped."""
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    events = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode() for chunk in chunks[: None if end else -1]]
    return [*events, b"data: [DONE]\n\n"]


class ChatServer:
    """Serves during a with block.

    Attributes:
        answers: for each chat request a status and the pieces of its body, sent one by one; a number is a pause.
        models: what GET /v1/models has.
        tokens: whether there is POST /tokenize, which counts letters.
        asked: paths, headers and bodies of what came.
        gone: set when a client has left in the middle of an answer.
    """

    def __init__(self, *answers: tuple[int, Iterable[bytes | float]], context: int | None = None) -> None:
        self.answers = list(answers)
        self.models: Any = {"data": [{"id": "first"}, {"id": "second"}]}
        if context is not None:
            self.models["data"][0]["max_model_len"] = context
        self.models_status = 200
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.gone = threading.Event()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                chat.asked.append((self.path, dict(self.headers), None))
                self.reply(chat.models_status, [json.dumps(chat.models).encode()])

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                chat.asked.append((self.path, dict(self.headers), body))
                if self.path == "/v1/chat/completions":
                    self.reply(*chat.answers.pop(0))
                elif self.path == "/tokenize" and context is not None:
                    self.reply(200, [json.dumps({"tokens": list(range(len(body["content"])))}).encode()])
                else:
                    self.reply(404, [b"there is nothing"])

            def reply(self, status: int, pieces: Iterable[bytes | float]) -> None:
                self.send_response(status)
                self.end_headers()
                try:
                    for piece in pieces:
                        if isinstance(piece, float):
                            time.sleep(piece)
                        else:
                            self.wfile.write(piece)
                            self.wfile.flush()
                except (BrokenPipeError, ConnectionResetError):
                    chat.gone.set()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def bodies(self, path: str = "/v1/chat/completions") -> list[Any]:
        return [body for asked, _, body in self.asked if asked == path]

    def __enter__(self) -> "ChatServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
