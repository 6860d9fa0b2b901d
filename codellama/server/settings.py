"""How a server answers, beside what its model is; checked before anything is loaded.

It knows nothing of HTTP, of models, or of torch.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from codellama.safety import SafetyHook
from codellama.server.address import is_public

KEY_VARIABLE = "CODELLAMA_API_KEY"
"""Where a key is looked for that no flag gives: other users of a machine can read a command line, not this."""

MAX_BODY = 4 * 2**20  # bytes; a context of 100,000 tokens is about 400,000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `make_app` and `serve` are told.

    Attributes:
        host: where to listen; port: 0 takes a free one.
        model_id: what the model is called; requests may call it anything.
        api_key: what clients must bring; None asks for nothing.
        max_queue: prompts that may wait, beside those that run; more are answered with 503.
        max_body: bytes of a request's body.
        timeout: seconds that an answer may take; None is as long as it needs.
        grace: seconds that running answers get when the server is told to end.
        cors: origins whose pages may ask; "*" is all.
        allowed_hosts: names under which clients may ask for a server of this machine alone that has no key.
        log_prompts: write what is asked and answered to the log, too.
        safety: reads prompts and answers before anybody else; docs/safety.md.

    Raises:
        ValueError: a value outside its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_id: str = "codellama"
    api_key: str | None = None
    max_queue: int = 64
    max_body: int = MAX_BODY
    timeout: float | None = None
    grace: float = 10.0
    cors: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    log_prompts: bool = False
    safety: SafetyHook | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; a number from 0 to 65535 was expected")
        if self.max_queue < 0:
            raise ValueError(f"max_queue is {self.max_queue}; it must be at least 0")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout is {self.timeout}; a positive number of seconds was expected")
        if not 0 <= self.grace <= 3600:
            raise ValueError(f"grace is {self.grace}; a number of seconds from 0 to 3600 was expected")
        if self.api_key == "":
            raise ValueError("api_key is empty; leave the flag out to serve without a key")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key holds a letter that no request can bring; a key of printable ASCII was expected")
        for origin in self.cors:
            parts = urlsplit(origin)
            if origin != "*" and origin != f"{parts.scheme}://{parts.netloc}":
                raise ValueError(f"cors holds {origin!r}; an origin such as http://localhost:3000 was expected, or *")

    @property
    def known_hosts(self) -> tuple[str, ...] | None:
        """Names under which clients may ask; None is any, since a key, or a network that others see, decides."""
        return None if self.api_key is not None or is_public(self.host) else self.allowed_hosts

    def refuse_public(self) -> None:
        """Refuse to serve everybody who can reach this address.

        Raises:
            ValueError: the address is public, and there is no key.
        """
        if self.api_key is None and is_public(self.host):
            raise ValueError(
                f"{self.host} can be reached from other machines: give an --api_key, or --force to serve anybody"
            )


def find_key(api_key: str | None, api_key_file: str | None) -> str | None:
    """Take the key from the flag, from the first line of a file, or from the environment.

    Raises:
        ValueError: two are given, or the file or the variable is empty.
        OSError: the file cannot be read.
    """
    if api_key is not None and api_key_file is not None:
        raise ValueError("both --api_key and --api_key_file are given; one was expected")
    if api_key_file is None:
        found = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
        if api_key is None and found is not None and not found.strip():
            raise ValueError(f"{KEY_VARIABLE} is set and empty; unset it to serve without a key")
        return None if found is None else found.strip()
    lines = Path(api_key_file).read_text().split("\n", 1)
    if not lines[0].strip():
        raise ValueError(f"the first line of {api_key_file} is empty; a key was expected there")
    return lines[0].strip()
