"""The OpenAPI document says what the server does: every route is in it, and every request is answered as it says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import NEEDS

pytest.importorskip("fastapi", reason=NEEDS)

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 1},
    "/v1/sessions": {"id": "made"},
    "/v1/sessions/{id}/read": {"text": "a b"},
    "/v1/sessions/{id}/practice": {"texts": ["a b"], "passes": 1},
    "/v1/sessions/{id}/edit": {"facts": [{"prompt": "it is", "target": "a"}]},
    "/v1/sessions/{id}/score": {"text": "a b"},
    "/v1/sessions/{id}/health": {"text": "a b"},
    "/v1/sessions/{id}/fork": {"id": "copy"},
    "/v1/sessions/{id}/forget": {"levels": [0]},
}


@pytest.fixture(scope="module")
def document(client: Any) -> dict[str, Any]:
    client.post("/v1/sessions", json={"id": "one"})
    return client.get("/openapi.json").json()


def test_the_document_is_complete(document: dict[str, Any]) -> None:
    from nestlearn.serve import completions, learning, sessions

    told = {(path, method) for path, item in document["paths"].items() for method in item}
    routers: list[Any] = [completions.router, learning.router, sessions.router]
    routes = {(route.path, next(iter(route.methods)).lower()) for router in routers for route in router.routes}
    health = {(path, "get") for path in ("/healthz", "/readyz", "/metrics")}
    assert {(path.replace("{model}", "{model:path}"), method) for path, method in told} == routes | health
    assert {path for path, method in told if method == "post"} == VALID.keys()
    for path, method in told:
        operation = document["paths"][path][method]
        [success] = [code for code in operation["responses"] if code.startswith("2")]
        content = operation["responses"][success]["content"]
        assert operation["description"] and content, (path, method)
        assert all(kind.get("schema") or kind.get("itemSchema") for kind in content.values()), (path, method)
        assert content.get("application/json", {"schema": {"$ref": 1}})["schema"].keys() & {"$ref", "anyOf"}
        assert {"400", "401", "404", "429", "500"} <= operation["responses"].keys()
    names = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document))
    assert set(names) <= document["components"]["schemas"].keys()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(sorted(VALID)), data=st.data())
def test_whatever_is_sent_is_answered_in_the_form_of_the_api(
    client: Any, document: dict[str, Any], path: str, data: st.DataObject
) -> None:
    """One field of a good request, or all of it, becomes something else."""
    from nestlearn.serve.errors import ErrorResponse

    place = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][place["$ref"].rpartition("/")[2]] if "$ref" in place else place
    body: Any = dict(VALID[path])
    field = data.draw(st.sampled_from([*schema["properties"], None]))
    if field is None:
        body = data.draw(ANY)
    else:
        body[field] = data.draw(ANY)
    response = client.post(path.replace("{id}", "one"), json=body)
    assert response.status_code < 500, (path, body)
    if response.status_code >= 400:
        error = ErrorResponse.model_validate(response.json()).error
        assert error.message and error.code and error.type == "invalid_request_error"
    elif response.headers["content-type"] == "application/json":
        assert response.json()["object"]


def test_a_method_that_a_path_has_not_names_those_that_it_has(client: Any) -> None:
    for path, methods in (("/v1/sessions/one", "GET, PATCH, DELETE"), ("/v1/sessions", "GET, POST"), ("/", "GET")):
        response = client.request("TRACE", path)
        assert (response.status_code, response.headers["allow"]) == (405, methods)
        assert response.json()["error"]["code"] == "method_not_allowed"


def test_a_whole_number_may_have_a_point(client: Any) -> None:
    body = {**VALID["/v1/completions"], "max_tokens": 1.0, "n": 1.0, "seed": -3.0}
    assert client.post("/v1/completions", json=body).status_code == 200
    assert client.post("/v1/completions", json={**body, "max_tokens": 1.5}).status_code == 400
