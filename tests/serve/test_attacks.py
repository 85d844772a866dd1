"""Somebody means harm, or sends nonsense: other people's sessions, crafted files, JSON that no program writes."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import NEEDS, TEXT
from .test_sessions import bytes_of, new

pytest.importorskip("fastapi", reason=NEEDS)

ALICE = (
    "mine",
    "..%2falice%2fmine",
    "alice%2Fmine",
    "%2e%2e",
    "mine%00",
    "%ff",
    "m%C4%B1ne",
    "mine%2f..%2fmine",
    "x" * 5000,
)
BODIES: dict[str, Any] = {
    "read": {"text": "a b"}, "practice": {"texts": ["a b"]}, "score": {"text": "a b"}, "fork": {"id": "stolen"},
    "health": {"text": "a b"},
    "forget": {}, "edit": {"facts": [{"prompt": "Ann in Ulm", "target": "a"}]},
}  # fmt: skip


def test_no_route_leads_to_the_session_of_another_key(start: Any, tmp_path: Path) -> None:
    from nestlearn.serve.keys import Keys

    with closing(Keys(tmp_path)) as keys:
        alice, bob = ({"authorization": f"Bearer {keys.add(name)}"} for name in ("alice", "bob"))
    client = start(tmp_path)
    client.post("/v1/sessions", json={"id": "mine"}, headers=alice)
    client.post("/v1/sessions/mine/read", json={"text": TEXT, "name": "hidden"}, headers=alice)
    client.post("/v1/sessions", json={"id": "own"}, headers=bob)
    before = client.get("/v1/sessions/mine", headers=alice).json()
    places = [(path, method) for path, item in client.get("/openapi.json", headers=bob).json()["paths"].items()
              for method in item if "{id}" in path and method != "put"]  # fmt: skip
    assert len(places) == 13
    for path, method in places:
        for name in ALICE:
            place = path.replace("{id}", name).replace("{other}", "own").replace("{number}", "0")
            body = BODIES.get(path.rpartition("/")[2], {"learn": True} if method == "patch" else None)
            response = client.request(method, place, headers=bob, json=body)
            assert response.status_code in (400, 404) and "hidden" not in response.text, (method, place)
    for name in ALICE:
        assert client.get(f"/v1/sessions/own/diff/{name}", headers=bob).status_code in (400, 404)
    assert [one["id"] for one in client.get("/v1/sessions", headers=bob).json()["data"]] == ["own"]
    assert client.get("/v1/sessions/mine", headers=alice).json() == before


@pytest.mark.parametrize("content", [b"[" * 200_000 + b"]" * 200_000, b'{"text":' * 100_000 + b"1" + b"}" * 100_000])
@pytest.mark.parametrize("path", ["read", "score"])
def test_json_that_is_too_deep_is_no_json(client: Any, content: bytes, path: str) -> None:
    if client.get("/v1/sessions/deep").status_code == 404:
        new(client, "deep")
    response = client.post(f"/v1/sessions/deep/{path}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def entry(**more: Any) -> dict[str, Any]:
    return {"log": [{"what": "a", "when": "b", "bytes": 1, **more}]}


@pytest.mark.parametrize(
    "header",
    [
        entry(what=5), entry(when=None), entry(bytes="many"), entry(bytes=-1), entry(bytes=1.5), entry(what="\ud800"),
        {"log": "abc"}, {"context_length": 32.5}, {"context_length": 10**9}, {"settings": None}, {"compare": "x"},
        {"settings": {"protect": "a"}}, {"settings": {"protect": -1.0}}, {"spec": {"value": 1}},
    ],
)  # fmt: skip
def test_the_header_of_a_file_is_not_believed(client: Any, header: dict[str, Any], tmp_path: Path) -> None:
    from nestlearn.continual.session.file import SESSION_FILE

    path = "/v1/sessions/source"
    if client.get(path).status_code == 404:
        new(client, "source", TEXT)
    (tmp_path / "a").write_bytes(bytes_of(client, path))
    tensors, known = SESSION_FILE.read(tmp_path / "a")
    if isinstance(header.get("settings"), dict):
        header = {"settings": {**known["settings"], **header["settings"]}}
    SESSION_FILE.write(tmp_path / "b", tensors, {**known, **header})
    response = client.put("/v1/sessions/crafted/file", content=(tmp_path / "b").read_bytes())
    assert (response.status_code, response.json()["error"]["code"]) == (409, "foreign_session")
    assert client.get("/v1/sessions/crafted").status_code == 404


def test_a_session_whose_numbers_are_nonsense_is_refused(client: Any, tmp_path: Path) -> None:
    from nestlearn.continual.session.file import SESSION_FILE

    (tmp_path / "a").write_bytes(bytes_of(client, new(client, "numbers", TEXT)))
    tensors, known = SESSION_FILE.read(tmp_path / "a")
    for value in (float("nan"), float("inf")):
        wrong = {name: torch.full_like(x, value) if x.is_floating_point() else x for name, x in tensors.items()}
        SESSION_FILE.write(tmp_path / "b", wrong, known)
        response = client.put("/v1/sessions/nonsense/file", content=(tmp_path / "b").read_bytes())
        assert (response.status_code, response.json()["error"]["code"]) == (409, "foreign_session")


def test_probabilities_of_a_model_that_has_none_are_json(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session may learn until its numbers overflow."""
    decoder = client.app.state.server.worker.decoder
    for name in ("read", "step"):
        old = getattr(decoder, name)
        monkeypatch.setattr(decoder, name, lambda *given, old=old: old(*given) * float("nan"))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True}
    for stream in (False, True):
        told = client.post("/v1/chat/completions", json={**body, "temperature": 0, "stream": stream})
        assert told.status_code == 200 and "-9999.0" in told.text and "error" not in told.text
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "logprobs": 2, "temperature": 0}
    told = client.post("/v1/completions", json=body).json()
    assert json.dumps(told, allow_nan=False) and set(told["choices"][0]["logprobs"]["token_logprobs"]) == {-9999.0}


def test_a_folder_of_sessions_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    from nestlearn.serve.run import bind

    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--sessions .*file cannot be used: File exists"):
        bind("127.0.0.1", 0, tmp_path / "file")
