"""``/v1/sessions``: what each user's memory has read, and how it reads, practises, is copied, forgotten and moved."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import AsyncIterator, Generator
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import anyio
from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response, StreamingResponse

from nestlearn.continual.session import MemorySession
from nestlearn.continual.session.levels import LevelRow
from nestlearn.continual.session.reader import check_text, name_of_source

from .access import explain
from .errors import ApiError, bad_request
from .index import Entry
from .schemas import ChangeSession, ForgetRequest, ForkRequest, NewSession, PracticeRequest, ReadRequest
from .server import OwnerOf, Server, ServerOf
from .store import check_name
from .streams import JSON_OR_EVENTS, Events, to_the_end, while_connected

router = APIRouter(prefix="/v1/sessions")
FILE_PIECE = 2**20
SessionId = Annotated[str, InPath(alias="id", min_length=1, max_length=64)]
OtherId = Annotated[str, InPath(min_length=1, max_length=64)]


@router.post("", status_code=201)
async def create(body: NewSession, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """Make a session that has read nothing."""
    name = _name(body.id)
    async with server.store.writing(owner, name):
        await _refuse_existing(server, owner, name)
        return _view(await server.store.call(server.store.commit, owner, name, server.base, learn=body.learn))


@router.get("")
async def all_sessions(
    server: ServerOf,
    owner: OwnerOf,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=64, description="The last id of the page before.")] = None,
) -> dict[str, Any]:
    """The sessions of this key by their names, page by page."""
    found = await server.store.call(server.store.page, owner, after, limit + 1)
    page = [_view(entry) for entry in found[:limit]]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, **ends, "has_more": len(found) > limit}


@router.get("/{id}")
async def get(name: SessionId, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """A session with its levels and the documents that it has read."""
    entry, session = await server.store.call(server.store.open, owner, name)
    rows = await to_thread.run_sync(session.describe)
    documents = [asdict(document) for document in session.log]
    return {**_view(entry), "memory_bytes": session.nbytes, "levels": _levels(rows), "documents": documents}


@router.patch("/{id}")
async def change(name: SessionId, body: ChangeSession, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """Say whether the session learns from conversations."""
    async with server.store.writing(owner, name):
        return _view(await server.store.call(server.store.set_learn, owner, name, body.learn))


@router.delete("/{id}")
async def delete(name: SessionId, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """Remove a session and its file."""
    async with server.store.writing(owner, name):
        await server.store.call(server.store.delete, owner, name)
    return {"id": name, "object": "session.deleted", "deleted": True}


_READ_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": ReadRequest.model_json_schema()},
            "text/plain": {"schema": {"type": "string", "minLength": 1}},
        },
    }
}


@router.post("/{id}/read", response_model=None, openapi_extra=_READ_BODY, responses=JSON_OR_EVENTS)
async def read(
    name: SessionId,
    request: Request,
    server: ServerOf,
    owner: OwnerOf,
    title: Annotated[str | None, Query(alias="name", max_length=200, description="As in the body.")] = None,
    compare: Annotated[bool, Query(description="As in the body.")] = False,
    stream: Annotated[bool, Query(description="As in the body.")] = False,
) -> dict[str, Any] | Response:
    """Let a session read a text: JSON, or the text itself as ``text/plain`` (a file). Whole or not at all.

    Each event of a stream is a segment: its tokens, and its bits per byte before it was written.
    """
    asked = await _read_request(
        request, ReadRequest.model_construct(text="", name=title, compare=compare, stream=stream)
    )

    def steps(work: MemorySession) -> Generator[dict[str, Any], None, None]:
        return _reading(work, asked)

    return await _change(server, owner, name, request, steps, stream=asked.stream)


@router.post("/{id}/practice", response_model=None, responses=JSON_OR_EVENTS)
async def practice(
    name: SessionId, body: PracticeRequest, request: Request, server: ServerOf, owner: OwnerOf
) -> dict[str, Any] | Response:
    """Let a session learn texts by heart: read many times, with questions made from them. Whole or not at all."""
    for place, text in enumerate(body.texts):
        _check(text, f"texts.{place}")

    def steps(work: MemorySession) -> Generator[dict[str, Any], None, None]:
        return _practising(work, body)

    return await _change(server, owner, name, request, steps, stream=body.stream)


@router.post("/{id}/fork", status_code=201)
async def fork(name: SessionId, body: ForkRequest, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """Make another session that knows the same."""
    copy = _name(body.id)
    async with server.store.writing(owner, copy):
        await _refuse_existing(server, owner, copy)
        entry, session = await server.store.call(server.store.open, owner, name)
        made = await server.store.call(server.store.commit, owner, copy, session.fork(), learn=entry.learn, parent=name)
        return _view(made)


@router.post("/{id}/forget")
async def forget(name: SessionId, body: ForgetRequest, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """Return levels of a session to the model's own weights; without levels, forget everything."""
    async with server.store.writing(owner, name):
        _, session = await server.store.call(server.store.open, owner, name)
        work = session.fork()
        try:
            work.forget(body.levels)
        except ValueError as error:
            raise bad_request(str(error), "levels") from error
        return _view(await server.store.call(server.store.commit, owner, name, work))


