"""The routes: which path does what. It knows a service, not an engine, and loads no torch."""

import logging
import threading
from collections.abc import Callable
from functools import partial

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from codellama import __version__
from codellama.errors import CodeLlamaError, PromptError
from codellama.generation.prompt import Prompt
from codellama.server.access import RECORD, AccessLog
from codellama.server.answers import Answer, Json
from codellama.server.faults import fault_response, tell
from codellama.server.guard import Guard
from codellama.server.llama_cpp import InfillRequest, LlamaCppAnswer, LlamaCppRequest
from codellama.server.metrics import Metrics
from codellama.server.responses import (
    REFUSALS,
    ChatAnswer,
    CompletionAnswer,
    DetokenizeAnswer,
    HealthAnswer,
    LlamaCppAnswers,
    LlamaCppCompletion,
    ModelAnswer,
    ModelListAnswer,
    TokenizeAnswer,
    answers_with,
)
from codellama.server.running import Admission, Answering, Run, Running, dump
from codellama.server.safety import SafeService
from codellama.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from codellama.server.service import Service
from codellama.server.settings import Settings

logger = logging.getLogger(__name__)

ENCODERS = 8
"""Threads that make prompts: more of them would only take turns with the engine's, which holds up everybody."""


def make_app(service: Service, settings: Settings) -> FastAPI:
    """Make the ASGI app; its host and port are for others to listen on."""
    metrics = Metrics(service, settings.model_id)
    app = FastAPI(title="codellama", version=__version__, docs_url=None, redoc_url=None, responses=REFUSALS)
    app.add_middleware(admitting, settings=settings)
    app.add_middleware(AccessLog, metrics=metrics)
    for kind in (CodeLlamaError, RequestValidationError, HTTPException):  # AccessLog tells of all others
        app.add_exception_handler(kind, _tell)
    encoders = CapacityLimiter(ENCODERS)
    routes = _routes(service, settings, encoders)
    app.include_router(routes, prefix="/v1")
    app.include_router(routes, include_in_schema=False)

    @app.get("/health", responses=answers_with(HealthAnswer))
    async def health() -> Response:
        """Say whether requests are answered."""
        state = service.status().state
        if state == "ready":
            return JSONResponse({"status": "ok"})
        return fault_response(503, f"the model is not ready: it is {state}")

    @app.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})
    async def tell_metrics() -> Response:
        """Count and measure, for Prometheus."""
        return Response(metrics.write(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/tokenize", response_model=None, responses=answers_with(TokenizeAnswer))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Turn a text into token ids."""
        text = body.content if body.prompt is None else body.prompt
        if text is None:
            raise PromptError("the body has no prompt; the text to tokenize was expected there")
        tokenizer, max_seq_len = service.tokenizer, service.status().max_seq_len

        def encode() -> Response:
            ids = tokenizer.encode(text, bos=body.add_special_tokens, eos=False)
            return _json({"tokens": ids, "count": len(ids), "max_model_len": max_seq_len})

        return await to_thread.run_sync(encode, limiter=encoders)

    @app.post("/detokenize", response_model=None, responses=answers_with(DetokenizeAnswer))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Turn token ids into a text."""
        tokenizer = service.tokenizer

        def decode() -> Response:
            try:
                text = tokenizer.decode(body.tokens)
            except ValueError as error:
                raise PromptError(str(error)) from error
            return _json({"prompt": text, "content": text})

        return await to_thread.run_sync(decode, limiter=encoders)

    return app


def admitting(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Put in front of an app what decides who may ask, from where, and how much at once."""
    guard = Guard(app, settings.api_key, settings.max_body, settings.known_hosts)
    if not settings.cors:
        return guard
    # Outside of the guard: a browser asks for permission without a key.
    return CORSMiddleware(guard, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"])


def _routes(service: Service, settings: Settings, encoders: CapacityLimiter) -> APIRouter:
    """Make the routes that exist with and without /v1."""
    router = APIRouter()
    model_id = settings.model_id
    status = service.status()
    admission = Admission(status.max_batch_size + settings.max_queue)
    reading = threading.BoundedSemaphore(admission.limit)
    model: Json = {
        "id": model_id,
        "object": "model",
        "created": 0,
        "owned_by": "codellama",
        "max_model_len": status.max_seq_len,
    }

    @router.post("/chat/completions", response_model=None, responses=answers_with(ChatAnswer, streams=True))
    async def chat(body: ChatRequest, request: HttpRequest) -> Response:
        """Answer a chat."""
        return await respond(request, body, partial(openai, body, chat=True))

    @router.post("/completions", response_model=None, responses=answers_with(CompletionAnswer, streams=True))
    async def complete(body: CompletionRequest, request: HttpRequest) -> Response:
        """Continue texts, or fill a gap."""
        return await respond(request, body, partial(openai, body, chat=False, echo=body.echo))

    @router.post("/completion", response_model=None, responses=answers_with(LlamaCppAnswers, streams=True))
    async def complete_as_llama_cpp(body: LlamaCppRequest, request: HttpRequest) -> Response:
        """Continue texts, in llama.cpp's words."""
        return await respond(request, body, partial(llama_cpp, body))

    @router.post("/infill", response_model=None, responses=answers_with(LlamaCppCompletion, streams=True))
    async def infill_as_llama_cpp(body: InfillRequest, request: HttpRequest) -> Response:
        """Fill a gap, in llama.cpp's words."""
        return await respond(request, body, partial(llama_cpp, body))

    @router.get("/models", response_model=None, responses=answers_with(ModelListAnswer))
    async def models() -> Json:
        """List the one model."""
        return {"object": "list", "data": [model]}

    @router.get("/models/{name:path}", response_model=None, responses=answers_with(ModelAnswer))
    async def one_model(name: str) -> Json:
        """Describe the one model, whatever it is called."""
        return model

    def openai(body: GenerationRequest, prompts: list[Prompt], *, chat: bool, echo: bool = False) -> Answer:
        return Answer(
            prompts, service.tokenizer, model_id, chat=chat, n=body.n, echo=echo, include_usage=body.include_usage
        )  # fmt: skip

    def llama_cpp(body: LlamaCppRequest, prompts: list[Prompt]) -> LlamaCppAnswer:
        return LlamaCppAnswer(prompts, service.tokenizer, model_id, body)

    async def respond(
        request: HttpRequest,
        body: ChatRequest | CompletionRequest | LlamaCppRequest,
        begin: Callable[[list[Prompt]], Answering],
    ) -> Response:
        if body.n_answers > admission.limit:
            raise PromptError(f"the request asks for {body.n_answers} answers; at most {admission.limit} are possible")
        # Before the prompts are made, which is work, too: who finds no place is told so at once.
        with admission.taking(body.n_answers) as places:
            # Texts may be long: the event loop has other clients meanwhile.
            make: Callable[..., list[Prompt]] = body.prompts
            prompts = await to_thread.run_sync(make, service.prompts, service.tokenizer, limiter=encoders)
            if settings.log_prompts:
                for prompt in prompts:
                    logger.info("id=%s prompt=%r", request.scope[RECORD].id, service.tokenizer.decode(prompt.tokens))
            hook = settings.safety
            read: Service = service if hook is None else SafeService(service, hook, reading, stream=body.stream)
            answer = begin(prompts)
            run = Run(read, places.pop_all(), prompts, settings.timeout)
        return Running(run, answer, stream=body.stream, log_answers=settings.log_prompts)

    return router


def _json(content: Json) -> Response:
    """Write an answer that may be long, in a thread: FastAPI would copy it item by item, on the event loop."""
    return Response(dump(content), media_type="application/json")


async def _tell(request: HttpRequest, error: Exception) -> Response:
    return tell(error)
