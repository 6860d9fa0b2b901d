"""A server in this process: a real socket, the demo checkpoint in float32, and a client of it."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import uvicorn

from codellama.assembly import Parts, assemble
from codellama.config import RuntimeArgs
from codellama.generation.prompt import Prompt
from codellama.generation.request import Request
from codellama.server.app import make_app
from codellama.server.service import EngineService, OnDelta
from codellama.server.settings import Settings

RUNTIME = RuntimeArgs(max_seq_len=2048, max_batch_size=3, chunk_size=64)
ENDLESS: dict[str, Any] = {"prompt": "1, 2, 3, 4, ", "max_tokens": 2000, "temperature": 0}
"""The demo model repeats itself here, until the context is full: seconds, however busy the machine is."""


class RecordingService(EngineService):
    """The real one, which remembers its requests."""

    requests: list[Request]

    def submit(self, prompt: Prompt, on_delta: OnDelta) -> Request:
        request = super().submit(prompt, on_delta)
        self.requests.append(request)
        return request


class Serving:
    """Listens from the beginning of a with block, loads then, and yields a client once it answers."""

    def __init__(self, runtime: RuntimeArgs = RUNTIME, **options: Any) -> None:
        """Prepare; options are those of Settings."""
        self.runtime = runtime
        self.parts: Parts | None = None
        self.service = RecordingService(self._build, runtime, on_end=lambda: None)
        self.service.requests = []
        app = make_app(self.service, Settings(model_id="codellama-demo", **options))
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self.server.run)

    def _build(self) -> Parts:
        self.parts = assemble(None, None, self.runtime, None, "cpu", "float32", None, None, None, False)
        return self.parts

    @property
    def port(self) -> int:
        (listener,) = self.server.servers[0].sockets
        port: int = listener.getsockname()[1]
        return port

    @property
    def busy(self) -> bool:
        """True while a request waits or runs."""
        assert self.parts is not None
        return self.parts.engine._scheduler.busy

    def ends(self, n: int, seconds: float = 10) -> list[str | None]:
        """Wait until all rows are free and return how the last n requests ended."""
        wait_until(lambda: not self.busy, seconds)
        return [request.finish_reason for request in self.service.requests[-n:]]

    def __enter__(self) -> httpx2.Client:
        self._thread.start()
        wait_until(lambda: self.server.started)
        client = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)
        assert client.get("/health").status_code == 503
        self.service.start()
        wait_until(lambda: client.get("/health").status_code == 200)
        return client

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(20)
        self.service.stop()


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def stream(client: httpx2.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Ask for a stream and return its chunks; it must end with [DONE]."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def streamed_text(chunks: list[dict[str, Any]]) -> str:
    """Join the pieces of a completion or of a chat's answer."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)
