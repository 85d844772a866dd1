"""``/v1/sessions``: sessions are made, listed, described, copied, compared, forgotten, moved and deleted."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import anyio
from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from starlette.responses import Response, StreamingResponse

from nestlearn.continual.session import MemorySession

from .errors import ApiError
from .responses import Deleted, Diff, Session, SessionDetails, SessionPage
from .schemas import ChangeSession, ForgetRequest, ForkRequest, NewSession, SessionName
from .server import OwnerOf, Server, ServerOf
from .store import check_name
from .views import edits_of, levels_of, view

router = APIRouter(prefix="/v1/sessions")
FILE_PIECE = 2**20
TRIAL = "A text of some words, by which the file of a session is tried."
SessionId = Annotated[SessionName, InPath(alias="id")]
OtherId = Annotated[SessionName, InPath()]


@router.post("", status_code=201, response_model=Session)
async def create(body: NewSession, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """Make a session that has read nothing."""
    name = _name(body.id)
    async with server.store.writing(owner, name):
        await _refuse_existing(server, owner, name)
        return view(await server.store.call(server.store.commit, owner, name, server.base, learn=body.learn))


@router.get("", response_model=SessionPage)
async def all_sessions(
    server: ServerOf,
    owner: OwnerOf,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=64, description="The last id of the page before.")] = None,
) -> dict[str, Any]:
    """The sessions of this key by their names, page by page."""
    found = await server.store.call(server.store.page, owner, after, limit + 1)
    page = [view(entry) for entry in found[:limit]]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, **ends, "has_more": len(found) > limit}


@router.get("/{id}", response_model=SessionDetails)
async def get(name: SessionId, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """A session with its levels, the documents that it has read, and its edits in force."""
    entry, session = await server.store.call(server.store.open, owner, name)
    rows = await to_thread.run_sync(session.describe)
    documents = [asdict(document) for document in session.log]
    return {**view(entry), "memory_bytes": session.nbytes, "levels": levels_of(rows), "documents": documents,
            "edits": edits_of(session)}  # fmt: skip


@router.patch("/{id}", response_model=Session)
async def change(name: SessionId, body: ChangeSession, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """Say whether the session learns from conversations."""
    async with server.store.writing(owner, name):
        return view(await server.store.call(server.store.set_learn, owner, name, body.learn))


@router.delete("/{id}", response_model=Deleted)
async def delete(name: SessionId, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """Remove a session and its file."""
    async with server.store.writing(owner, name):
        await server.store.call(server.store.delete, owner, name)
    return {"id": name, "object": "session.deleted", "deleted": True}


@router.post("/{id}/fork", status_code=201, response_model=Session)
async def fork(name: SessionId, body: ForkRequest, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """Make another session that knows the same."""
    copy = _name(body.id)
    async with server.store.writing(owner, copy):
        await _refuse_existing(server, owner, copy)
        entry, session = await server.store.call(server.store.open, owner, name)
        made = await server.store.call(server.store.commit, owner, copy, session.fork(), learn=entry.learn, parent=name)
        return view(made)


@router.post("/{id}/forget", response_model=Session)
async def forget(name: SessionId, body: ForgetRequest, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """Return levels of a session to the model's own weights; without levels, forget everything."""
    async with server.store.writing(owner, name):
        _, session = await server.store.call(server.store.open, owner, name)
        work = session.fork()
        try:
            work.forget(body.levels)
        except ValueError as error:
            raise ApiError(404, str(error), "level_not_found", param="levels") from error
        return view(await server.store.call(server.store.commit, owner, name, work))


@router.get("/{id}/diff/{other}", response_model=Diff)
async def diff(name: SessionId, other: OtherId, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """How far the levels of two sessions are apart, relative to the initial weights."""
    _, mine = await server.store.call(server.store.open, owner, name)
    _, theirs = await server.store.call(server.store.open, owner, other)
    rows = await to_thread.run_sync(mine.diff, theirs)
    return {"object": "session.diff", "id": name, "other": other, "levels": levels_of(rows)}


_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


@router.get("/{id}/file", response_class=Response, responses=_FILE)
async def download(name: SessionId, server: ServerOf, owner: OwnerOf) -> Response:
    """The session as a safetensors file, which `MemorySession.load` reads as well."""
    entry, file = await server.store.call(server.store.read_file, owner, name)

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while piece := await to_thread.run_sync(file.read, FILE_PIECE):
                yield piece
        finally:
            file.close()

    headers = {"Content-Length": str(entry.size), "Content-Disposition": 'attachment; filename="session.safetensors"'}
    return StreamingResponse(pieces(), media_type="application/octet-stream", headers=headers)


_FILE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.put("/{id}/file", response_model=Session, openapi_extra=_FILE_BODY)
async def upload(name: SessionId, request: Request, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """Make a file that was downloaded, or written by `MemorySession.save`, this session. A foreign one is refused."""
    async with server.store.writing(owner, name):
        path = server.store.folder / "uploads" / f"{secrets.token_hex(8)}.safetensors"
        try:
            path.parent.mkdir(exist_ok=True)
            async with await anyio.open_file(path, "wb") as file:
                async for piece in request.stream():
                    await file.write(piece)
            session = await _foreign_or_mine(server, path)
            return view(await server.store.call(server.store.commit, owner, name, session))
        except OSError as error:
            raise ApiError(507, f"the file could not be stored: {error.strerror}.", "not_saved") from error
        finally:
            path.unlink(missing_ok=True)


async def _foreign_or_mine(server: Server, path: Path) -> MemorySession:
    """The session of an uploaded file.

    Raises:
        ApiError: it is none of this model (409).
    """
    try:
        session = await server.store.call(server.store.load, path)
        # The tensors of a foreign file may have the right names and other shapes: a copy reads a segment.
        await server.read(session.fork(), [TRIAL])
        async for report in server.steps(session.scoring([TRIAL])):
            if not math.isfinite(report.bits_per_byte):
                raise ValueError("its numbers are not finite, or overflow.")
    except ApiError:
        raise
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        message = str(error).splitlines()[0]
        message = f"the file is no session of this model: {message}"
        raise ApiError(409, message, "foreign_session", param="file") from error
    return session


def _name(asked: str | None) -> str:
    return f"session-{secrets.token_hex(8)}" if asked is None else check_name(asked)


async def _refuse_existing(server: Server, owner: str, name: str) -> None:
    try:
        await server.store.call(server.store.entry, owner, name)
    except ApiError as error:
        if error.status_code != 404:
            raise
        return
    raise ApiError(409, f"session {name!r} exists already. Choose another name, or delete it first.", "session_exists")
