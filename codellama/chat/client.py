"""A client of servers that speak OpenAI's protocol, whoever made them.

It knows nothing of pages and of chats, and imports nothing else of this package.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2

Json = dict[str, Any]

URL_VARIABLE = "CODELLAMA_BASE_URL"
KEY_VARIABLE = "CODELLAMA_API_KEY"
"""Where a page finds what it needs: its command line can be read by other users of the machine."""

PATIENCE = 0.1  # seconds without news after which whoever reads an answer may look at something else
CONNECT_SECONDS = 10


class ServerError(Exception):
    """What went wrong between a client and a server, as a sentence for people; the status, where there was one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        """Say what happened."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Model:
    """A model that a server offers; the context is the number of tokens it holds, where the server tells it."""

    name: str
    context: int | None


@dataclass(frozen=True)
class Sampling:
    """How the next answer is drawn; without a seed, anew each time."""

    temperature: float = 0.2
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int | None = None

    def to_body(self) -> Json:
        """Say it in the words of the protocol."""
        body: Json = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return body if self.seed is None else {**body, "seed": self.seed}


class Answer:
    """A text while it is generated: an iterator over its pieces.

    A piece is empty when nothing has come for a moment, so that whoever reads can look at something else. It may be
    read on from another thread, one at a time.

    Attributes:
        finish_reason: how it ended; None before that, or where the server does not say.
        prompt_tokens, completion_tokens: None before the end, or where the server does not say.
    """

    def __init__(self, url: str, headers: dict[str, str], body: Json) -> None:
        """Prepare the request; it is sent when the first piece is taken."""
        self._url, self._headers, self._body = url, headers, body
        self.finish_reason: str | None = None
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self._pieces = self._read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Hang up, which ends the generation on the server."""
        self._pieces.close()

    def _read(self) -> Generator[str, None, None]:
        # A loop of its own, which runs only while a piece is awaited: no thread, and nothing is blocked for long.
        loop = asyncio.new_event_loop()
        events = self._events()
        waiting: asyncio.Task[Json | None] | None = None
        try:
            while True:
                waiting = loop.create_task(_next(events)) if waiting is None else waiting
                done, _ = loop.run_until_complete(asyncio.wait({waiting}, timeout=PATIENCE))
                if not done:
                    yield ""
                    continue
                event, waiting = waiting.result(), None
                if event is None:
                    return
                try:
                    piece = self._take(event)
                except (AttributeError, TypeError) as error:
                    raise ServerError(f"{self._url} sent something that was not understood: {event}") from error
                if piece:
                    yield piece
        finally:
            if waiting is not None and not waiting.done():
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    loop.run_until_complete(waiting)
            loop.run_until_complete(events.aclose())
            loop.close()

    def _take(self, event: Json) -> str:
        """Note what an event says, and return its text."""
        if usage := event.get("usage"):
            self.prompt_tokens, self.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        text = ""
        for choice in event.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            text += (choice["text"] if "text" in choice else choice.get("delta", {}).get("content")) or ""
        return text

    async def _events(self) -> AsyncGenerator[Json, None]:
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)  # a long prompt is read before the first token
        try:
            async with (
                httpx2.AsyncClient(timeout=timeout, trust_env=False, headers=self._headers) as client,
                client.stream("POST", self._url, json=self._body) as response,
            ):
                if response.status_code != 200:
                    await response.aread()
                    raise ServerError(_complaint(response), response.status_code)
                async for line in _lines(response):
                    if not line.startswith(b"data:"):
                        continue
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    event = _read_json(data, self._url)
                    if event.get("error"):
                        raise ServerError(f"The server gave up: {_message(event)}")
                    yield event
        except (httpx2.HTTPError, OSError) as error:
            raise ServerError(_excuse(self._url, error)) from error
        if self.finish_reason is None:
            raise ServerError(f"{self._url} hung up before the answer was whole; ask again.")


