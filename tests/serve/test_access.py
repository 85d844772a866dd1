"""Who may ask, and how much: keys, foreign pages, sizes, times, quotas; and what the log and the figures tell."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from .conftest import NEEDS, TEXT
from .test_completions import HELLO, chat

pytest.importorskip("fastapi", reason=NEEDS)


@pytest.fixture(scope="module")
def guarded(start: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, dict[str, str]]]:
    from nestlearn.serve.keys import Keys

    folder = tmp_path_factory.mktemp("guarded")
    with closing(Keys(folder)) as keys:
        found = {name: {"authorization": f"Bearer {keys.add(name)}"} for name in ("alice", "bob", "carol")}
        keys.revoke("carol")
    return start(folder), found


def test_without_a_key_in_force_nothing_is_told(guarded: Any) -> None:
    client, keys = guarded
    for headers in ({}, {"authorization": "Bearer nl-guess"}, {"authorization": "Basic x"}, keys["carol"]):
        for path in ("/v1/models", "/v1/sessions", "/metrics", "/openapi.json", "/v1/nowhere"):
            response = client.get(path, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_each_key_sees_its_own_sessions_only(guarded: Any) -> None:
    client, keys = guarded
    alice, bob = keys["alice"], keys["bob"]
    client.post("/v1/sessions", json={"id": "mine"}, headers=alice)
    client.post("/v1/sessions/mine/read", json={"text": TEXT}, headers=alice)
    file = client.get("/v1/sessions/mine/file", headers=alice).content
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0}
    plain = client.post("/v1/chat/completions", json=body, headers=bob).json()["choices"][0]["message"]
    own = client.post("/v1/chat/completions", json={**body, "user": "mine"}, headers=alice).json()
    assert own["choices"][0]["message"] != plain
    for owner in ("alice/mine", "../alice/mine", "mine"):
        found = client.post("/v1/chat/completions", json={**body, "user": owner}, headers=bob)
        assert found.status_code == 400 or found.json()["choices"][0]["message"] == plain
    for method, path, json in (
        ("GET", "", None), ("GET", "/file", None), ("POST", "/read", {"text": "x y"}), ("POST", "/forget", {}),
        ("POST", "/fork", {"id": "stolen"}), ("DELETE", "", None), ("PATCH", "", {"learn": True}),
        ("POST", "/practice", {"texts": ["x y"]}), ("GET", "/diff/mine", None),
    ):  # fmt: skip
        response = client.request(method, f"/v1/sessions/mine{path}", json=json, headers=bob)
        assert response.status_code == 404, (method, path)
    assert client.get("/v1/sessions", headers=bob).json()["data"] == []
    # The same name is another session for each.
    client.put("/v1/sessions/mine/file", content=file, headers=bob)
    client.post("/v1/sessions/mine/forget", json={}, headers=bob)
    assert client.get("/v1/sessions/mine", headers=alice).json()["tokens"] == len(TEXT)
    assert client.get("/v1/sessions/mine/file", headers=alice).content == file


def test_without_keys_pages_of_other_sites_are_refused(client: Any) -> None:
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}, {"host": ""}):
        assert client.get("/v1/models", headers=headers).json()["error"]["code"] == "foreign_origin"
    for headers in ({"host": "127.0.0.1:8000"}, {"host": "[::1]:80"}, {"origin": "http://localhost"}):
        assert client.get("/v1/models", headers=headers).status_code == 200
    answer = client.options("/v1/models", headers={"origin": "http://localhost"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_other_addresses_need_keys_and_a_free_port(tmp_path: Path) -> None:
    from nestlearn.serve.keys import Keys
    from nestlearn.serve.run import bind

    with pytest.raises(ValueError, match="there are no keys. Make one first"):
        bind("0.0.0.0", 0, tmp_path)
    with closing(Keys(tmp_path)) as keys:
        keys.add("alice")
        with bind("0.0.0.0", 0, tmp_path) as first:
            first.listen()
            with pytest.raises(ValueError, match="cannot be used: Address already in use"):
                bind("0.0.0.0", first.getsockname()[1], tmp_path)
        keys.revoke("alice")
    with pytest.raises(ValueError, match="there are no keys"):
        bind("0.0.0.0", 0, tmp_path)


def test_sizes_and_quotas(start: Any) -> None:
    client = start(body=2000, file=40000, sessions=2, quota=100_000, seconds=30)
    long = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 3000}]}
    assert client.post("/v1/chat/completions", json=long).json()["error"]["code"] == "body_too_large"
    # Without a length the body is counted as it comes.
    response = client.post(
        "/v1/sessions/a/read", content=iter([b"x" * 1500] * 3), headers={"content-type": "text/plain"}
    )
    assert response.status_code == 413
    assert client.put("/v1/sessions/a/file", content=iter([b"x" * 30000] * 2)).status_code == 413
    assert not list((client.app.state.server.store.folder / "uploads").iterdir())
    for name in "ab":
        assert client.post("/v1/sessions", json={"id": name}).status_code == 201
    refused = client.post("/v1/sessions", json={"id": "c"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    codes = [client.post(f"/v1/sessions/{name}/read", json={"text": TEXT}).status_code for name in "ab"]
    small = start(quota=3000)
    small.post("/v1/sessions", json={"id": "a"})
    assert codes == [200, 200]
    refused = small.post("/v1/sessions/a/read", json={"text": TEXT})
    assert refused.json()["error"]["code"] == "insufficient_quota"
    assert small.get("/v1/sessions/a").json()["tokens"] == 0


def test_a_request_that_takes_too_long_ends(start: Any) -> None:
    client = start(seconds=0.3)
    server = client.app.state.server
    client.portal.call(server.store.call, server.store.commit, "local", "a", server.base)
    response = client.post("/v1/sessions/a/practice", json={"texts": [TEXT], "passes": 1000})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert client.portal.call(server.store.call, server.store.entry, "local", "a").tokens == 0
    assert not server.store._writing  # nobody holds it


def test_the_log_and_the_figures_hold_no_texts(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nestlearn.serve"):
        client.post("/v1/sessions", json={"id": "someone@example.com"})
        client.post("/v1/sessions/someone@example.com/read", json={"text": "A secret about sheep."})
        chat(client, user="someone@example.com", messages=[{"role": "user", "content": "A secret"}])
    from nestlearn.serve.access import JsonLines

    lines = [JsonLines().format(record) for record in caplog.records]
    assert len(lines) == 3 and '"route": "/v1/sessions/{id}/read"' in lines[1] and '"status": 200' in lines[1]
    assert not any(word in line for line in lines for word in ("secret", "someone"))
    figures = client.get("/metrics").text
    assert 'nestlearn_tokens_total{kind="learned"}' in figures and "someone" not in figures
    assert 'route="/v1/chat/completions",status="200"' in figures


def test_an_error_of_the_server_is_told_without_its_message(
    client: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("with a secret")

    monkeypatch.setattr(client.app.state.server.worker.decoder, "read", fail)
    response = chat(client)
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    [record] = [record for record in caplog.records if record.getMessage() == "error"]
    assert "secret" not in str(record.__dict__["fields"]) and "RuntimeError" in str(record.__dict__["fields"])
    monkeypatch.undo()
    assert chat(client).status_code == 200
