"""Errors in the form of the OpenAI API: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse


class ErrorBody(BaseModel):
    """The content of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every response that is no success."""

    error: ErrorBody


class ApiError(HTTPException):
    """An error that the client is told.

    Args:
        status: of HTTP.
        message: what was received, the cause and the usual fix.
        code: a short name of the cause.
        param: the field that is wrong.
        retry_after: seconds after which the client may try again.
        headers: more of them.

    Example:
        >>> ApiError(404, "there is no session 'a'.", "session_not_found").body()["error"]["type"]
        'invalid_request_error'
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        more = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            more["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, {**(headers or {}), **more})
        self.code, self.param = code, param

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As a response of HTTP."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Status 400."""
    return ApiError(400, message, code, param=param)


def invalid(errors: Any) -> ApiError:
    """The error of a request that does not fit its schema: the first field that is wrong."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header"))
    return bad_request(
        f"{place or 'the body'}: {first['msg'].removeprefix('Value error, ')}.".replace("..", "."), place or None
    )


def busy(message: str, seconds: int = 1) -> ApiError:
    """Status 429: try again."""
    return ApiError(429, message, "server_busy", retry_after=seconds)


def disk_error(error: Exception) -> ApiError:
    """Status 507: the session could not be written or removed, so the request had no effect."""
    return ApiError(507, f"the session could not be changed on disk, and is as it was before: {error}", "not_saved")
