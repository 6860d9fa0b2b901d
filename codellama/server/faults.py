"""What a client is told when something is wrong: a status and OpenAI's error object, never a trace.

It knows nothing of models.
"""

import re
from itertools import takewhile
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from codellama.errors import CodeLlamaError, ContextLengthError, PromptError
from codellama.server.service import NotReadyError

_HEADERS = {503: {"Retry-After": "1"}, 504: {"x-should-retry": "false"}}  # OpenAI's clients repeat other 5xx
_KIND = re.compile(r"str|int|float|bool|(list|dict)\[.*\]|function-.*")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class BusyError(CodeLlamaError):
    """As many requests wait as may wait."""


class BrokenAnswerError(CodeLlamaError):
    """A generation ended before it was done, and not for a reason of the client's."""

    status = 500


class DeadEndError(BrokenAnswerError):
    """A grammar allows nothing that this model could write next."""

    status = 400


class DeadlineError(BrokenAnswerError):
    """A generation took longer than a request may take."""

    status = 504


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Write an error as OpenAI's clients read it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def fault_response(status: int, message: str, **more: Any) -> JSONResponse:
    """Answer with an error; more are param and code."""
    return JSONResponse(error_body(status, message, **more), status, _HEADERS.get(status))


def tell(error: Exception) -> JSONResponse:
    """Answer with what an exception means; one that nobody expected is not described."""
    match error:
        case ContextLengthError():
            return fault_response(400, str(error), code="context_length_exceeded")
        case PromptError():
            return fault_response(400, str(error))
        case BusyError() | NotReadyError():
            return fault_response(503, str(error))
        case BrokenAnswerError():
            return fault_response(error.status, str(error))
        case RequestValidationError():
            return _refuse_fields(error)
        case HTTPException():
            response = fault_response(error.status_code, str(error.detail))
            response.headers.update(error.headers or {})  # such as Allow
            return response
        case _:
            return fault_response(500, "the server failed; its log says why")


def _refuse_fields(error: RequestValidationError) -> JSONResponse:
    """Say what is wrong with the first field that is; one that may be of several types has an error of each."""
    if isinstance(error.body, bytes) and error.body:
        return fault_response(400, "the body was not sent as application/json: say so in Content-Type")
    errors = error.errors()
    param = _field(errors[0])
    reasons = dict.fromkeys(str(one["msg"]) for one in errors if _field(one) == param)
    return fault_response(400, f"{param or 'the body'}: {', or: '.join(reasons)}", param=param)


def _field(error: dict[str, Any]) -> str | None:
    """Name the field that an error is about, without the type that was tried."""
    if error["type"] == "json_invalid":  # then the place is a number of characters
        return None
    return ".".join(takewhile(lambda part: not _KIND.fullmatch(part), map(str, error["loc"][1:]))) or None
