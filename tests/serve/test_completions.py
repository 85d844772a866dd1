"""The API of OpenAI: answers equal those of a session alone, streams equal whole answers, bad requests are told why."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nestlearn import MemorySession
from nestlearn.continual.session.decoding import decoder_of
from nestlearn.data import byte_tokenizer

from .conftest import NEEDS, TEXT

pytest.importorskip("fastapi", reason=NEEDS)

HELLO = [{"role": "user", "content": "Which sheep?"}]


def chat(client: Any, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0, **fields}
    return client.post("/v1/chat/completions", json=body)


def events(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def alone(model: Any, prompt: str = "You: Which sheep?\nModel:", read: str = "", **options: Any) -> str:
    session = MemorySession(model, byte_tokenizer(), compare="none")
    if read:
        session.read([read])
    return session.generate(prompt, **{"max_new_tokens": 8, "stop": "\nYou:", **options})


def test_an_answer_is_that_of_a_session_alone(client: Any, model: Any) -> None:
    found = chat(client).json()
    [choice] = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": alone(model), "refusal": None}
    assert choice["finish_reason"] == "length" and choice["index"] == 0
    assert found["usage"] == {"prompt_tokens": 25, "completion_tokens": 8, "total_tokens": 33}
    assert found["object"] == "chat.completion" and found["model"] == "tiny"
    drawn = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    assert chat(client, **drawn).json()["choices"][0]["message"]["content"] == alone(model, **drawn)


def test_what_was_read_is_in_the_answer_and_sessions_do_not_mix(client: Any, model: Any) -> None:
    for name, text in (("a", TEXT), ("b", TEXT[::-1])):
        client.post("/v1/sessions", json={"id": name})
        assert client.post(f"/v1/sessions/{name}/read", json={"text": text}).status_code == 200
    expected = {"a": alone(model, read=TEXT), "b": alone(model, read=TEXT[::-1]), None: alone(model)}
    assert len(set(expected.values())) == 3

    def ask(name: str | None) -> str:
        found = chat(client, user=name) if name != "a" else client.post(
            "/v1/chat/completions", headers={"X-Session": "a"},
            json={"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0, "user": "b"},
        )  # fmt: skip
        return found.json()["choices"][0]["message"]["content"]

    names = ["a", "b", None] * 4
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, names)) == [expected[name] for name in names]


def test_a_stream_is_the_answer_in_pieces(client: Any) -> None:
    whole = chat(client, logprobs=True, top_logprobs=3).json()
    found = events(chat(client, stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=3))
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    said = "".join(choice["delta"].get("content", "") for event in found for choice in event["choices"])
    assert said == whole["choices"][0]["message"]["content"]
    assert found[-1]["choices"] == [] and found[-1]["usage"] == whole["usage"]
    assert found[-2]["choices"][0]["finish_reason"] == "length"
    scores = [s for event in found for c in event["choices"] if c["logprobs"] for s in c["logprobs"]["content"]]
    # Pieces of text may hold several tokens; the scores are those of the whole answer.
    assert [s["token"] for s in scores] == [s["token"] for s in whole["choices"][0]["logprobs"]["content"]]
    for score in scores:
        assert len(score["top_logprobs"]) == 3 and score["top_logprobs"][0]["logprob"] == pytest.approx(
            score["logprob"]
        )


def test_stop_words_end_an_answer_before_them(client: Any, model: Any) -> None:
    text = alone(model, max_new_tokens=24)
    word = text[5:7]
    for stream in (False, True):
        response = chat(client, stop=[word, "never"], max_tokens=24, stream=stream, logprobs=True)
        if stream:
            found = events(response)
            said = "".join(event["choices"][0]["delta"].get("content", "") for event in found)
            scored = [event["choices"][0]["logprobs"] for event in found if event["choices"][0]["logprobs"]]
            count, finish = sum(len(one["content"]) for one in scored), found[-1]["choices"][0]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            said, finish, count = (
                choice["message"]["content"],
                choice["finish_reason"],
                len(choice["logprobs"]["content"]),
            )
        assert said == text[: text.index(word)] and finish == "stop"
        assert count == len(said)  # each token is a byte, and each of these bytes one character


def test_texts_are_continued(client: Any, model: Any) -> None:
    prompts = ["The sheep", "A herd of"]
    expected = [alone(model, prompt, stop=()) for prompt in prompts]
    body = {"model": "tiny", "prompt": prompts, "max_tokens": 8, "temperature": 0, "logprobs": 2}
    found = client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in found["choices"]] == expected
    logprobs = found["choices"][1]["logprobs"]
    assert logprobs["text_offset"][0] == len(prompts[1]) and len(logprobs["top_logprobs"][0]) == 2
    streamed = events(client.post("/v1/completions", json={**body, "stream": True}))
    texts = ["", ""]
    for event in streamed:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == expected


def test_a_conversation_is_learned_when_asked(client: Any, model: Any) -> None:
    answer = chat(client, user="learner", learn=True).json()["choices"][0]["message"]["content"]
    session = client.get("/v1/sessions/learner").json()
    assert session["tokens"] == len(f"You: Which sheep?\nModel: {answer}\n".encode()) and not session["learn"]
    read = f"You: Which sheep?\nModel: {answer}\n"
    assert chat(client, user="learner").json()["choices"][0]["message"]["content"] == alone(model, read=read)
    assert client.get("/v1/sessions/learner").json()["tokens"] == session["tokens"]
    client.patch("/v1/sessions/learner", json={"learn": True})
    events(chat(client, user="learner", stream=True))
    assert client.get("/v1/sessions/learner").json()["documents_read"] == 2
    # Without learning, a name that was never used makes no session.
    chat(client, user="passer-by")
    assert client.get("/v1/sessions/passer-by").status_code == 404


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "gpt-4"}, 404, "model_not_found", "model"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "invalid_value", "messages.0.role"),
        ({"temperature": 2.5}, 400, "invalid_value", "temperature"),
        ({"temperature": "1"}, 400, "invalid_value", "temperature"),
        ({"top_p": 0}, 400, "invalid_value", "top_p"),
        ({"n": 2}, 400, "invalid_value", "n"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": 5000}, 400, "invalid_value", "max_tokens"),
        ({"top_logprobs": 3}, 400, "invalid_value", None),
        ({"tools": [{}]}, 400, "invalid_value", "tools"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "context_length_exceeded", "messages"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, 400, "invalid_value", "messages"),
        ({"learn": True}, 400, "invalid_value", "learn"),
        ({"user": "a/b"}, 400, "invalid_value", "user"),
    ],
)
def test_bad_requests_are_told_why(client: Any, fields: dict[str, Any], status: int, code: str, param: str) -> None:
    response = chat(client, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert error["type"] == "invalid_request_error" and error["message"]


def test_bodies_that_are_no_json_and_paths_that_do_not_exist(client: Any) -> None:
    for content in (
        b'{"model": ',
        b"\xff\xfe",
        b"[1]",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    ):
        response = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/nowhere").json()["error"]["code"] == "unknown_url"
    assert client.delete("/v1/models").status_code == 405
    assert client.get("/v1/models").json()["data"][0]["id"] == client.get("/v1/models/tiny").json()["id"] == "tiny"


def test_fields_of_other_clients_are_ignored(client: Any) -> None:
    fields = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "n": 1, "logit_bias": {}, "tools": []}
    assert chat(client, **fields, response_format={"type": "text"}).status_code == 200


def test_too_many_requests_are_refused_with_the_time_to_wait(start: Any) -> None:
    few = start(rows=1, waiting=1)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: chat(few, max_tokens=100), range(6)))
    statuses = {response.status_code for response in found}
    assert statuses == {200, 429}
    refused = next(response for response in found if response.status_code == 429)
    assert int(refused.headers["retry-after"]) > 0 and refused.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_answer_that_nobody_waits_for_leaves_its_place(model: Any, steps: int) -> None:
    """While it waits, while its prompt is read, and among the rows that are decoded together."""
    from nestlearn.serve import Limits
    from nestlearn.serve.worker import Worker

    session = MemorySession(model, byte_tokenizer())
    worker = Worker(decoder_of(session), byte_tokenizer(), ends=(), never=(), limits=Limits())
    options: dict[str, Any] = {"limit": 100, "temperature": 0.0, "top_p": 1.0, "seed": None, "stop": (), "top": None}

    async def run() -> None:
        gone, kept = (worker.answer(session, list(text.encode() * 60), **options) for text in ("gone ", "kept "))
        for _ in range(steps):
            worker._round()
            worker._step_prompts()
        assert worker.answers == 2
        gone.cancel()
        worker._admit()
        assert worker.answers == 1 and not kept.cancelled
        worker._step_rows()

    asyncio.run(run())


def test_short_prompts_share_a_pass_and_long_ones_are_cut(model: Any) -> None:
    """Tokens of each pass: a piece at most, and padded prompts together no more than that."""
    from nestlearn.serve import Limits
    from nestlearn.serve.worker import PROMPT_PIECE, Worker

    session = MemorySession(model, byte_tokenizer())
    worker = Worker(decoder_of(session), byte_tokenizer(), ends=(), never=(), limits=Limits())
    options: dict[str, Any] = {"limit": 9, "temperature": 0.0, "top_p": 1.0, "seed": None, "stop": (), "top": None}
    passes: list[list[int]] = []
    read = worker.decoder.read

    def watched(rows: Any, ids: Any) -> Any:
        passes.append([len(part) for part in ids])
        return read(rows, ids)

    worker.decoder.read = watched  # pyright: ignore[reportAttributeAccessIssue]

    async def run() -> None:
        for length in (10, 60, 64, 60, 64, 300, 5):
            worker.answer(session, [65] * length, **options)
        worker._admit()
        while worker._prompts:
            worker._step_prompts()

    asyncio.run(run())
    assert passes == [[10, 60, 64, 60], [64], [PROMPT_PIECE], [5], [300 - PROMPT_PIECE]]
    assert len(worker._rows) == 7
