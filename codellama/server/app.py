"""The routes: which path does what. It knows a service, not an engine, and loads no torch."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from codellama import __version__
from codellama.errors import CodeLlamaError, PromptError
from codellama.server.answers import Answer, Json
from codellama.server.faults import fault_response, tell
from codellama.server.guard import MAX_BODY, Guard
from codellama.server.responses import (
    REFUSALS,
    ChatAnswer,
    CompletionAnswer,
    DetokenizeAnswer,
    HealthAnswer,
    ModelAnswer,
    ModelListAnswer,
    TokenizeAnswer,
    answers_with,
)
from codellama.server.running import Admission, Run, Running
from codellama.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from codellama.server.service import Service


def make_app(
    service: Service, model_id: str, api_key: str | None = None, max_queue: int = 64, max_body: int = MAX_BODY
) -> FastAPI:
    """Make the ASGI app.

    Args:
        model_id: what the model is called; requests may call it anything.
        api_key: what clients must bring; None asks for nothing.
        max_queue: prompts that may wait, beside those that run; more are answered with 503.
        max_body: bytes of a request's body.
    """
    app = FastAPI(title="codellama", version=__version__, docs_url=None, redoc_url=None, responses=REFUSALS)
    app.add_middleware(Guard, api_key=api_key, max_body=max_body)
    for kind in (CodeLlamaError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _tell)
    routes = _routes(service, model_id, max_queue)
    app.include_router(routes, prefix="/v1")
    app.include_router(routes, include_in_schema=False)

    @app.get("/health", responses=answers_with(HealthAnswer))
    async def health() -> Response:
        """Say whether requests are answered."""
        state = service.status().state
        if state == "ready":
            return JSONResponse({"status": "ok"})
        return fault_response(503, f"the model is not ready: it is {state}")

    @app.post("/tokenize", response_model=None, responses=answers_with(TokenizeAnswer))
    async def tokenize(body: TokenizeRequest) -> Json:
        """Turn a text into token ids."""
        text = body.content if body.prompt is None else body.prompt
        if text is None:
            raise PromptError("the body has no prompt; the text to tokenize was expected there")
        ids = await run_in_threadpool(service.tokenizer.encode, text, bos=body.add_special_tokens, eos=False)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.status().max_seq_len}

    @app.post("/detokenize", response_model=None, responses=answers_with(DetokenizeAnswer))
    async def detokenize(body: DetokenizeRequest) -> Json:
        """Turn token ids into a text."""
        try:
            text = service.tokenizer.decode(body.tokens)
        except ValueError as error:
            raise PromptError(str(error)) from error
        return {"prompt": text, "content": text}

    return app


def _routes(service: Service, model_id: str, max_queue: int) -> APIRouter:
    """Make the routes that exist with and without /v1."""
    router = APIRouter()
    status = service.status()
    admission = Admission(status.max_batch_size + max_queue)
    model: Json = {
        "id": model_id,
        "object": "model",
        "created": 0,
        "owned_by": "codellama",
        "max_model_len": status.max_seq_len,
    }

    @router.post("/chat/completions", response_model=None, responses=answers_with(ChatAnswer, streams=True))
    async def chat(body: ChatRequest) -> Response:
        """Answer a chat."""
        return await respond(body, chat=True)

    @router.post("/completions", response_model=None, responses=answers_with(CompletionAnswer, streams=True))
    async def complete(body: CompletionRequest) -> Response:
        """Continue texts, or fill a gap."""
        return await respond(body, chat=False, echo=body.echo)

    @router.get("/models", response_model=None, responses=answers_with(ModelListAnswer))
    async def models() -> Json:
        """List the one model."""
        return {"object": "list", "data": [model]}

    @router.get("/models/{name:path}", response_model=None, responses=answers_with(ModelAnswer))
    async def one_model(name: str) -> Json:
        """Describe the one model, whatever it is called."""
        return model

    async def respond(body: ChatRequest | CompletionRequest, *, chat: bool, echo: bool = False) -> Response:
        tokenizer = service.tokenizer
        if body.n_answers > admission.limit:
            raise PromptError(f"the request asks for {body.n_answers} answers; at most {admission.limit} are possible")
        admission.check(body.n_answers)
        # Texts may be long: the event loop has other clients meanwhile.
        make: Callable[..., Any] = body.prompts
        prompts = await run_in_threadpool(make, service.prompts, tokenizer)
        answer = Answer(
            prompts, tokenizer, model_id, chat=chat, n=body.n, echo=echo, include_usage=body.include_usage
        )  # fmt: skip
        return Running(Run(service, admission, prompts), answer, stream=body.stream)

    return router


async def _tell(request: HttpRequest, error: Exception) -> Response:
    return tell(error)
