"""Around everything else: gives each request an id and a record, and tells the log and the metrics when it is over.

It knows nothing of what a request asks for, and what is private in it never comes here.
"""

import logging
import re
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codellama.server.faults import tell
from codellama.server.metrics import Metrics
from codellama.server.record import Record

logger = logging.getLogger(__name__)

RECORD = "codellama.record"
"""The key of a request's Record in its ASGI scope."""

_QUIET = ("/health", "/metrics")  # asked every few seconds by those who watch
_GIVEN = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_PLAIN = "/!$&'()*+,;=:@"  # what a path may hold as it is (RFC 3986, 3.3); all else could forge a line, or words of one


class AccessLog:
    """An ASGI app around another one."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Tell these metrics, and the log of this module at INFO."""
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request and tell of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        record = Record(given if _GIVEN.fullmatch(given) else uuid.uuid4().hex[:16])
        scope[RECORD] = record
        status = 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            await self._app(scope, receive, note)
        except (
            Exception
        ) as error:  # our own mistake: told from here, so that its line and its answer have status and id
            if not status:
                await tell(error)(scope, receive, note)
            raise  # the one who listens logs the trace
        finally:
            self._metrics.observe(record, status)
            if scope["path"] not in _QUIET:
                client = scope.get("client") or ("-", 0)
                path = quote(scope["path"], safe=_PLAIN, errors="replace")
                words = [f"id={record.id}", str(client[0]), scope["method"], path, str(status), *record.describe()]
                logger.info("%s total=%.3fs", " ".join(words), record.total)
