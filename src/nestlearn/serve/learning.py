"""``/v1/sessions/{id}/read``, ``/practice``, ``/edit`` and ``/score``: a session learns, and predicts."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import asdict
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response

from nestlearn.continual.editing import EditReport, Fact
from nestlearn.continual.session import MemorySession, ReadReport
from nestlearn.continual.session.backends import PieceRead, ReadCall
from nestlearn.continual.session.reader import check_text, name_of_source
from nestlearn.levels.health import STILL

from .access import explain
from .errors import ApiError, bad_request, invalid
from .responses import EditResult, Health, PracticeResult, ReadResult, Score, Session, json_or_events
from .schemas import SOME_TEXT, EditRequest, FactOf, HealthRequest, PracticeRequest, ReadRequest, ScoreRequest
from .server import OwnerOf, Server, ServerOf
from .sessions import SessionId
from .steps import steps_of
from .streams import Events, to_the_end, while_connected
from .views import levels_of, view

router = APIRouter(prefix="/v1/sessions")


_READ_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": ReadRequest.model_json_schema()},
            "text/plain": {"schema": SOME_TEXT},
        },
    }
}


@router.post("/{id}/read", response_model=None, openapi_extra=_READ_BODY, responses=json_or_events(ReadResult))
async def read(
    name: SessionId,
    request: Request,
    server: ServerOf,
    owner: OwnerOf,
    title: Annotated[str | None, Query(alias="name", max_length=200, description="As in the body.")] = None,
    compare: Annotated[bool, Query(description="As in the body.")] = False,
    levels: Annotated[bool, Query(description="As in the body.")] = False,
    stream: Annotated[bool, Query(description="As in the body.")] = False,
) -> dict[str, Any] | Response:
    """Let a session read a text: JSON, or the text itself as ``text/plain`` (a file). Whole or not at all.

    Each event of a stream is a segment: its tokens, and its bits per byte before it was written. ``compared`` has the
    bits per byte of earlier segments with writes ignored, by their numbers: segments are compared some at a time.
    """
    asked = await _read_request(
        request, ReadRequest.model_construct(text="", name=title, compare=compare, levels=levels, stream=stream)
    )

    def steps(work: MemorySession) -> Generator[dict[str, Any] | list[ReadCall], list[PieceRead], None]:
        return _reading(work, asked)

    return await _change(server, owner, name, request, steps, stream=asked.stream)


@router.post("/{id}/practice", response_model=None, responses=json_or_events(PracticeResult))
async def practice(
    name: SessionId, body: PracticeRequest, request: Request, server: ServerOf, owner: OwnerOf
) -> dict[str, Any] | Response:
    """Let a session learn texts by heart: read many times, with questions made from them. Whole or not at all."""
    for place, text in enumerate(body.texts):
        _check(text, f"texts.{place}")

    def steps(work: MemorySession) -> Generator[dict[str, Any], None, None]:
        return _practising(work, body)

    return await _change(server, owner, name, request, steps, stream=body.stream)


@router.post("/{id}/edit", response_model=None, responses=json_or_events(EditResult))
async def edit(
    name: SessionId, body: EditRequest, request: Request, server: ServerOf, owner: OwnerOf
) -> dict[str, Any] | Response:
    """Write facts into a session (stacked models): all or none. ``before`` and ``after`` are nats per token of each."""
    facts = [_fact(fact, f"facts.{place}") for place, fact in enumerate(body.facts)]

    def steps(work: MemorySession) -> Generator[dict[str, Any], None, None]:
        return _editing(work, facts, body)

    return await _change(server, owner, name, request, steps, stream=body.stream)


@router.delete("/{id}/edits/{number}", response_model=Session)
async def undo(
    name: SessionId,
    number: Annotated[int, InPath(ge=0, le=10**6, description="Its place among the edits of the session.")],
    server: ServerOf,
    owner: OwnerOf,
) -> dict[str, Any]:
    """Take back one edit. Those behind it get the numbers before theirs."""
    async with server.store.writing(owner, name):
        _, session = await server.store.call(server.store.open, owner, name)
        work = session.fork()
        try:
            work.undo_edit(number)
        except ValueError as error:
            raise ApiError(404, str(error), "edit_not_found", param="number") from error
        return view(await server.store.call(server.store.commit, owner, name, work))


@router.post("/{id}/score", response_model=Score)
async def score(
    name: SessionId, body: ScoreRequest, request: Request, server: ServerOf, owner: OwnerOf
) -> dict[str, Any]:
    """How well a session predicts a text, in bits per byte, and how well the model does without it. Nothing changes."""
    _check(body.text, "text")
    _, session = await server.store.call(server.store.open, owner, name)

    async def found(of: MemorySession) -> ReadReport:
        reports = [report async for report in server.steps(of.scoring([body.text]))]
        if not reports:
            raise bad_request("the text has no tokens.", "text")
        return reports[-1]

    async def both() -> dict[str, Any]:
        mine, base = await found(session), await found(server.base)
        return {"object": "session.score", "id": name, "tokens": mine.tokens, "bytes": round(mine.bytes),
                "bits_per_byte": _finite(mine.bits_per_byte), "base": _finite(base.bits_per_byte)}  # fmt: skip

    return await while_connected(request, both, AsyncExitStack())


@router.post("/{id}/health", response_model=Health)
async def health(
    name: SessionId, body: HealthRequest, request: Request, server: ServerOf, owner: OwnerOf
) -> dict[str, Any]:
    """What each level does while the session reads a text, and levels that do nothing. A copy reads; nothing changes.

    The text is read once with all writes, and again without those of each level and of all.
    """
    _check(body.text, "text")
    _, session = await server.store.call(server.store.open, owner, name)
    work = session.fork()
    work.compare = "levels"

    async def measured() -> dict[str, Any]:
        reports = [report async for report in server.worker.task(work.asking([body.text]), work)]
        if not reports:
            raise bad_request("the text has no tokens.", "text")
        rows = levels_of(await to_thread.run_sync(work.diff, session))
        return {"object": "session.health", "id": name, **_health_of(reports[-1], rows)}

    return await while_connected(request, measured, AsyncExitStack())


def _health_of(report: ReadReport, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a reading with those of each level."""
    bits, levels = report.bits_per_byte, []
    for row in rows:
        without = report.by_level.get(row["level"])
        gain = None if without is None else _finite(without - bits)
        levels.append({**row, "gain": gain, "finding": _finding(row, gain, report.tokens)})
    off = None if report.off is None else _finite(report.off)
    return {"tokens": report.tokens, "bits_per_byte": _finite(bits), "off": off, "levels": levels}