@router.get("/{id}/diff/{other}")
async def diff(name: SessionId, other: OtherId, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """How far the levels of two sessions are apart, relative to the initial weights."""
    _, mine = await server.store.call(server.store.open, owner, name)
    _, theirs = await server.store.call(server.store.open, owner, other)
    rows = await to_thread.run_sync(mine.diff, theirs)
    return {"object": "session.diff", "id": name, "other": other, "levels": _levels(rows)}


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


@router.put("/{id}/file", openapi_extra=_FILE_BODY)
async def upload(name: SessionId, request: Request, server: ServerOf, owner: OwnerOf) -> dict[str, Any]:
    """Make a file that was downloaded, or written by `MemorySession.save`, this session. A foreign one is refused."""
    async with server.store.writing(owner, name):
        folder = server.store.folder / "uploads"
        folder.mkdir(exist_ok=True)
        path = folder / f"{secrets.token_hex(8)}.safetensors"
        try:
            async with await anyio.open_file(path, "wb") as file:
                async for piece in request.stream():
                    await file.write(piece)
            session = await _foreign_or_mine(server, path)
            return _view(await server.store.call(server.store.commit, owner, name, session))
        except OSError as error:
            raise ApiError(507, f"the file could not be stored: {error.strerror}.", "not_saved") from error
        finally:
            path.unlink(missing_ok=True)


async def _foreign_or_mine(server: Server, path: Path) -> MemorySession:
    """The session of an uploaded file.

    Raises:
        ApiError: it is none of this model (400).
    """
    try:
        session = await server.store.call(server.store.load, path)
        # The tensors of a foreign file may have the right names and other shapes: a copy reads a segment.
        async for _ in server.steps(session.fork().reading(["A text of some words, by which the shapes are tried."])):
            pass
    except ApiError:
        raise
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        message = str(error).splitlines()[0]
        raise bad_request(f"the file is no session of this model: {message}", "file", "foreign_session") from error
    return session


async def _change(
    server: Server, owner: str, name: str, request: Request, steps: Any, *, stream: bool
) -> dict[str, Any] | Response:
    """Run steps that change a fork of a session, and make it the session if all went well."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(server.store.writing(owner, name))
        _, session = await server.store.call(server.store.open, owner, name)
        work = session.fork()
        running = server.worker.task(steps(work))
        stack.callback(running.cancel)
        events = aiter(running)
        # The first step tells whether the text can be used at all.
        try:
            first = await anext(events)
        except (ValueError, TypeError, StopAsyncIteration) as error:
            raise bad_request(str(error) or "the text has no tokens.", "text") from error
        held = stack.pop_all()

    async def all_events() -> AsyncIterator[dict[str, Any]]:
        last = first
        yield first
        async for last in events:
            yield last
        entry = await to_the_end(server.store.call(server.store.commit, owner, name, work))
        server.metrics.tokens.labels("learned").inc(work.tokens - session.tokens)
        total = {field: value for field, value in last.items() if field != "segment"}
        yield {**total, "object": last["object"].removesuffix(".progress"), "session": _view(entry)}

    found = all_events()
    if stream:
        return Events(found, explain, held)

    async def whole() -> dict[str, Any]:
        return [event async for event in found][-1]

    return await while_connected(request, whole, held)


def _reading(work: MemorySession, asked: ReadRequest) -> Generator[dict[str, Any], None, None]:
    """Read a text; gives an event for every segment. All figures are of the text so far but ``segment``."""
    work.compare, before = ("off" if asked.compare else "none"), work.compare
    tokens = counted = nats = off = compared = 0.0
    known = 0  # segments that are compared: the newest are not yet
    # As a document in pieces: a text is never taken for the name of a file.
    for report in work.reading([asked.text], name=asked.name or name_of_source(asked.text)):
        segment = report.segments[-1]
        tokens, counted = tokens + segment.tokens, counted + segment.bytes
        nats += segment.nats
        for other in report.segments[known:]:
            if other.off is None:
                break
            off, compared, known = off + other.off, compared + other.bytes, known + 1
        yield {
            "object": "session.read.progress",
            "segment": {"number": len(report.segments), "tokens": segment.tokens, "bits_per_byte": _bits(
                segment.nats, segment.bytes), "off": _bits(segment.off, segment.bytes)},
            "tokens": int(tokens),
            "bytes": counted,
            "bits_per_byte": _bits(nats, counted),
            "off": _bits(off, compared) if known else None,
            "seconds": round(report.seconds, 3),
        }  # fmt: skip
    work.compare = before


def _bits(nats: float | None, count: float) -> float | None:
    """Bits per byte; None where there is none (JSON has no NaN)."""
    return None if nats is None or not count or not math.isfinite(nats) else nats / math.log(2) / count


def _practising(work: MemorySession, body: PracticeRequest) -> Generator[dict[str, Any], None, None]:
    texts = [[text] for text in body.texts]
    for report in work.practising(
        *texts, passes=body.passes, questions=body.questions, lr=body.lr, minutes=body.minutes, seed=body.seed
    ):
        yield {
            "object": "session.practice.progress",
            "step": report.steps,
            "steps": report.total,
            "questions": report.questions,
            "text": report.text[-1],
            "answers": report.answers[-1] if report.answers else None,
            "seconds": round(report.seconds, 3),
        }


async def _read_request(request: Request, given: ReadRequest) -> ReadRequest:
    """The request for a reading, whatever the type of its body.

    Raises:
        ApiError: the body is neither JSON nor text in UTF-8, or asks for an address.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    content = await request.body()
    if kind == "application/json":
        asked = _parse(content)
    elif kind in ("text/plain", "text/markdown", "application/octet-stream"):
        try:
            asked = given.model_copy(update={"text": content.decode()})
        except UnicodeDecodeError as error:
            raise bad_request(f"the text is not UTF-8: {error.reason} at byte {error.start}.", "text") from error
    else:
        raise ApiError(
            415,
            f"Content-Type {kind[:80]!r} is not supported; send application/json or text/plain.",
            "unsupported_type",
        )
    text = _check(asked.text, "text")
    if text.strip().startswith(("http://", "https://")) and len(text.split()) == 1:
        raise bad_request("this server fetches no addresses. Send the text itself.", "text", "url_refused")
    return asked


_READ = TypeAdapter(ReadRequest)


def _parse(content: bytes) -> ReadRequest:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}") from error
    if isinstance(found, dict) and "url" in found:
        raise bad_request("this server fetches no addresses. Send the text itself.", "url", "url_refused")
    try:
        return _READ.validate_python(found)
    except ValidationError as error:
        raise invalid(error.errors()) from error


