"""The API does what its own description says: schemathesis makes requests from /openapi.json.

Whatever endpoints there are get tested, old and new. TENSORRAY_FUZZ_EXAMPLES sets the number of
requests an endpoint and kind (`make fuzz` asks for many); counts are printed with -s.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.helpers.http_server import http_server
from tests.helpers.null_engine import serving, write_model

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.core.failures import FailureGroup  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

EXAMPLES = int(os.environ.get("TENSORRAY_FUZZ_EXAMPLES", "3"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
#: What a path's parameters are where the request should get through.
IN_PATHS = {"name": "tiny", "version": "1"}
METHODS = {"get", "post", "put", "patch", "delete"}
WITH_KEY = {"Authorization": "Bearer secret"}
#: A request's answer takes milliseconds; this is what counts as hanging.
SECONDS = 60


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with http_server(write_model(tmp_path_factory.mktemp("model"))) as (port, _):
        yield port


async def description(tmp_path: Path, **limits: Any) -> dict[str, Any]:
    async with serving(write_model(tmp_path / "model"), limits=limits) as (http, _):
        return dict((await http.get("/openapi.json", headers=WITH_KEY)).json())


def operations(schema: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation)
        for path, known in schema["paths"].items()
        for method, operation in known.items()
        if method in METHODS
    ]


def strategies(operation: Any) -> Iterator[tuple[str, Any]]:
    """Kinds of requests for an endpoint."""
    named = {each.name: IN_PATHS[each.name] for each in operation.path_parameters}
    known = {"path_parameters": named} if named else {}
    if operation.body:
        yield "a body the schema allows", operation.as_strategy(**known)
        wrong = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE, **known)
        yield "a body it does not allow", wrong
        return
    yield "", operation.as_strategy(**known)
    if named:
        yield "any names", operation.as_strategy()


def test_requests_made_from_the_schema(server: int) -> None:
    """No server error, and no answer that the schema does not foresee."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server}/openapi.json")
    counts: Counter[int] = Counter()
    found: dict[str, BaseException] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        for kind, strategy in strategies(operation):

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                derandomize=EXAMPLES < 100,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy)
            def ask(case: Any) -> None:
                answer = case.call(timeout=SECONDS)
                counts[answer.status_code] += 1
                case.validate_response(answer, checks=CHECKS)

            try:
                ask()
            except (Exception, FailureGroup) as error:
                found[f"{operation.label} {kind}"] = error
    told = ", ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
    print(f"{sum(counts.values())} requests; answers by status: {told}")
    assert found == {}, "\n\n".join(f"{where}: {error}"[:1500] for where, error in found.items())
    assert counts[200] > 0
    assert counts[400] > 0


async def test_everything_is_described(tmp_path: Path) -> None:
    """What each endpoint takes, answers and refuses, by models that are there."""
    schema = await description(tmp_path)
    models = schema["components"]["schemas"]
    found = operations(schema)
    assert len(found) > 20
    for path, method, operation in found:
        where = f"{method} {path}"
        answers = operation["responses"]
        assert operation.get("description"), where
        assert answers["200"]["description"], where
        if path not in ("/v2/health/live", "/v2/health/ready") and not path.endswith("/ready"):
            assert answers["200"].get("content"), f"{where} answers what?"
        for status, answer in answers.items():
            for kind, content in answer.get("content", {}).items():
                assert content["schema"] not in ({}, None), f"{where} {status} {kind}"
        assert {"431", "500"} <= answers.keys(), where
        if "requestBody" in operation:
            assert {"400", "413", "429", "503"} <= answers.keys(), where
        named = {each["name"] for each in operation.get("parameters", [])}
        asked = {part[1:-1] for part in path.split("/") if part.startswith("{")}
        assert asked <= named, where
        if method == "post" and "requestBody" not in operation:
            assert not asked or operation.get("parameters"), where
    text = str(schema)
    used = {part.split("'")[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= models.keys()


async def test_a_key_is_asked_for_where_one_is_needed(tmp_path: Path) -> None:
    schema = await description(tmp_path, api_key=["secret"])
    assert schema["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    asks = {path for path, _, operation in operations(schema) if "security" in operation}
    free = {path for path, _, operation in operations(schema) if "security" not in operation}
    assert free == {"/health", "/version", "/v2/health/live", "/v2/health/ready"}
    async with serving(write_model(tmp_path / "other"), limits={"api_key": ["secret"]}) as (
        http,
        _,
    ):
        for path, method, _ in operations(schema):
            answer = await http.request(method, path.replace("{name}", "tiny"))
            assert (answer.status_code == 401) is (path in asks), path
