"""Load on `nestlearn serve`: seconds to the first token and per token, at 1, 8 and 32 clients with a session each.

    python benchmarks/serve_load.py runs/smollm2             # a stacked model, see `nestlearn stack`
    python benchmarks/serve_load.py runs/smollm2 --reading   # one more client reads texts meanwhile

Nothing is reported unless every greedy answer under load equals the answer that the same session gave alone.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from common import Record, parse, parser, processor, table

TEXT = "The {n}th house of the street has a {colour} door, and its owner is called {name}. "
COLOURS = ("red", "green", "blue", "white", "black", "yellow")


class Answer(NamedTuple):
    """A streamed answer: its text, and the seconds at which each piece came."""

    text: str
    seconds: list[float]
    tokens: int


@contextmanager
def server(model: str, threads: int) -> Iterator[tuple[str, int]]:
    """The address of a server over new sessions, and the number of its process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "nestlearn", "serve", model, "--sessions", folder, "--port", "0"]
        process = subprocess.Popen(
            [*command, "--rows", "32"], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        assert process.stderr is not None
        try:
            lines = (json.loads(line) for line in process.stderr if line.startswith("{"))
            yield next(line["url"] for line in lines if line["event"] == "listen"), process.pid
        finally:
            process.terminate()
            process.communicate()


def prepare(client: httpx2.Client, number: int) -> None:
    """Make a session that has read a text of its own."""
    text = "".join(
        TEXT.format(n=n, colour=COLOURS[(n + number) % 6], name=chr(65 + number) + "abcdefgh"[n]) for n in range(8)
    )
    client.post("/v1/sessions", json={"id": f"s{number}"}).raise_for_status()
    client.post(f"/v1/sessions/s{number}/read", json={"text": text}).raise_for_status()


def ask(client: httpx2.Client, model: str, number: int, tokens: int) -> Answer:
    """One streamed answer."""
    question = f"Which colour has the door of house {number % 8}? Tell a long story about its owner."
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
            "user": f"s{number}"}  # fmt: skip
    began, text, seconds, count = time.monotonic(), "", [], 0
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            count = (event.get("usage") or {}).get("completion_tokens", count)
            piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if piece:
                text += piece
                seconds.append(time.monotonic() - began)
    return Answer(text, seconds, count)


def under_load(client: httpx2.Client, model: str, clients: int, tokens: int) -> tuple[list[Answer], float]:
    """The answers of so many clients that ask at the same time, and the seconds of all."""
    start = threading.Barrier(clients + 1)

    def one(number: int) -> Answer:
        start.wait()
        return ask(client, model, number, tokens)

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(one, number) for number in range(clients)]
        start.wait()
        began = time.monotonic()
        answers = [future.result() for future in futures]
    return answers, time.monotonic() - began


def processor_seconds(number: int) -> float:
    """Seconds that a process has used a processor; NaN where the system does not tell. Others do not count, so that it
    compares loads on a busy machine (with one thread: several wait for each other actively)."""
    about = Path(f"/proc/{number}/stat")
    if not about.exists():
        return math.nan
    user, system = about.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p99": ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]}


def measure(
    client: httpx2.Client, model: str, number: int, clients: int, tokens: int, expected: Sequence[str]
) -> Record:
    """The record of one load.

    Raises:
        RuntimeError: an answer differs from the one that its session gave alone.
    """
    before = processor_seconds(number)
    answers, seconds = under_load(client, model, clients, tokens)
    used = processor_seconds(number) - before
    for session, answer in enumerate(answers):
        if answer.text != expected[session]:
            raise RuntimeError(
                f"session {session} answered {answer.text!r} under load, and alone {expected[session]!r}"
            )
    steps = [b - a for answer in answers for a, b in zip(answer.seconds, answer.seconds[1:], strict=False)]
    return {
        "clients": clients,
        "tokens_per_second": sum(answer.tokens for answer in answers) / seconds,
        "tokens_per_processor_second": sum(answer.tokens for answer in answers) / used,
        "first_token": percentiles([answer.seconds[0] for answer in answers if answer.seconds]),
        "token": percentiles(steps),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "runs/serve_load.json", threads=2)
    made.add_argument("model")
    made.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    made.add_argument("--tokens", type=int, default=48, help="of each answer")
    made.add_argument("--reading", action="store_true", help="one more client reads texts meanwhile")
    options = parse(made, arguments)
    with server(options.model, options.threads) as (url, number), httpx2.Client(base_url=url, timeout=600) as client:
        model, most = client.get("/v1/models").json()["data"][0]["id"], max(options.clients)
        for session in range(most):
            prepare(client, session)
        began, used = time.monotonic(), processor_seconds(number)
        alone = [ask(client, model, session, options.tokens) for session in range(most)]
        count = sum(answer.tokens for answer in alone)
        speed, per_second = count / (time.monotonic() - began), count / (processor_seconds(number) - used)
        records = []
        with reader(client, options.reading):
            for clients in options.clients:
                texts = [answer.text for answer in alone]
                records.append(measure(client, model, number, clients, options.tokens, texts))
    result: dict[str, Any] = {
        "model": options.model, "processor": processor(), "threads": options.threads, "tokens": options.tokens,
        "reading": options.reading, "one_after_the_other": speed,
        "one_after_the_other_per_processor_second": per_second, "loads": records,
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1))
    rows = [
        [str(r["clients"]), f"{r['tokens_per_second']:.1f}", f"{r['tokens_per_second'] / speed:.2f}",
         f"{r['tokens_per_processor_second'] / per_second:.2f}",
         *(f"{1000 * r[kind][part]:.0f}" for kind in ("first_token", "token") for part in ("p50", "p99"))]
        for r in records
    ]  # fmt: skip
    print(f"one after the other: {speed:.1f} tokens/s; milliseconds:\n")
    print(
        table(
            [
                "clients",
                "tokens/s",
                "of one after the other",
                "in processor time",
                "first p50",
                "first p99",
                "token p50",
                "token p99",
            ],
            rows,
        )
    )


@contextmanager
def reader(client: httpx2.Client, wanted: bool) -> Iterator[None]:
    """A client that reads one text after the other meanwhile."""
    done = threading.Event()

    def read() -> None:
        client.post("/v1/sessions", json={"id": "reader"})
        text = "".join(TEXT.format(n=n, colour=COLOURS[n % 6], name="Reader") for n in range(20))
        while not done.is_set():
            client.post("/v1/sessions/reader/read", json={"text": text})

    thread = threading.Thread(target=read, daemon=True)
    if wanted:
        thread.start()
    yield
    done.set()
    if wanted:
        thread.join()


if __name__ == "__main__":
    main()
