"""The model behind an OpenAI-compatible address. It sends what is asked there, and nothing anywhere else.

It knows nothing of terminals, and of our own server no more than of any other.
"""

import json
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from codellama.chat.dialogue import Settings
from codellama.chat.model import TooLongError
from codellama.errors import CodeLlamaError, shown
from codellama.prompts import Dialog

KEY_VARIABLES = ("CODELLAMA_API_KEY", "OPENAI_API_KEY")
_FRAME = 14  # tokens that a message has around its text, at most: so many has Llama 2's system message
_SOON = 10  # seconds for what needs no model
_LOCAL = ("localhost", "127.0.0.1", "::1")  # no proxy stands before these


class RemoteError(CodeLlamaError):
    """The server cannot be reached, refuses, or breaks off."""


class RemoteModel:
    """A model that somebody else runs."""

    breaks = True

    def __init__(self, base_url: str, key: str | None = None, name: str | None = None) -> None:
        """Find out which model is there.

        Args:
            base_url: such as http://127.0.0.1:8000/v1.
            key: what the server wants to see.
            name: of the model; None is the first one that the server has.

        Raises:
            ValueError: base_url is no address.
            RemoteError: nobody answers there, or not as such a server does.
        """
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url is {base_url!r}; an address such as http://127.0.0.1:8000/v1 was expected")
        self._url = base_url.rstrip("/")
        self._client = httpx2.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(None, connect=_SOON),  # a long prompt takes as long as it takes; Ctrl-C is there
            trust_env=parts.hostname not in _LOCAL,
        )
        self._lengths: dict[str, int] = {}
        self.context: int | None
        try:
            self.name, self.context = self._choose(name)
        except BaseException:
            self._client.close()
            raise

    def count(self, dialog: Dialog) -> int | None:
        """See Model. Only a server that says how long its context is is asked, and each text once."""
        if self.context is None:
            return None
        total = 0
        for message in dialog:
            length = self._length(message["content"])
            if length is None:
                return None
            total += length + _FRAME
        return total

    def stream(self, dialog: Dialog, settings: Settings) -> Generator[str]:
        """See Model."""
        asked = {
            "model": self.name, "messages": list(dialog), "stream": True, "temperature": settings.temperature,
            "top_p": settings.top_p, "max_tokens": settings.max_gen_len, "seed": settings.seed,
        }  # fmt: skip
        body = {name: value for name, value in asked.items() if value is not None}
        finished = False
        with (
            self._reaching(),
            self._client.stream("POST", f"{self._url}/chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise self._refusal(response)
            for event in events(response.iter_bytes()):
                if "error" in event:
                    raise RemoteError(f"the answer broke off: {_message(event['error'])}")
                text, ends = _read_choices(event)
                finished = finished or ends
                if text:
                    yield text
        if not finished:
            raise RemoteError(f"the answer broke off: {self._url} closed the connection before its end")

    def end(self) -> None:
        """See Model."""
        self._client.close()

    def _choose(self, name: str | None) -> tuple[str, int | None]:
        """Find the model, and how long its context is, where the server says that."""
        models = self._models()
        names = [model["id"] for model in models]
        if not names:
            raise RemoteError(f"{self._url} has no model")
        if name is not None and name not in names:
            raise RemoteError(f"{self._url} has no model {name!r}; it has {', '.join(names)}")
        chosen = names[0] if name is None else name
        context = models[names.index(chosen)].get("max_model_len")
        return chosen, context if isinstance(context, int) else None

    def _models(self) -> list[dict[str, Any]]:
        with self._reaching():
            response = self._client.get(f"{self._url}/models", timeout=_SOON)
        if response.status_code != 200:
            raise self._refusal(response)
        try:
            models = response.json()["data"]
            if not all(isinstance(model["id"], str) for model in models):
                raise TypeError("the id of a model is a string")
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteError(
                f"{self._url}/models answers {shown(response.text)}; a list of models was expected, as "
                f"OpenAI-compatible servers have it: does the address end with /v1?"
            ) from error
        found: list[dict[str, Any]] = models
        return found

    def _length(self, text: str) -> int | None:
        """Ask for the number of tokens of a text; None, for good, where the server has no such route."""
        if text not in self._lengths:
            route = f"{self._url.removesuffix('/v1')}/tokenize"
            # vLLM reads model and prompt, llama.cpp content, and ours either
            body = {"model": self.name, "prompt": text, "content": text}
            with self._reaching():
                response = self._client.post(route, json=body, timeout=_SOON)
            try:
                tokens = response.json()["tokens"] if response.status_code == 200 else None
            except (ValueError, KeyError, TypeError):
                tokens = None  # something else is there
            if not isinstance(tokens, list):
                self.context = None
                return None
            self._lengths[text] = len(tokens)
        return self._lengths[text]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.ConnectError as error:
            raise RemoteError(f"nobody answers at {self._url} ({error}); codellama serve starts a server") from error
        except httpx2.HTTPError as error:
            raise RemoteError(f"the connection to {self._url} failed: {error or type(error).__name__}") from error

    def _refusal(self, response: httpx2.Response) -> CodeLlamaError:
        try:
            error = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            return RemoteError(f"{self._url} answers with status {response.status_code}: {shown(response.text)}")
        message = _message(error)
        code = error.get("code") if isinstance(error, dict) else None
        if response.status_code == 400 and (code == "context_length_exceeded" or "context length" in message):
            return TooLongError(message)
        if response.status_code == 401:
            return RemoteError(f"{message} (give --api_key_file, or set {' or '.join(KEY_VARIABLES)})")
        return RemoteError(f"{self._url} answers with status {response.status_code}: {message}")


def events(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Read a stream of events up to [DONE], however its bytes are cut; a line is decoded when it is whole.

    Raises:
        RemoteError: an event is no JSON object.
    """
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # a comment, or the name of an event
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError as error:
                raise RemoteError(f"the server sent {shown(data)}, which is no JSON") from error
            if not isinstance(event, dict):
                raise RemoteError(f"the server sent {shown(event)}; an object was expected")
            yield event


def find_key(api_key_file: str | None) -> str | None:
    """Take the key from the first line of a file, else from the environment; None is no key.

    Raises:
        ValueError: the first line is empty, or the key is no text that a request can bring; it is not shown.
        OSError: the file cannot be read.
    """
    if api_key_file is None:
        place = next(filter(lambda name: os.environ.get(name, "").strip(), KEY_VARIABLES), None)
        key = None if place is None else os.environ[place].strip()
    else:
        place = f"the first line of {api_key_file}"
        key = Path(api_key_file).read_text().partition("\n")[0].strip()
        if not key:
            raise ValueError(f"{place} is empty; a key was expected there")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ValueError(f"{place} holds a letter that no request can bring; a key of ASCII was expected there")
    return key


def _read_choices(event: dict[str, Any]) -> tuple[str, bool]:
    """Take an event's text, and whether it ends the answer.

    Raises:
        RemoteError: it has another form.
    """
    try:
        choices = event.get("choices") or []
        text = "".join((choice.get("delta") or {}).get("content") or "" for choice in choices)
        return text, any(choice.get("finish_reason") is not None for choice in choices)
    except (AttributeError, TypeError) as error:
        raise RemoteError(f"the server sent {shown(event)}; choices with texts were expected") from error


def _message(error: Any) -> str:
    """Take the text out of an error object; servers differ in its form."""
    return str(error["message"]) if isinstance(error, dict) and "message" in error else shown(error)