class Server:
    """A server at a base URL, such as http://127.0.0.1:8000/v1."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        """Remember where it is; nothing is sent, and never anything to anywhere else."""
        self.base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._counts = True

    def models(self) -> list[Model]:
        """Ask which models there are.

        Raises:
            ServerError: the server cannot be reached, refuses, or has none.
        """
        url = f"{self.base_url}/models"
        found = self._ask("GET", url).get("data")
        named = (
            [model for model in found if isinstance(model, dict) and "id" in model] if isinstance(found, list) else []
        )
        if not named:
            raise ServerError(f"{url} names no models; a server with OpenAI's protocol was expected there.")
        contexts = [model.get("max_model_len") for model in named]
        return [
            Model(str(model["id"]), context if isinstance(context, int) and context > 0 else None)
            for model, context in zip(named, contexts, strict=True)
        ]

    def count_tokens(self, text: str, model: str) -> int | None:
        """Count the tokens of a text; None where the server cannot, which is not asked again."""
        if not self._counts:
            return None
        url = self.base_url.removesuffix("/v1") + "/tokenize"
        try:
            # vLLM and we read prompt, llama.cpp reads content
            answer = self._ask("POST", url, {"model": model, "prompt": text, "content": text})
            return len(answer["tokens"]) if "count" not in answer else int(answer["count"])
        except ServerError as error:
            self._counts = error.status is None  # a server that was not reached may know the route
            return None
        except (KeyError, TypeError, ValueError):
            self._counts = False
            return None

    def answer(self, model: str, messages: list[dict[str, str]], sampling: Sampling) -> Answer:
        """Answer a chat."""
        return self._generate("chat/completions", model, sampling, {"messages": messages})

    def fill(self, model: str, prefix: str, suffix: str, sampling: Sampling) -> Answer:
        """Fill the gap between two texts."""
        return self._generate("completions", model, sampling, {"prompt": prefix, "suffix": suffix})

    def _generate(self, route: str, model: str, sampling: Sampling, body: Json) -> Answer:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": model, **body, **sampling.to_body(), **options}
        return Answer(f"{self.base_url}/{route}", self._headers, body)

    def _ask(self, method: str, url: str, body: Json | None = None) -> Json:
        try:
            with httpx2.Client(timeout=CONNECT_SECONDS, trust_env=False, headers=self._headers) as client:
                response = client.request(method, url, json=body)
        except (httpx2.HTTPError, OSError) as error:
            raise ServerError(_excuse(url, error)) from error
        if response.status_code != 200:
            raise ServerError(_complaint(response), response.status_code)
        return _read_json(response.content, url)


async def _next(events: AsyncIterator[Json]) -> Json | None:
    return await anext(events, None)


async def _lines(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Split at line feeds alone: a text may hold other ends of lines, and characters come in several pieces."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _read_json(data: bytes, url: str) -> Json:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ServerError(f"{url} answered with something that is not JSON; is it an OpenAI-compatible API?") from error
    if not isinstance(value, dict):
        raise ServerError(f"{url} answered with a {type(value).__name__}; an object was expected.")
    return value


def _message(body: Json) -> str:
    """Find the message in the several shapes that errors have."""
    error = body.get("error", body.get("detail", body))
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _complaint(response: httpx2.Response) -> str:
    """Say why a server refused."""
    try:
        body = response.json()
    except ValueError:
        body = None
    told = _message(body) if isinstance(body, dict) else response.text.strip()[:200] or "no reason given"
    if response.status_code in (401, 403):
        return f"The server wants another key ({told}). Start the page with --api_key_file, or set {KEY_VARIABLE}."
    if response.status_code == 404:
        return f"{response.url} does not exist ({told}). Does the base URL end with /v1?"
    return f"The server answered with status {response.status_code}: {told}"


def _excuse(url: str, error: Exception) -> str:
    """Say why a server was not reached, or was lost."""
    if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)):
        return f"No server answers at {url}. Is it running? `codellama serve` starts one."
    return f"The connection to {url} broke: {error or type(error).__name__}"
