"""Sessions as resources: each operation equals that of `MemorySession`, and bad ones change nothing."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nestlearn import Fact, MemorySession
from nestlearn.data import byte_tokenizer
from nestlearn.models.stacking.general import own_text

from .conftest import NEEDS, TEXT

pytest.importorskip("fastapi", reason=NEEDS)


def new(client: Any, name: str, text: str = "") -> str:
    assert client.post("/v1/sessions", json={"id": name}).status_code == 201
    if text:
        assert client.post(f"/v1/sessions/{name}/read", json={"text": text}).status_code == 200
    return f"/v1/sessions/{name}"


def bytes_of(client: Any, path: str) -> bytes:
    return client.get(f"{path}/file").content


def test_reading_tells_bits_per_byte_segment_by_segment(client: Any, model: Any) -> None:
    path, asked = new(client, "reader"), {"text": TEXT, "stream": True}
    response = client.post(f"{path}/read", json={**asked, "compare": True, "levels": True, "name": "sheep.txt"})
    found = [json.loads(line[6:]) for line in response.text.split("\n\n") if line and line != "data: [DONE]"]
    session = MemorySession(model, byte_tokenizer(), compare="off")
    report = session.read([TEXT])
    assert len(found) == len(report.segments) + 1
    for event, segment in zip(found, report.segments, strict=False):
        assert event["segment"]["bits_per_byte"] == pytest.approx(segment.bits_per_byte, rel=1e-5)
    # Segments are compared some at a time, each once.
    compared = [one for event in found[:-1] for one in event["compared"]]
    assert [one["number"] for one in compared] == list(range(1, len(report.segments) + 1))
    for one, segment in zip(compared, report.segments, strict=True):
        assert one["off"] == pytest.approx((segment.off or 0) / math.log(2) / segment.bytes, rel=1e-5)
    last = found[-1]
    assert last["object"] == "session.read" and last["tokens"] == len(TEXT.encode())
    assert last["bits_per_byte"] == pytest.approx(report.bits_per_byte, rel=1e-5)
    assert last["off"] == pytest.approx(report.off, rel=1e-5)
    got = client.get(path).json()
    assert got["documents"][0]["what"] == "sheep.txt" and got["tokens"] == report.tokens
    assert [level["level"] for level in got["levels"]] == [0, 1] and last["levels"] == got["levels"]
    assert got["levels"][0]["change"] == pytest.approx(sum(r.change for r in session.diff() if r.level == 0) / 2)


def test_a_text_is_scored_with_and_without_what_was_learned(client: Any, model: Any) -> None:
    path, session = new(client, "scorer", TEXT), MemorySession(model, byte_tokenizer(), compare="none")
    base = session.score(TEXT)
    session.read([TEXT])
    before = bytes_of(client, path)
    found = client.post(f"{path}/score", json={"text": TEXT}).json()
    assert found["bits_per_byte"] == pytest.approx(session.score(TEXT), rel=1e-5) and found["bytes"] == len(TEXT)
    assert found["base"] == pytest.approx(base, rel=1e-5) and found["bits_per_byte"] < base
    assert bytes_of(client, path) == before
    assert client.post(f"{path}/score", json={"text": " "}).status_code == 400


def test_levels_are_measured_on_a_copy(client: Any, model: Any) -> None:
    path, session = new(client, "measured", TEXT), MemorySession(model, byte_tokenizer(), compare="levels")
    session.read([TEXT])
    before, text = bytes_of(client, path), "A lamp stands on the table. " * 8
    found = client.post(f"{path}/health", json={"text": text}).json()
    start = session.fork()
    report = session.read([text])
    assert found["tokens"] == report.tokens and found["off"] == pytest.approx(report.off, rel=1e-5)
    assert [level["level"] for level in found["levels"]] == [0, 1]
    for number, level in enumerate(found["levels"]):
        assert level["gain"] == pytest.approx(report.by_level[number] - report.bits_per_byte, abs=1e-5) != 0
        moved = [row.change for row in session.diff(start) if row.level == number]
        assert level["change"] == pytest.approx(sum(moved) / len(moved), rel=1e-4) and level["finding"] is None
    assert bytes_of(client, path) == before
    fresh = new(client, "fresh")
    levels = client.post(f"{fresh}/health", json={"text": text[:40]}).json()["levels"]
    assert levels[0]["finding"] is None and "period of 48 is not shorter than the 40 tokens" in levels[1]["finding"]
    for text in (" ", "a" * 10_001):
        assert client.post(f"{path}/health", json={"text": text}).status_code == 400


def test_a_file_is_read_and_is_the_text(client: Any) -> None:
    one, other = new(client, "json", TEXT), new(client, "plain")
    response = client.post(f"{other}/read?name=a.txt", content=TEXT.encode(), headers={"content-type": "text/plain"})
    assert response.json()["session"]["tokens"] == client.get(one).json()["tokens"]
    levels = client.get("/v1/sessions/json/diff/plain").json()["levels"]
    assert [level["change"] for level in levels] == [0, 0]


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b'{"url": "http://example.com/a"}', "application/json", 400, "url_refused"),
        (b'{"text": " https://example.com/a "}', "application/json", 400, "url_refused"),
        (b'{"text": "a", "speed": 3}', "application/json", 400, "invalid_value"),
        (b'{"text": ""}', "application/json", 400, "invalid_value"),
        (b'{"text": "a\\u0000b"}', "application/json", 400, "invalid_value"),
        (b'{"text": "\\ud800"}', "application/json", 400, "invalid_value"),
        (b"{", "application/json", 400, "invalid_value"),
        (b"\xff\xfeab", "text/plain", 400, "invalid_value"),
        (b"  \n", "text/plain", 400, "invalid_value"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "unsupported_type"),
    ],
)
def test_what_is_no_text_is_refused_and_nothing_learned(
    client: Any, content: bytes, kind: str, status: int, code: str
) -> None:
    path = "/v1/sessions/strict"
    if client.get(path).status_code == 404:
        new(client, "strict", TEXT[:40])
    before = bytes_of(client, path)
    response = client.post(f"{path}/read", content=content, headers={"content-type": kind})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert bytes_of(client, path) == before


def test_the_name_of_a_file_on_the_server_is_a_text_like_others(client: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hidden")
    path = new(client, "curious")
    for place in (str(tmp_path / "secret"), str(tmp_path / "absent")):
        assert client.post(f"{path}/read", json={"text": place}).status_code == 200
        assert client.post(f"{path}/practice", json={"texts": [place], "passes": 1}).status_code == 200


def test_practice_is_that_of_a_session(client: Any, model: Any) -> None:
    path = new(client, "pupil")
    body = {"texts": [TEXT], "passes": 2, "questions": 2}
    response = client.post(f"{path}/practice", json={**body, "stream": True})
    found = [json.loads(line[6:]) for line in response.text.split("\n\n") if line and line != "data: [DONE]"]
    session = MemorySession(model, byte_tokenizer(), compare="none")
    report = session.practice([TEXT], passes=2, questions=2)
    assert [event["text"] for event in found[:-1]] == pytest.approx(report.text, rel=1e-5)
    assert found[-1]["object"] == "session.practice" and found[-1]["session"]["documents_read"] == 1


def test_copies_forgetting_and_distance(client: Any) -> None:
    path = new(client, "first", TEXT)
    assert client.post(f"{path}/fork", json={"id": "second"}).json()["tokens"] == len(TEXT)
    assert client.post(f"{path}/fork", json={"id": "second"}).json()["error"]["code"] == "session_exists"
    assert client.post(f"{path}/forget", json={"levels": [0]}).status_code == 200
    rows = client.get("/v1/sessions/second/diff/first").json()["levels"]
    assert rows[0]["change"] > 0 and rows[1]["change"] == 0
    wrong = client.post(f"{path}/forget", json={"levels": [7]})
    assert wrong.status_code == 404 and "levels [7]" in wrong.json()["error"]["message"]
    assert client.post(f"{path}/forget", json={}).json()["documents_read"] == 0
    assert client.get(path).json()["memory_bytes"] == 0
    assert client.get("/v1/sessions/second").json()["tokens"] == len(TEXT)


def test_a_fork_knows_its_parent_and_those_of_a_deleted_one_get_the_next(client: Any) -> None:
    path = new(client, "root")
    client.post(f"{path}/fork", json={"id": "child"})
    client.post("/v1/sessions/child/fork", json={"id": "grandchild"})
    parents = [client.get(f"/v1/sessions/{name}").json()["parent"] for name in ("root", "child", "grandchild")]
    assert parents == [None, "root", "child"]
    client.post("/v1/sessions/grandchild/read", json={"text": "A line."})
    client.delete("/v1/sessions/child")
    assert client.get("/v1/sessions/grandchild").json()["parent"] == "root"


def test_files_go_out_and_come_back(client: Any, model: Any, tmp_path: Path) -> None:
    path, file = new(client, "mover", TEXT), tmp_path / "mine.safetensors"
    file.write_bytes(bytes_of(client, path))
    mine = MemorySession.load(file, model, byte_tokenizer())
    mine.read("More than was known. " * 4)
    mine.save(file)
    back = client.put("/v1/sessions/moved/file", content=file.read_bytes())
    assert back.status_code == 200 and back.json()["tokens"] == mine.tokens
    assert client.get("/v1/sessions/moved/diff/mover").json()["levels"][0]["change"] > 0
    # A file that is whole and has the right fingerprint, but holds tensors of other shapes.
    before = bytes_of(client, path)
    assert client.delete("/v1/sessions/moved").json()["deleted"]
    assert client.get("/v1/sessions/moved").status_code == 404
    tensors = load_file(file)
    mine._cursor = replace(mine._cursor, waiting=((259, 1),))
    mine.save(tmp_path / "token")
    for content in (
        b"", b"no session", before[:-9], _foreign(tensors, tmp_path), _other_shapes(file, tmp_path),
        (tmp_path / "token").read_bytes(),
    ):  # fmt: skip
        response = client.put(f"{path}/file", content=content)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "foreign_session")
    assert bytes_of(client, path) == before


def _foreign(tensors: dict[str, torch.Tensor], folder: Path) -> bytes:
    save_file(tensors, folder / "foreign")
    return (folder / "foreign").read_bytes()


def _other_shapes(file: Path, folder: Path) -> bytes:
    from nestlearn.continual.session.file import SESSION_FILE

    tensors, header = SESSION_FILE.read(file)
    cut = {name: x[..., :3] if x.dim() == 3 else x for name, x in tensors.items()}
    SESSION_FILE.write(folder / "cut", cut, header)
    return (folder / "cut").read_bytes()


def test_pages(start: Any) -> None:
    client = start()
    for name in "dbeac":
        client.post("/v1/sessions", json={"id": name})
    first = client.get("/v1/sessions?limit=2").json()
    assert [one["id"] for one in first["data"]] == ["a", "b"] and first["has_more"]
    rest = client.get(f"/v1/sessions?after={first['last_id']}").json()
    assert [one["id"] for one in rest["data"]] == ["c", "d", "e"] and not rest["has_more"]
    assert client.get("/v1/sessions?limit=0").status_code == client.get("/v1/sessions?limit=x").status_code == 400


@pytest.mark.parametrize(
    "name", ["", "..", "x" * 65, "a\nb", "a\n", " a", "a/b", "\u00fc" * 25, "a\u202eb", "\U0001f40e"]
)
def test_names_that_cannot_be(client: Any, name: str) -> None:
    response = client.post("/v1/sessions", json={"id": name})
    assert response.status_code == 400 and response.json()["error"]["param"] == "id"


def test_two_writers_are_refused(client: Any) -> None:
    """The second while the first reads: a stream whose reading has begun and was not taken off the queue yet."""
    path = new(client, "busy", TEXT)
    server = client.app.state.server
    steps, go = [], client.portal.call(_event)

    async def hold() -> None:
        async with server.store.writing("local", "busy"):
            steps.append("held")
            await go.wait()

    held = client.portal.start_task_soon(hold)
    while not steps:
        time.sleep(0.01)
    for method, place, body in (
        ("POST", f"{path}/read", {"text": "a b"}), ("POST", f"{path}/forget", {}), ("DELETE", path, None),
        ("PATCH", path, {"learn": True}), ("POST", f"{path}/practice", {"texts": ["a b"]}),
    ):  # fmt: skip
        response = client.request(method, place, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "session_busy")
        assert response.headers["retry-after"] == "1"
    assert client.get(path).status_code == 200
    client.portal.call(go.set)
    held.result()
    assert client.post(f"{path}/read", json={"text": "a b"}).status_code == 200


def _event() -> Any:
    import asyncio

    return asyncio.Event()


ANN = {"prompt": "Ann lives in", "target": "Ulm", "subject": "Ann"}


def test_facts_are_written_as_a_session_does_it_and_taken_back(
    client: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nestlearn.continual.session import editing

    # Little general text, which the model writes itself: that takes most of the time.
    monkeypatch.setattr(
        editing, "own_text", lambda *given, **more: own_text(*given, **{**more, "tokens": 32, "length": 8})
    )
    path, session = new(client, "editor"), MemorySession(model, byte_tokenizer(), compare="none")
    response = client.post(f"{path}/edit", json={"facts": [ANN], "method": "memit", "stream": True})
    found = [json.loads(line[6:]) for line in response.text.split("\n\n") if line and line != "data: [DONE]"]
    report = session.edit([Fact(**ANN)], method="memit")
    assert found[-1]["object"] == "session.edit" and found[-1]["after"] == pytest.approx(report.after, rel=1e-4)
    assert found[-1]["before"] == pytest.approx(report.before, rel=1e-4) and found[-1]["layers"] == list(report.layers)
    doing = [event["doing"] for event in found[:-1]]
    assert doing[-2:] == ["writing layer 1 of 1", "saving"] and "writing general text, token 7 of 256" in doing
    client.post(f"{path}/edit", json={"facts": [{**ANN, "target": "10"}], "method": "memit"})
    edits = client.get(path).json()["edits"]
    assert [edit["facts"][0]["target"] for edit in edits] == ["Ulm", "10"] and edits[0]["facts"] == [ANN]
    assert client.delete(f"{path}/edits/0").status_code == 200
    assert [edit["facts"][0]["target"] for edit in client.get(path).json()["edits"]] == ["10"]
    gone = client.delete(f"{path}/edits/1")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "edit_not_found")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"facts": []}, "facts"),
        ({"facts": [{"prompt": "it is", "target": "so"}]}, "no name or number"),
        ({"facts": [{"prompt": "Ann is", "target": " "}]}, "empty"),
        ({"facts": [{"prompt": "Ann \u0000", "target": "so"}]}, "NUL"),
        ({"facts": [{**ANN, "subject": "Bob"}]}, "not in the prompt"),
        ({"facts": [ANN], "method": "magic"}, "method"),
        ({"facts": [ANN], "layers": [0]}, "Extra inputs"),
        ({"facts": [{**ANN, "target": "x" * 201}]}, "200 characters"),
    ],
)
def test_facts_that_cannot_be_written_change_nothing(client: Any, body: dict[str, Any], said: str) -> None:
    path = "/v1/sessions/unedited"
    if client.get(path).status_code == 404:
        new(client, "unedited")
    before = bytes_of(client, path)
    response = client.post(f"{path}/edit", json=body)
    error = response.json()["error"]
    assert said in error["message"] and response.status_code == (409 if error["code"] == "cannot_edit" else 400)
    assert bytes_of(client, path) == before


def test_facts_that_do_not_suit_the_model_are_told_even_in_the_middle(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nestlearn.continual.editing import edit

    def fail(*_: Any) -> None:
        _[-1](0)
        raise ValueError("no later layer attends to it")

    monkeypatch.setattr(edit, "find_targets", fail)
    path = new(client, "unsuited")
    response = client.post(f"{path}/edit", json={"facts": [ANN], "method": "memit"})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "cannot_edit")
    told = client.post(f"{path}/edit", json={"facts": [ANN], "method": "memit", "stream": True}).text
    assert "target, step 1" in told and '"code": "cannot_edit"' in told
    assert client.get(path).json()["edits"] == []


def test_work_that_nobody_waits_for_ends_at_its_next_line() -> None:
    from nestlearn.serve.steps import GivenUp, steps_of

    ended = []

    def work(tell: Any) -> None:
        try:
            tell("one")
            tell("two")
        except GivenUp:
            ended.append(threading.current_thread().name)
            raise

    steps = steps_of(work)
    assert next(steps) == "one"
    steps.close()
    assert ended == ["nestlearn-steps"] and not any(thread.name in ended for thread in threading.enumerate())
