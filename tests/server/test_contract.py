"""Generated requests against our own /openapi.json: no failure of ours, and answers that are as the schema says."""

import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import one_of
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from codellama.generation.request import Delta, TokenScore
from codellama.server.app import make_app
from codellama.server.settings import Settings
from tests.support import tiny
from tests.support.scripted import ScriptedService

CASES = int(os.environ.get("CONTRACT_CASES", "25"))  # for each route
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = tiny.tiny_tokenizer(tmp_path_factory.mktemp("contract"))
    score = TokenScore(-1.0, ((5, -1.0), (6, -2.0)))
    script = (Delta("Hi", (5,), (score,)), Delta(":\n", (6, 7), (score, score)), Delta("", finish_reason="stop"))
    open_to_it = Settings(allowed_hosts=("testserver",))
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(ScriptedService(tokenizer, script), open_to_it))


ROUTES = [
    ("/v1/chat/completions", "POST"), ("/v1/completions", "POST"), ("/v1/models", "GET"), ("/v1/models/{name}", "GET"),
    ("/v1/completion", "POST"), ("/v1/infill", "POST"), ("/health", "GET"), ("/metrics", "GET"),
    ("/tokenize", "POST"), ("/detokenize", "POST"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_answers_are_as_the_schema_says(schema: Any, path: str, method: str) -> None:
    def answered(case: Any) -> Any:
        """Nearly all chats that are generated are refused; the other fields matter, too."""
        if path.endswith("/chat/completions") and isinstance(case.body, dict):
            case.body["messages"] = [{"role": "user", "content": "hello"}]
        return case

    operation = schema[path][method]
    cases = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]

    @given(case=one_of(*cases, cases[0].map(answered)))
    @settings(
        max_examples=CASES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def ask(case: Any) -> None:
        response = case.call()
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    statuses: set[int] = set()
    ask()
    assert statuses >= ({200, 400} if method == "POST" else {200})


def test_every_route_is_tried(schema: Any) -> None:
    found = {(path, method.upper()) for path, methods in schema.raw_schema["paths"].items() for method in methods}
    assert found == set(ROUTES)


def test_the_schema_promises_no_422_and_describes_every_answer(schema: Any) -> None:
    for path, methods in schema.raw_schema["paths"].items():
        for operation in methods.values():
            assert "422" not in operation["responses"], path
            for status in ("200", "400", "401", "413", "503")[path == "/metrics" :]:
                content = operation["responses"][status]["content"]["application/json"]
                assert "$ref" in content["schema"], (path, status)
