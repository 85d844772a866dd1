"""Sessions on disk: kill -9, full disks, damaged files and indexes, and the bytes that stay in memory."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nestlearn import MemorySession
from nestlearn.data import byte_tokenizer

from .conftest import NEEDS, TEXT, forked
from .test_sessions import bytes_of, new

pytest.importorskip("fastapi", reason=NEEDS)


@pytest.mark.parametrize("pause", [0.0, 0.007])
def test_killed_at_any_moment_a_store_opens_whole(model: Any, tmp_path: Path, pause: float) -> None:
    """After kill -9 the session is that of the last commit that was told, or of the one after it."""
    from nestlearn.serve import Limits
    from nestlearn.serve.store import Store

    base = MemorySession(model, byte_tokenizer(), compare="none")

    def write() -> None:
        store, work = Store(tmp_path, base, Limits()), base.fork()
        while True:
            work.read(["Some more words."])
            sys.stderr.write(f"{store.commit('local', 'a', work.fork()).tokens}\n")

    child, lines = forked(write)
    with lines:
        told = [int(lines.readline()) for _ in range(3)]
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        told += [int(line) for line in lines]
    os.waitpid(child, 0)
    store = Store(tmp_path, base, Limits())
    entry, session = store.open("local", "a")
    assert session.tokens == entry.tokens and session.tokens - told[-1] in (0, 16)
    assert [path.name for path in (tmp_path / "files" / "local").iterdir()] == [Path(entry.file).name]
    store.close()


@pytest.mark.parametrize("moment", ["saved", "named", "removed"])
def test_each_moment_of_a_commit(model: Any, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies after the file was written, after the index named it, or in the middle of a deletion."""
    from nestlearn.serve import Limits
    from nestlearn.serve.store import Store

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    base = MemorySession(model, byte_tokenizer(), compare="none")
    store = Store(tmp_path, base, Limits())
    before = store.commit("local", "a", base)
    work = base.fork()
    work.read([TEXT])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "saved":
            patch.setattr(store._index, "put", die)
        if moment == "named":
            unlink, old = Path.unlink, Path(before.file).name
            patch.setattr(Path, "unlink", lambda path, **kw: die() if path.name == old else unlink(path, **kw))
        if moment == "removed":
            patch.setattr(store._index, "remove", die)
            store.delete("local", "a")
        store.commit("local", "a", work)
    store.close()
    again = Store(tmp_path, base, Limits())
    if moment == "removed":
        assert again.page("local", None, 9) == [] and "from the index" in again.repaired[0]
    else:
        entry, session = again.open("local", "a")
        assert session.tokens == entry.tokens == (0 if moment == "saved" else len(TEXT))
        assert (entry.file == before.file) == (moment == "saved")
        assert len(again.repaired) == 1 and "removed local/a." in again.repaired[0]
    again.close()


@pytest.mark.parametrize("moment", ["save", "put"])
def test_a_session_that_was_being_made_leaves_nothing(
    model: Any, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies before or after the first file of a session is written. Nobody was told of the session."""
    from nestlearn.serve import Limits
    from nestlearn.serve.store import Store

    class Killed(BaseException):
        pass

    base = MemorySession(model, byte_tokenizer(), compare="none")
    store = Store(tmp_path, base, Limits())
    put = store._index.put

    def die(entry: Any) -> None:
        if isinstance(entry, Path) or entry.size:
            raise Killed
        put(entry)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*((base, "save") if moment == "save" else (store._index, "put")), die)
        store.commit("local", "a", base)
    store.close()
    again = Store(tmp_path, base, Limits())
    assert again.page("local", None, 9) == [] and len(again.repaired) == 1 and "'a' of 'local'" in again.repaired[0]
    assert not [*tmp_path.rglob("*.safetensors")]
    again.close()


def test_a_full_disk_fails_the_request_and_nothing_else(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = new(client, "full", TEXT)
    before = bytes_of(client, path)

    def save(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MemorySession, "save", save)
        response = client.post(f"{path}/read", json={"text": "More."})
        assert (response.status_code, response.json()["error"]["code"]) == (507, "not_saved")
    assert bytes_of(client, path) == before
    assert client.post(f"{path}/read", json={"text": "More."}).json()["session"]["tokens"] == len(TEXT) + 5


def test_a_session_that_cannot_be_removed_stays(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = new(client, "fixed", TEXT)

    def unlink(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        response = client.delete(path)
    assert (response.status_code, response.json()["error"]["code"]) == (507, "not_saved")
    assert client.get(path).json()["tokens"] == len(TEXT) and client.delete(path).status_code == 200


def test_sessions_leave_memory_and_come_back(start: Any) -> None:
    client = start(memory=25_000)
    for name in "abcd":
        new(client, name, TEXT[:48])
    store = client.app.state.server.store
    one = client.get("/v1/sessions/a").json()["memory_bytes"]
    assert 2 * one < 25_000 < 4 * one and store.resident_bytes <= 25_000
    assert all(client.get(f"/v1/sessions/{name}").json()["tokens"] == 48 for name in "abcd")
    assert client.get("/v1/sessions/a/diff/d").json()["levels"][0]["change"] == 0


def test_another_server_cannot_use_the_folder(client: Any, model: Any) -> None:
    from nestlearn.serve import Limits
    from nestlearn.serve.store import Store

    folder = client.app.state.server.store.folder
    with pytest.raises(ValueError, match="another server uses"):
        Store(folder, client.app.state.server.base, Limits())


def test_damage_is_told_and_survived(start: Any, tmp_path: Path) -> None:
    """A file that lost its end, one that is gone, a file of nobody, and then an index of garbage."""
    client = start(tmp_path)
    for name in ("whole", "cut", "gone"):
        new(client, name, TEXT)
    client.__exit__(None, None, None)
    client.ended = True
    files = {path.name.split(".")[0]: path for path in (tmp_path / "files" / "local").iterdir()}
    files["cut"].write_bytes(files["cut"].read_bytes()[:-20])
    files["gone"].unlink()
    (tmp_path / "files" / "local" / "stray.01.safetensors").write_bytes(b"of nobody")
    client = start(tmp_path)
    told = "\n".join(client.app.state.server.store.repaired)
    assert "'cut' of 'local' is damaged" in told and "removed session 'gone'" in told and "moved local/stray" in told
    assert client.get("/v1/sessions/whole").json()["tokens"] == len(TEXT)
    response = client.get("/v1/sessions/cut")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "session_damaged")
    assert client.delete("/v1/sessions/cut").status_code == 200
    client.__exit__(None, None, None)
    client.ended = True
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    (tmp_path / "index.sqlite").write_bytes(b"garbage" * 200)
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(tmp_path / "index.sqlite").execute("SELECT * FROM sessions")
    client = start(tmp_path)
    assert "the index was damaged" in client.app.state.server.store.repaired[0]
    assert client.get("/v1/sessions/whole").json()["documents_read"] == 1
    client.__exit__(None, None, None)
    client.ended = True
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as index:
        index.execute("ALTER TABLE sessions DROP COLUMN size")  # of another version
    client = start(tmp_path)
    assert "no such column" in client.app.state.server.store.repaired[0]
    assert client.get("/v1/sessions/whole").json()["documents_read"] == 1