def invalid(errors: Any) -> ApiError:
    """The error of a request that does not fit its schema: the first field that is wrong."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header"))
    return bad_request(f"{place or 'the body'}: {first['msg']}.".replace("..", "."), place or None)


def _check(text: str, param: str) -> str:
    try:
        check_text(text, "the text")
    except (ValueError, TypeError) as error:
        raise bad_request(str(error), param) from error
    if not text.strip():
        raise bad_request("the text is empty.", param)
    return text


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


def _view(entry: Entry) -> dict[str, Any]:
    """An entry as JSON."""
    return {"id": entry.name, "object": "session", "created": int(entry.created), "updated": int(entry.updated),
            "parent": entry.parent, "learn": entry.learn, "tokens": entry.tokens, "documents_read": entry.documents,
            "file_bytes": entry.size}  # fmt: skip


def _levels(rows: list[LevelRow]) -> list[dict[str, Any]]:
    """The rows of each level together; ``change`` is the mean over its networks, None where it has no measure."""
    grouped: dict[Any, list[LevelRow]] = {}
    for row in rows:
        grouped.setdefault(row.path if row.level is None else row.level, []).append(row)
    found = []
    for name, group in grouped.items():
        change = sum(row.change for row in group) / len(group)
        found.append({
            "level": name, "period": group[0].period, "rule": group[0].rule, "networks": len(group),
            "tokens": max(row.tokens for row in group), "change": change if math.isfinite(change) else None,
            "bytes": sum(row.bytes for row in group),
        })  # fmt: skip
    return found
