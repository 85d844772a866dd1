"""The application: a model, a folder of sessions, and the routes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Match

from nestlearn import __version__
from nestlearn.continual.session import MemorySession
from nestlearn.continual.session.decoding import decoder_of
from nestlearn.continual.session.turns import has_changing_table
from nestlearn.models.generation import end_tokens

from . import completions, learning, page, sessions
from .access import METHODS, Access, log
from .errors import ApiError, ErrorResponse, invalid
from .keys import Keys
from .limits import Limits
from .metrics import Metrics
from .responses import EVENTS, Status
from .server import Server, ServerOf
from .store import Store
from .worker import Worker

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The request cannot be used.", 401: "No valid key.", 403: "Not from there.", 404: "No such thing.",
        408: "The body came too slowly.", 409: "It exists already, is being changed, or does not suit the model.",
        413: "The body is too large.", 415: "The type of the body is not supported.",
        429: "Too many requests, or a quota.", 500: "The server failed.", 503: "The server is stopping.",
        504: "It took too long.", 507: "The disk is full; nothing has changed.",
    }.items()
}  # fmt: skip


def app(model: Any, tokenizer: Any, folder: Path, *, name: str = "nestlearn", limits: Limits | None = None) -> FastAPI:
    """The ASGI application that serves a model and the sessions in a folder.

    Sessions are opened when it starts (``lifespan``) and closed when it stops. What a request has changed is on
    disk before the request is answered.

    Args:
        model: a stacked model or a `HopeForCausalLM`, in evaluation mode.
        tokenizer: of the model.
        folder: of the index and the session files.
        name: of the model in the API.
        limits: of requests; the defaults of `Limits`.

    Raises:
        ValueError: a model without memory, or one whose forward passes change each other.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> from starlette.testclient import TestClient
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, max_position_embeddings=128)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=16)]).eval()
        >>> with TestClient(app(model, byte_tokenizer(), Path("sessions")), base_url="http://localhost") as client:
        ...     _ = client.post("/v1/sessions", json={"id": "me"})
        ...     client.post("/v1/sessions/me/read", json={"text": "What is read is known."}).json()["tokens"]
        22
    """
    limits, metrics = limits or Limits(), Metrics()
    if has_changing_table(model):
        raise ValueError(
            f"the rotary table of this {type(model).__name__} depends on the longest input so far, so answers that are "
            "generated together would change each other. Serve a model with another rope_type."
        )
    base = MemorySession(model, tokenizer, compare="none")
    keys = Keys(folder)

    made = FastAPI(
        title="nestlearn serve", version=__version__, responses=ERRORS, redoc_url=None, docs_url=None,
        lifespan=lambda made: _running(made, base, folder, name, limits, metrics, keys),
    )  # fmt: skip
    for router in (completions.router, sessions.router, learning.router, page.router, _health(metrics)):
        made.include_router(router)
    made.add_exception_handler(RequestValidationError, _invalid)
    made.add_exception_handler(HTTPException, _http_error)
    made.add_middleware(Access, keys=keys, limits=limits, metrics=metrics)
    _describe(made)
    return made


@asynccontextmanager
async def _running(
    made: FastAPI, base: MemorySession, folder: Path, name: str, limits: Limits, metrics: Metrics, keys: Keys
) -> AsyncIterator[None]:
    """The parts of the server, from its start to its stop."""
    store, decoder = Store(folder, base, limits), decoder_of(base)
    worker = Worker(decoder, base.tokenizer, end_tokens(base.model, base.tokenizer), decoder.never, limits)
    made.state.server = Server(name, int(time.time()), base, store, worker, limits, metrics)
    metrics.watch("nestlearn_answers", "Answers that are generated or wait.", lambda: worker.answers)
    metrics.watch("nestlearn_resident_bytes", "Bytes of sessions in memory.", lambda: store.resident_bytes)
    for sentence in store.repaired:
        log("repair", what=sentence)
    worker.start()
    log("start", model=name, version=__version__)
    try:
        yield
    finally:
        worker.stop()
        store.close()
        keys.close()
        log("stop")


def _health(metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz", response_model=Status)
    async def alive() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @router.get("/readyz", response_model=Status)
    async def ready(server: ServerOf) -> dict[str, str]:
        """The model answers."""
        if not server.worker.alive:
            raise ApiError(503, "the server is stopping.", "server_stopping")
        return {"status": "ready"}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return invalid(error.errors()).response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        codes = {404: "unknown_url", 405: "method_not_allowed"}
        headers = {**(error.headers or {}), **({"Allow": _allowed(request)} if error.status_code == 405 else {})}
        error = ApiError(error.status_code, message, codes.get(error.status_code, "bad_request"), headers=headers)
    return error.response()


def _allowed(request: Request) -> str:
    """The methods of a path: more than one route may have it."""
    routes = request.app.routes
    found = (m for m in METHODS if any(r.matches({**request.scope, "method": m})[0] == Match.FULL for r in routes))
    return ", ".join(found)


def _describe(made: FastAPI) -> None:
    """Complete the OpenAPI document: keys, the events of streams, and status 400 for what does not fit a schema."""
    write = made.openapi

    def openapi() -> dict[str, Any]:
        document = write()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        place = "#/components/schemas/{model}"
        _, events = models_json_schema([(event, "serialization") for event in EVENTS.values()], ref_template=place)
        parts = document["components"]
        parts["schemas"] = {**events["$defs"], **parts["schemas"]}
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"key": []}]  # a server without keys needs none
        return document

    made.openapi = openapi
