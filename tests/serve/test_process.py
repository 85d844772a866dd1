"""A server as a process: the guide's commands, the openai client, clients that go away, signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nestlearn import cli, unstack_levels
from nestlearn.cli.stack import LEVELS, parse_levels
from nestlearn.data import byte_tokenizer

from .conftest import NEEDS, forked, tiny_model

pytest.importorskip("fastapi", reason=NEEDS)

httpx2 = pytest.importorskip("httpx2", reason="pip install httpx2")

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "serving.md").read_text()


def block(kind: str) -> str:
    [found] = re.findall(rf"^```{kind}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    return found


class Process:
    """`nestlearn serve` on a folder, in a process of its own, with its log."""

    def __init__(self, model: Path, folder: Path) -> None:
        words = ["serve", str(model), "--sessions", str(folder), "--port", "0"]
        self.number, self.log = forked(lambda: cli.main(words))
        self.url = self.until("listen")["url"]

    def end(self, number: int) -> int:
        """Send a signal; returns the status with which the process ends."""
        os.kill(self.number, number)
        self.log.read()
        self.log.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])

    def until(self, event: str, **fields: Any) -> dict[str, Any]:
        """The next line of the log with this event."""
        for line in filter(lambda line: line.startswith("{"), self.log):
            found = json.loads(line)
            if found["event"] == event and fields.items() <= found.items():
                return found
        raise AssertionError(f"the server ended without {event}")

    def send(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Send a request and do not wait for the response."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        connection.sendall(f"{head}{len(content)}\r\n\r\n".encode() + content)
        return connection


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    made = Process(saved, tmp_path_factory.mktemp("sessions"))
    yield made
    assert made.end(signal.SIGTERM) in (0, -signal.SIGTERM)


def environment(server: Process) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return {**kept, "URL": server.url, "MODEL": "tiny", "NO_PROXY": "*"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_commands_of_the_guide(server: Process, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("The stairs are blue.")
    done = subprocess.run(
        ["bash", "-ec", block("sh")], cwd=tmp_path, env=environment(server), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert '"object": "session.read.progress"' in done.stdout and '"deleted":true' in done.stdout
    assert (tmp_path / "alice.safetensors").stat().st_size > 1000


def test_the_openai_client(
    server: Process, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai", reason="pip install openai")
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    exec(block("py"), {})
    assert capsys.readouterr().out
    bob = httpx2.get(f"{server.url}/v1/sessions/bob", trust_env=False).json()
    assert bob["documents_read"] == 1 and bob["documents"][0]["what"].startswith("'You: Which lamp is red?")


def test_a_client_that_goes_away_ends_its_answer(server: Process) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 480, "temperature": 0}
    server.send("/v1/chat/completions", {**body, "logit_bias": {}}).close()
    line = server.until("request", route="/v1/chat/completions", status=499)
    assert line["milliseconds"] < 1000
    with server.send("/v1/chat/completions", {**body, "stream": True}) as connection:
        assert connection.recv(10).startswith(b"HTTP/1.1 2")
    assert server.until("request", route="/v1/chat/completions")["milliseconds"] < 1000


def test_a_model_without_levels_gets_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nestlearn.continual.session.file import fingerprint
    from nestlearn.serve import run

    plain, sessions = tmp_path / "plain", tmp_path / "sessions"
    unstack_levels(tiny_model()).save_pretrained(plain)
    byte_tokenizer().save_pretrained(plain)
    monkeypatch.setattr(run, "protect", partial(run.protect, tokens=64, length=16))
    levels = parse_levels(LEVELS)
    model, _ = run.open_model(str(plain), sessions, levels)
    assert list(model.stack_plan.levels) == levels
    monkeypatch.delattr(run, "protect")  # the second start finds the result of the first
    again, _ = run.open_model(str(plain), sessions, levels)
    assert fingerprint(again) == fingerprint(model)
    with pytest.raises(ValueError, match="Give that model, or another folder"):
        run.open_model("smollm2-135m", sessions, levels)


def test_keys_are_made_shown_and_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def keys(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(["serve", "keys", *words, "--sessions", str(tmp_path)])
        found = capsys.readouterr()
        return found.out if not stop.value.code else found.err

    secret = keys("add", "alice").split()[0]
    assert secret.startswith("nl-") and "has a key already" in keys("add", "alice")
    assert keys("list").startswith("alice") and secret not in keys("list") + str(list(tmp_path.iterdir()))
    assert not any(secret.encode() in path.read_bytes() for path in tmp_path.iterdir())
    assert "has ended" in keys("revoke", "alice") and "revoked" in keys("list")
    assert "no key in force" in keys("revoke", "alice") and "write keys add NAME" in keys("ad")
    assert "letters, digits" in keys("add", "../x")
