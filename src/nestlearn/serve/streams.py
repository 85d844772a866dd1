"""Server-sent events, and work that ends when its client has gone."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed its connection."""


async def while_connected(request: Request, work: Callable[[], Awaitable[T]], held: AsyncExitStack) -> T:
    """The result of some work, which is cancelled if the client goes. What was ``held`` for it is let go behind it.

    Raises:
        ClientGone: it has gone.
    """
    found: list[T] = []
    errors: list[Exception] = []
    async with held, anyio.create_task_group() as group:

        async def run() -> None:
            try:
                found.append(await work())
            except Exception as error:  # noqa: BLE001 - raised again below, not as a group of errors
                errors.append(error)
            group.cancel_scope.cancel()

        group.start_soon(run)
        await _gone(request.receive)
        group.cancel_scope.cancel()
    if errors:
        raise errors[0]
    if not found:
        raise ClientGone
    return found[0]


async def to_the_end(work: Awaitable[T]) -> T:
    """The result of some work that goes on even if the client goes meanwhile."""
    found: list[T] = []
    with anyio.CancelScope(shield=True):
        found.append(await work)
    return found[0]


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """A stream of server-sent events, each a JSON object, and ``[DONE]`` behind the last.

    An error in the middle becomes an event ``{"error": ...}``. If the client goes, the generator of events is closed.

    Args:
        events: the objects.
        explain: the error that the client is told in place of an exception.
        held: for the events; it is let go behind the last.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[Any], explain: Callable[[Exception], ApiError], held: AsyncExitStack
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._explain, self._held = events, explain, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held, anyio.create_task_group() as group:

            async def run() -> None:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                try:
                    async for line in self._lines():
                        await send({"type": "http.response.body", "body": line, "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                except OSError:  # the client has gone
                    pass
                finally:
                    close = getattr(self._events, "aclose", None)
                    if close is not None:
                        with anyio.CancelScope(shield=True):
                            await close()
                group.cancel_scope.cancel()

            group.start_soon(run)
            await _gone(receive)
            group.cancel_scope.cancel()

    async def _lines(self) -> AsyncIterator[bytes]:
        try:
            async for event in self._events:
                yield _line(json.dumps(event, allow_nan=False))
        except Exception as error:  # noqa: BLE001 - the status was sent already, so the stream tells it
            yield _line(json.dumps(self._explain(error).body()))
        yield _line("[DONE]")


def _line(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
