"""The order of the worker's steps: what shares a pass, and what waits for what."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from nestlearn import MemorySession
from nestlearn.continual.session.decoding import decoder_of
from nestlearn.data import byte_tokenizer

from .conftest import NEEDS, TEXT

pytest.importorskip("fastapi", reason=NEEDS)


@pytest.fixture
def watched(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, MemorySession, list[Any]]]:
    """A worker whose rounds the test runs, a session, and what the worker does: "token", or tokens of each reading."""
    from nestlearn.serve import Limits, worker

    base, done = MemorySession(model, byte_tokenizer(), compare="none"), []
    made = worker.Worker(decoder_of(base), byte_tokenizer(), ends=(), never=(), limits=Limits())
    read, step = worker.read_rows, made.decoder.step

    def reads(calls: Any) -> Any:
        done.append([len(call.ids) for _, call in calls])
        return read(calls)

    def steps(tokens: Any) -> Any:
        done.append("token")
        return step(tokens)

    monkeypatch.setattr(worker, "read_rows", reads)
    made.decoder.step = steps
    yield made, base, done
    for task in made._tasks:
        task.steps.close()  # a reading is closed by the thread that began it, not by the garbage collector of another


def texts() -> list[str]:
    return [TEXT, TEXT[::-1], TEXT[7:]]


def test_readings_share_passes_while_nobody_waits_for_an_answer(watched: Any) -> None:
    worker, base, done = watched
    sessions, alone = [base.fork() for _ in texts()], [base.fork() for _ in texts()]

    async def run() -> None:
        for session, text in zip(sessions, texts(), strict=True):
            worker.task(session.asking([text]), session)
        while worker._tasks:
            worker._round()

    asyncio.run(run())
    assert max(map(len, done)) == 3 and len(done) <= max(len(text) for text in texts()) // 16 + 3
    for session, text, other in zip(sessions, texts(), alone, strict=True):
        other.read([text])
        assert session.tokens == other.tokens and all(
            mine.change == pytest.approx(its.change, rel=1e-4)
            for mine, its in zip(session.describe(), other.describe(), strict=True)
        )


def test_an_answer_waits_for_one_segment_at_most(watched: Any) -> None:
    """Between two of its tokens one session reads one segment, however many want to."""
    worker, base, done = watched
    options: dict[str, Any] = {"limit": 20, "temperature": 0.0, "top_p": 1.0, "seed": None, "stop": (), "top": None}

    async def run() -> None:
        worker.answer(base, [65] * 5, **options)
        worker._round()
        for text in texts():
            session = base.fork()
            worker.task(session.asking([text]), session)
        while worker._rows:
            worker._round()

    asyncio.run(run())
    assert done.count("token") == 19 and done.count([16]) > 12
    while done[-1] != "token":  # of the round in which the answer ends
        done.pop()
    assert all(read == "token" or (len(read) == 1 and done[i + 1] == "token") for i, read in enumerate(done))


def test_a_prompt_that_fails_does_not_fail_those_beside_it(watched: Any) -> None:
    worker, base, _ = watched
    broken = base.fork()
    broken.read([TEXT])
    broken._cursor.memory.levels.networks["model.layers.0.mlp"][0].weights.anchor["up"].resize_(1, 2, 3)
    options: dict[str, Any] = {"limit": 3, "temperature": 0.0, "top_p": 1.0, "seed": None, "stop": (), "top": None}

    async def run() -> list[Any]:
        streams = [worker.answer(session, [65] * 5, **options) for session in (base, broken)]
        while worker.answers:
            worker._round()
        found: list[Any] = []
        for stream in streams:
            try:
                found.append([piece async for piece in stream][-1].tokens)
            except RuntimeError as error:
                found.append(error)
        return found

    tokens, error = asyncio.run(run())
    assert tokens == 3 and isinstance(error, RuntimeError)


def test_a_reading_that_fails_does_not_fail_those_beside_it(watched: Any) -> None:
    worker, base, _ = watched
    whole, broken = base.fork(), base.fork()
    broken.read([TEXT])
    broken._cursor.memory.levels.networks["model.layers.0.mlp"][0].weights.params["up"].resize_(1, 2, 3)
    streams = []

    async def run() -> list[Any]:
        for session in (whole, broken):
            streams.append(worker.task(session.asking([TEXT]), session))
        while worker._tasks:
            worker._round()
        found: list[Any] = []
        for stream in streams:
            try:
                found.append([report async for report in stream][-1].tokens)
            except RuntimeError as error:
                found.append(error)
        return found

    tokens, error = asyncio.run(run())
    assert tokens == len(TEXT) == whole.tokens and isinstance(error, RuntimeError)


def test_a_reading_that_nobody_waits_for_ends_and_lets_its_session_go(watched: Any) -> None:
    worker, base, done = watched
    session = base.fork()

    async def run() -> None:
        stream = worker.task(session.asking([TEXT]), session)
        while len(done) < 2:
            worker._round()
        stream.cancel()
        worker._round()

    asyncio.run(run())
    assert not worker._tasks and len(done) == 2
    free = threading.Thread(target=session.read, args=([TEXT],), daemon=True)
    free.start()
    free.join(10)
    assert not free.is_alive() and session.tokens > len(TEXT)
