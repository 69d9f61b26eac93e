"""Requests that schemathesis makes up from the server's own OpenAPI, fitting and not: never a 500.

HALFBYTE_EXAMPLES says how many for each operation and mode; schemathesis is not in the extra `test`.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("schemathesis", reason="schemathesis is not installed")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from halfbyte.infer import Engine
from halfbyte.infer.server import Limits, make_app
from halfbyte.models import HalfbyteConfig

EXAMPLES = int(os.environ.get("HALFBYTE_EXAMPLES", "25"))
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
]


@pytest.fixture(scope="module")
def app(tiny_llama):
    config = HalfbyteConfig(block_size=32, compute_dtype=torch.float32)
    with Engine(tiny_llama, quantization=config, slots=4, queue_limit=8) as engine:
        yield make_app(engine, "tiny", limits=Limits(body=5000, tokens=3, seconds=300))


@pytest.fixture(scope="module")
def operations(app):
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    return {(made.ok().method.upper(), made.ok().path): made.ok() for made in schema.get_all_operations()}


def test_every_operation_is_here(operations):
    assert sorted(operations) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("key", OPERATIONS, ids=" ".join)
def test_never_a_500(app, operations, key, mode):
    """The test client raises what the application does not handle; refusals have the shape that the schema says."""
    from starlette.testclient import TestClient

    operation, client = operations[key], TestClient(app)
    if mode is GenerationMode.NEGATIVE and key[0] == "GET":
        pytest.skip("it takes no parameters that could be wrong: any path is some model's name")

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(mode), known=st.booleans())
    def ask(case, known):
        if known and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"  # else nearly every request ends at an unknown model
        response = case.call(session=client)
        if "text/event-stream" in (response.headers.get("content-type") or [""])[0]:
            assert "server_error" not in response.text
        else:
            case.validate_response(response, checks=CHECKS)
        assert response.status_code < 500

    ask()
