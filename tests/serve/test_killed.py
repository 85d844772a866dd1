"""kill -9 while 32 clients read, chat, copy and delete: what was acknowledged is there, and nothing is half there."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .conftest import NEEDS, TEXT
from .test_process import Process, saved

pytest.importorskip("fastapi", reason=NEEDS)

httpx2 = pytest.importorskip("httpx2", reason="pip install httpx2")
__all__ = ["saved"]
CLIENTS, ROUNDS = 32, 4
Known = dict[str, tuple[int, int]]
"""Tokens and documents of sessions."""


@dataclass
class Client:
    """One client and its sessions: as the server has told, and the name in the request that it has not answered yet."""

    number: int
    known: Known = field(default_factory=dict)
    open: tuple[str, ...] = ()

    def work(self, url: str) -> int:
        """Send requests, one after the other, until the server is gone; returns how many were answered."""
        done = 0
        with suppress(httpx2.HTTPError), httpx2.Client(base_url=url, trust_env=False, timeout=60) as http:
            while True:
                self.one(http)
                done += 1
        return done

    def one(self, http: Any) -> None:
        """One request that changes something, and what it tells."""
        name = f"c{self.number}-{random.randrange(4)}"
        if name not in self.known:
            self.ask(http, (name,), "POST", "", {"id": name})
            return
        kind = random.choice(["read", "read", "chat", "fork", "delete"])
        if kind == "read":
            self.ask(http, (name,), "POST", f"/{name}/read", {"text": TEXT[: random.randrange(1, 40)]})
        elif kind == "fork":
            copy = f"{name}-copy"
            if copy in self.known:
                self.ask(http, (copy,), "DELETE", f"/{copy}", None)
            else:
                self.ask(http, (copy,), "POST", f"/{name}/fork", {"id": copy})
        elif kind == "delete":
            self.ask(http, (name,), "DELETE", f"/{name}", None)
        else:
            self.open = (name,)
            messages = [{"role": "user", "content": "Which?"}]
            body = {"model": "tiny", "messages": messages, "max_tokens": 3, "user": name, "learn": True}
            response = http.post("/v1/chat/completions", json=body)
            if response.status_code == 200:
                found = http.get(f"/v1/sessions/{name}").json()
                assert found["documents_read"] == self.known[name][1] + 1
                self.known[name] = found["tokens"], found["documents_read"]
            self.open = ()

    def ask(self, http: Any, names: tuple[str, ...], method: str, path: str, body: Any) -> None:
        self.open = names
        response = http.request(method, f"/v1/sessions{path}", json=body)
        if response.status_code < 300:
            told = response.json()
            told = told.get("session", told)
            if method == "DELETE":
                self.known.pop(names[0])
            else:
                self.known[names[0]] = told["tokens"], told["documents_read"]
        else:
            assert response.status_code == 429, response.text
        self.open = ()


def state_of(url: str) -> Known:
    """All sessions of a server; each is opened, so its file is whole and has what the index says."""
    found: Known = {}
    with httpx2.Client(base_url=url, trust_env=False, timeout=60) as http:
        page = http.get("/v1/sessions?limit=100").json()
        while page["data"]:
            for entry in page["data"]:
                session = http.get(f"/v1/sessions/{entry['id']}").json()
                assert len(session["documents"]) == entry["documents_read"], session
                found[entry["id"]] = entry["tokens"], entry["documents_read"]
            page = http.get(f"/v1/sessions?limit=100&after={page['last_id']}").json()
    return found


def check(clients: list[Client], found: Known) -> None:
    """What was told is there. A request that was not answered has done all of its work or none."""
    for client in clients:
        for name in {*client.known, *client.open}:
            before, now = client.known.get(name), found.get(name)
            if name not in client.open:
                assert now == before, name
            elif before is not None and now is not None and now != before:
                assert now[0] > before[0] and now[1] == before[1] + 1, name
    named = {name for client in clients for name in (*client.known, *client.open)}
    assert found.keys() <= named


@contextmanager
def killed(saved: Path, folder: Path) -> Iterator[Process]:
    """A server that is killed at the end. Its log is read meanwhile: a full pipe would stop it."""
    server = Process(saved, folder)
    reader = threading.Thread(target=server.log.read)
    reader.start()
    try:
        yield server
    finally:
        os.kill(server.number, signal.SIGKILL)
        os.waitpid(server.number, 0)
        reader.join()
        server.log.close()


@pytest.mark.slow
def test_killed_at_random_moments_under_load(saved: Path, tmp_path: Path) -> None:
    clients, done, files = [Client(number) for number in range(CLIENTS)], 0, tmp_path / "files"
    for _ in range(ROUNDS):
        with ThreadPoolExecutor(CLIENTS) as pool, killed(saved, tmp_path) as server:
            found = state_of(server.url)
            check(clients, found)
            assert len([*files.rglob("*.*")]) == len(found)
            assert not (tmp_path / "lost").exists()
            for client in clients:
                client.known = {name: now for name, now in found.items() if name.startswith(f"c{client.number}-")}
                client.open = ()
            working = [pool.submit(client.work, server.url) for client in clients]
            time.sleep(random.uniform(0.3, 4))
        for one in working:
            done += one.result()
    with killed(saved, tmp_path) as server:
        check(clients, state_of(server.url))
    assert done > 10 * ROUNDS
