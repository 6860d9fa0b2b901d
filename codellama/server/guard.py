"""Before any route: is the key right, and is the body small enough? Both are answered before a body is understood.

It knows nothing of routes but one: /health needs no key.
"""

import hmac
import ipaddress
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codellama.server.faults import fault_response
from codellama.server.settings import MAX_BODY

_MAX_READ = 16  # times as much is read and dropped: a client that still sends when it is refused sees no answer


class Guard:
    """An ASGI app around another one."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None = None,
        max_body: int = MAX_BODY,
        hosts: Collection[str] | None = None,
    ) -> None:
        """Let through what brings this key, or anything where it is None, with bodies up to max_body bytes.

        Args:
            hosts: names under which clients may ask, beside addresses and localhost; None is any. A page in a browser
                may ask under its own name, which it can have lead to this machine (DNS rebinding).
        """
        self._app = app
        self._expected = None if api_key is None else api_key.encode()
        self._max_body = max_body
        self._hosts = None if hosts is None else {"localhost", *hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._hosts is not None and not _is_known(headers.get(b"host", b""), self._hosts):
            refusal = fault_response(403, "the Host header names another host; --allowed_hosts lets names through")
            await refusal(scope, receive, send)
            return
        if self._expected is not None and scope["path"] != "/health":
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(key.strip(), self._expected) or scheme.lower() != b"bearer":
                refusal = fault_response(401, "the API key is missing or wrong: send `Authorization: Bearer KEY`")
                await refusal(scope, receive, send)
                return
        body, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            part = message.get("body", b"")
            size += len(part)
            if size <= self._max_body:
                body += part  # not a list of what came: a byte at a time, it would weigh hundreds of times as much
            if not message.get("more_body", False) or size > _MAX_READ * self._max_body:
                break
        if size > self._max_body:
            refusal = fault_response(413, f"the body has more than {self._max_body} bytes")
            await refusal(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, again, send)


def _is_known(header: bytes, hosts: Collection[str]) -> bool:
    """Say whether a Host header names one of these hosts, or an address; no header comes from no browser."""
    host = header.decode("latin-1").lower()
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in hosts or not name
    return True
