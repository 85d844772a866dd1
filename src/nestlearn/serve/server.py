"""The parts of a running server, and what its routes have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from nestlearn.continual.session import MemorySession

from .errors import ApiError
from .index import Entry
from .limits import Limits
from .metrics import Metrics
from .store import Store, check_name
from .worker import Worker

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """The parts of a server.

    Args:
        name: of the model.
        created: when the server began, seconds since 1970.
        base: a session that has read nothing.
        store: of the sessions.
        worker: that uses the model.
        limits, metrics: of the server.
    """

    name: str
    created: int
    base: MemorySession
    store: Store
    worker: Worker
    limits: Limits
    metrics: Metrics

    def check_model(self, name: str) -> None:
        """Raise ApiError (404) unless this is the name of the model."""
        if name != self.name:
            raise ApiError(
                404,
                f"there is no model {name[:200]!r}; this server has {self.name!r}.",
                "model_not_found",
                param="model",
            )

    async def session_or_base(self, owner: str, name: str | None) -> tuple[Entry | None, MemorySession]:
        """A session by its name. One that does not exist yet has read nothing."""
        if name is None:
            return None, self.base
        check_name(name, "user")
        try:
            return await self.store.call(self.store.open, owner, name)
        except ApiError as error:
            if error.code != "session_not_found":
                raise
        return None, self.base

    async def steps(self, steps: Generator[T, None, Any]) -> AsyncIterator[T]:
        """The steps of a generator that uses the model, each run by the worker."""
        async for step in self.worker.task(steps):
            yield step

    async def read(self, session: MemorySession, source: Any) -> None:
        """Let a session read something; readings of several sessions share passes."""
        async for _ in self.worker.task(session.asking(source), session):
            pass

    async def learn(self, owner: str, name: str, source: Any) -> Entry:
        """Let a session read something, and save it. It is made if it does not exist."""
        async with self.store.writing(owner, name, wait=True):
            _, session = await self.session_or_base(owner, name)
            work = session.fork()
            await self.read(work, source)
            self.metrics.tokens.labels("learned").inc(work.tokens - session.tokens)
            return await self.store.call(self.store.commit, owner, name, work)


def the_server(request: Request) -> Server:
    """The server that answers a request."""
    return request.app.state.server


def the_owner(request: Request) -> str:
    """Whose sessions the request may see."""
    return request.scope["owner"]


ServerOf = Annotated[Server, Depends(the_server)]
OwnerOf = Annotated[str, Depends(the_owner)]
