"""What happens to every request before and after it is handled: who asks, how large, how long, and one line of log."""

from __future__ import annotations

import json
import logging
import secrets
import time
import traceback
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .keys import Keys
from .limits import Limits
from .metrics import Metrics
from .streams import ClientGone

LOG = logging.getLogger("nestlearn.serve")
LOCAL = "local"
"""The owner of all sessions of a server without keys."""
PAGE_FILES = "/page/"
OPEN_PATHS = ("/healthz", "/readyz", "/")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class JsonLines(logging.Formatter):
    """A log record as one line of JSON.

    Example:
        >>> record = logging.makeLogRecord({"msg": "started", "levelname": "INFO", "fields": {"port": 80}})
        >>> line = json.loads(JsonLines().format(record))
        >>> line["event"], line["port"]
        ('started', 80)
    """

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return json.dumps({"time": when, "level": record.levelname.lower(), "event": record.getMessage(),
                           **getattr(record, "fields", {})})  # fmt: skip


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Write one line of log."""
    LOG.log(level, event, extra={"fields": fields})


def explain(error: Exception) -> ApiError:
    """The error that a client is told. One that is not meant for clients is logged: where it arose, and not its
    message, which may quote a text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took too long, and was given up.", "timeout", retry_after=5)
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    log("error", logging.ERROR, kind=type(error).__name__, frames=frames[-12:])
    return ApiError(500, "the server failed; its log says where.", "internal_error")


class Access:
    """The outermost layer of the application.

    Args:
        app: what is inside.
        keys: that let requests in.
        limits: of bodies and times.
        metrics: that count requests.
    """

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits, metrics: Metrics) -> None:
        self.app, self.keys, self.limits, self.metrics = app, keys, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, started = time.monotonic(), 499, False
        number = secrets.token_hex(8)

        async def sending(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", number.encode()),
                                      (b"x-content-type-options", b"nosniff")]  # fmt: skip
            await send(message)

        try:
            self._admit(scope)
            with anyio.fail_after(self.limits.seconds):
                await self.app(scope, _Body(scope, receive, self._body_limit(scope), self.limits.idle), sending)
        except (ClientGone, ClientDisconnect):
            pass
        except Exception as error:  # noqa: BLE001 - the server goes on, and the client is told
            found = explain(error)
            if not started:
                await found.response()(scope, receive, sending)
        finally:
            # The name of a session may be an address of mail: the log has the route only.
            route = getattr(scope.get("route"), "path", "(none)")
            seconds = time.monotonic() - began
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.requests.labels(method, route, str(status)).inc()
            log("request", id=number, owner=scope.get("owner"), method=method, route=route, status=status,
                milliseconds=round(1000 * seconds, 1))  # fmt: skip

    def _admit(self, scope: Scope) -> None:
        """Note the owner in the scope, or refuse the request."""
        headers = Headers(scope=scope)
        if scope["path"] in OPEN_PATHS or scope["path"].startswith(PAGE_FILES):
            return
        if not self.keys.needed:
            _refuse_foreign_pages(headers)
            scope["owner"] = LOCAL
            return
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        owner = self.keys.owner_of(secret.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise ApiError(
                401, "this server needs a key: send the header 'Authorization: Bearer nl-...'. Whoever runs the server "
                "makes keys by 'nestlearn serve keys add NAME'.", "invalid_api_key",
            )  # fmt: skip
        scope["owner"] = owner

    def _body_limit(self, scope: Scope) -> int:
        upload = scope["method"] == "PUT" and scope["path"].endswith("/file")
        return self.limits.file if upload else self.limits.body


def _refuse_foreign_pages(headers: Headers) -> None:
    """Without keys a page of another site, open in a browser on this machine, must not reach the server."""
    host = headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    origin = headers.get("origin")
    if name not in _LOCAL_HOSTS or (origin is not None and urlsplit(origin).netloc != host):
        raise ApiError(
            403, f"a server without keys answers this machine only; Host is {host[:80]!r}"
            f"{'' if origin is None else f' and Origin {origin[:80]!r}'}. Make a key: nestlearn serve keys add NAME.",
            "foreign_origin",
        )  # fmt: skip


class _Body:
    """The body of a request, which may be neither too large nor too slow. Behind its end it passes on what comes."""

    def __init__(self, scope: Scope, receive: Receive, limit: int, idle: float) -> None:
        self._receive, self._limit, self._idle = receive, limit, idle
        self._size, self._ended = 0, False
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body of the request exceeds {self._limit:,} bytes, the limit.", "body_too_large")

    async def __call__(self) -> Message:
        if self._ended:
            return await self._receive()
        try:
            with anyio.fail_after(self._idle):
                message = await self._receive()
        except TimeoutError as error:
            raise ApiError(408, f"no byte of the body came for {self._idle:g} seconds.", "body_too_slow") from error
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise self._too_large()
        self._ended = not message.get("more_body", False)
        return message
