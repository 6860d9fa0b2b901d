"""Opens the chat page: starts a server where none is named, and Streamlit, and ends both in order.

It knows no model and no page: they are programs, each a process of its own.
"""

import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import codellama
from codellama.errors import CodeLlamaError

logger = logging.getLogger(__name__)

Flags = Mapping[str, str | int | None]

HOST = "127.0.0.1"
GRACE = 15  # seconds that a process gets to end in order: more than a server gives its running answers
PAGE_SECONDS = 120  # in which Streamlit must have started, on a very busy machine
_NEEDED = ("streamlit", "httpx2", "markdown_it")
_OPTIONS = {
    "server.address": HOST,
    "server.headless": "true",  # else it asks for an e-mail address, and opens a browser before it is wanted
    "server.fileWatcherType": "none",
    "server.maxUploadSize": "16",
    "browser.gatherUsageStats": "false",
    "runner.fastReruns": "false",  # else a click starts a second thread beside the one that reads an answer
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",
    "theme.primaryColor": "#3f6ad8",
}


def open_page(
    base_url: str | None = None,
    api_key_file: str | None = None,
    flags: Flags | None = None,
    *,
    port: int = 0,
    headless: bool = False,
) -> None:
    """Show the chat page until Ctrl-C or SIGTERM.

    Args:
        base_url: where a server with OpenAI's protocol answers; None starts `codellama serve`.
        api_key_file: its first line is the key; without it, the variable CODELLAMA_API_KEY, where it is set, or, for a
            server that is named, OPENAI_API_KEY.
        flags: those of `codellama serve`, by name, for a server that is started; None leaves one out.
        port: where the page listens, on this machine alone; 0 takes a free one.
        headless: do not open a browser.

    Raises:
        CodeLlamaError: something is not installed, the port is taken, or the server or the page ended by itself.
        ValueError: a value that is wrong, or flags for a server that is not started.
        OSError: the file of the key cannot be read.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CodeLlamaError(
            f"{' and '.join(missing)} not installed; the chat page needs pip install 'codellama[chat,serve]'"
        )  # fmt: skip
    given = [f"--{name}={value}" for name, value in (flags or {}).items() if value is not None]
    if base_url is not None:
        _check_url(base_url)
        if given:
            raise ValueError(f"{given[0].partition('=')[0]} is for a server of our own; --base_url names another one")
    if not 0 <= port < 2**16:
        raise ValueError(f"port is {port}; a number from 0 to 65535 was expected")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CodeLlamaError("the page is no work for several processes: start `codellama serve` with torchrun, "
                             "and the page alone, with its --base_url")  # fmt: skip
    from codellama.chat.remote import find_key  # late: it needs the extra

    # A server of our own finds the variable itself, and OPENAI_API_KEY is no key of its.
    found = find_key(api_key_file) if base_url is not None or api_key_file is not None else None
    key = {} if found is None else {"CODELLAMA_API_KEY": found}
    page_port = port or _free_port()
    _check_port(page_port)  # now, and not when a model was loaded for it
    with _ended_by_signals(), ExitStack() as stack:
        children: list[Child] = []
        if base_url is None:
            server_port = _free_port()
            words = ["codellama", "serve", f"--host={HOST}", f"--port={server_port}", *given]
            children.append(stack.enter_context(Child("server", words, key)))
            _await(server_port, "/health", children)
            base_url = f"http://{HOST}:{server_port}/v1"
        script = str(Path(__file__).with_name("page.py"))
        options = [f"--{name}={value}" for name, value in {**_OPTIONS, "server.port": page_port}.items()]
        words = ["streamlit", "run", script, *options]
        children.append(stack.enter_context(Child("page", words, {**key, "CODELLAMA_BASE_URL": base_url})))
        address = f"http://{HOST}:{page_port}"
        _await(page_port, "/_stcore/health", children, PAGE_SECONDS)
        logger.info("the chat page is at %s and talks to %s; Ctrl-C ends it", address, base_url)
        if not headless:
            webbrowser.open(address)
        while True:
            _check(children)
            time.sleep(0.2)


class Child:
    """A module of Python's that runs as a process, from the beginning of a with block to its end.

    It is tethered: if this process is killed, it ends, too. Ctrl-C in a terminal does not reach it, so that the order
    is ours.
    """

    def __init__(self, name: str, words: list[str], environment: Mapping[str, str]) -> None:
        """Prepare to run words[0], with more variables than this process has."""
        self.name = name
        self._words, self._environment = words, environment

    def __enter__(self) -> "Child":
        reader, self._tether = os.pipe()
        root = str(Path(codellama.__file__).parents[1])  # also where the package is not installed
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "codellama.chat.tethered", str(reader), *self._words],
            env={**os.environ, **self._environment, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(reader,), start_new_session=True,
        )  # fmt: skip
        os.close(reader)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.terminate()
            self._process.wait(GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):  # the last two are a second signal
            self._process.kill()
            self._process.wait()
        finally:
            os.close(self._tether)

    @property
    def status(self) -> int | None:
        """Its exit status, when it has ended."""
        return self._process.poll()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Leave a block at SIGTERM as at Ctrl-C, with status 0: that is how a page ends."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before: list[tuple[signal.Signals, Callable[[int, FrameType | None], object] | int | None]] = [
        (number, signal.signal(number, leave)) for number in numbers
    ]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _await(port: int, path: str, children: list[Child], seconds: float | None = None) -> None:
    """Wait until a path is answered with 200; a model may take as long as it needs.

    Raises:
        CodeLlamaError: a process has ended meanwhile, or the time is over.
    """
    until = None if seconds is None else time.monotonic() + seconds
    while not _answers(port, path):
        _check(children)
        if until is not None and time.monotonic() > until:
            raise CodeLlamaError(f"{HOST}:{port} does not answer after {seconds:.0f} seconds")
        time.sleep(0.1)


def _answers(port: int, path: str) -> bool:
    with closing(HTTPConnection(HOST, port, timeout=5)) as connection:
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False  # it does not listen yet


def _check(children: list[Child]) -> None:
    for child in children:
        if child.status is not None:
            raise CodeLlamaError(
                f"the {child.name} ended by itself, with status {child.status}; see what it said above"
            )


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url is {url!r}; an address such as http://127.0.0.1:8000/v1 was expected")
    if parts.username is not None:
        raise ValueError("base_url holds a name or a password; a key belongs into --api_key_file")


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what ended a moment ago is no hindrance
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise CodeLlamaError(
                f"the page cannot listen on port {port} ({error.strerror}); --port chooses another one, 0 a free one"
            ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