def _finding(row: dict[str, Any], gain: float | None, tokens: int) -> str | None:
    """What a level did not do; see `nestlearn.levels.measure`, which also trains, for its findings on a model."""
    silent = gain is not None and abs(gain) < STILL
    if silent and row["period"] is not None and row["period"] >= tokens:
        return (
            f"its period of {row['period']:,} is not shorter than the {tokens:,} tokens of this text, and nothing that "
            "it wrote was read: measure with a longer text."
        )
    if gain is not None and row["change"] is not None and row["change"] < STILL:
        return f"it moved by {row['change']:.1g} of its norm in {tokens:,} tokens: it is dead."
    return "its writes change no prediction of this text." if silent else None


async def _change(
    server: Server, owner: str, name: str, request: Request, steps: Any, *, stream: bool
) -> dict[str, Any] | Response:
    """Run steps that change a fork of a session, and make it the session if all went well."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(server.store.writing(owner, name))
        _, session = await server.store.call(server.store.open, owner, name)
        work = session.fork()
        running = server.worker.task(steps(work), work)
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
        total = {field: value for field, value in last.items() if field not in ("segment", "compared", "doing")}
        if "levels" in total:  # the end of a document rounds them
            total["levels"] = levels_of(await to_thread.run_sync(work.describe))
        yield {**total, "object": last["object"].removesuffix(".progress"), "session": view(entry)}

    found = all_events()
    if stream:
        return Events(found, explain, held)

    async def whole() -> dict[str, Any]:
        return [event async for event in found][-1]

    return await while_connected(request, whole, held)


def _reading(
    work: MemorySession, asked: ReadRequest
) -> Generator[dict[str, Any] | list[ReadCall], list[PieceRead], None]:
    """Read a text; gives an event for every segment. All figures are of the text so far but ``segment``."""
    work.compare, before = ("off" if asked.compare else "none"), work.compare
    tokens = counted = nats = off = off_bytes = 0.0
    known = 0  # segments that are compared: the newest are not yet

    def event(report: ReadReport) -> dict[str, Any]:
        nonlocal tokens, counted, nats, off, off_bytes, known
        segment = report.segments[-1]
        tokens, counted = tokens + segment.tokens, counted + segment.bytes
        nats += segment.nats
        compared = []
        for other in report.segments[known:]:
            if other.off is None:
                break
            off, off_bytes, known = off + other.off, off_bytes + other.bytes, known + 1
            compared.append({"number": known, "off": _bits(other.off, other.bytes)})
        return {
            "object": "session.read.progress",
            "segment": {"number": len(report.segments), "tokens": segment.tokens,
                        "bits_per_byte": _bits(segment.nats, segment.bytes)},
            "compared": compared,
            **({"levels": levels_of(work.describe())} if asked.levels else {}),
            "tokens": int(tokens),
            "bytes": counted,
            "bits_per_byte": _bits(nats, counted),
            "off": _bits(off, off_bytes) if known else None,
            "seconds": round(report.seconds, 3),
        }  # fmt: skip

    # As a document in pieces: a text is never taken for the name of a file.
    steps = work.asking([asked.text], name=asked.name or name_of_source(asked.text))
    with closing(steps), suppress(StopIteration):
        given = next(steps)
        while True:
            if isinstance(given, list):
                given = steps.send((yield given))
            else:
                yield event(given)
                given = next(steps)
    work.compare = before


def _bits(nats: float | None, count: float) -> float | None:
    """Bits per byte; None where there is none."""
    return None if nats is None or not count else _finite(nats / math.log(2) / count)


def _finite(number: float) -> float | None:
    """JSON has no NaN."""
    return number if math.isfinite(number) else None


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


def _editing(work: MemorySession, facts: list[Fact], body: EditRequest) -> Generator[dict[str, Any], None, None]:
    """Edit; gives an event for every step, and then what was done."""

    def do(tell: Callable[[str], None]) -> EditReport:
        return work.edit(facts, method=body.method, progress=tell)

    kind, steps = {"object": "session.edit.progress"}, steps_of(do)
    try:
        while True:
            yield {**kind, "doing": next(steps)}
    except StopIteration as end:
        report = end.value
    except ValueError as error:  # only now is it known that the model cannot be edited like this
        raise ApiError(409, str(error), "cannot_edit", param="facts") from error
    finally:
        steps.close()
    yield {**kind, "doing": "saving", **asdict(report), "seconds": round(report.seconds, 3)}


def _fact(asked: FactOf, param: str) -> Fact:
    for text in (asked.prompt, asked.target):
        _check(text, param)
    try:
        return Fact(asked.prompt, asked.target, asked.subject)
    except ValueError as error:
        raise ApiError(409, str(error), "cannot_edit", param=param) from error


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
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {error}") from error
    if isinstance(found, dict) and "url" in found:
        raise bad_request("this server fetches no addresses. Send the text itself.", "url", "url_refused")
    try:
        return _READ.validate_python(found)
    except ValidationError as error:
        raise invalid(error.errors()) from error


def _check(text: str, param: str) -> str:
    try:
        check_text(text, "the text")
    except (ValueError, TypeError) as error:
        raise bad_request(str(error), param) from error
    if not text.strip():
        raise bad_request("the text is empty.", param)
    return text
