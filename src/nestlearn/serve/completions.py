"""``/v1/models``, ``/v1/chat/completions`` and ``/v1/completions`` as the OpenAI API has them."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Request
from jinja2 import TemplateError
from starlette.responses import Response

from nestlearn.continual.chat import as_prompt, as_turn
from nestlearn.continual.session import MemorySession, PromptTooLong

from .access import explain
from .errors import bad_request
from .responses import ChatCompletion, Completion, Model, Models, json_or_events
from .schemas import ChatRequest, CompletionRequest, Generation, SessionName
from .server import OwnerOf, Server, ServerOf
from .streams import Events, to_the_end, while_connected
from .worker import Piece, Stream, TokenScore

router = APIRouter()
SessionHeader = Annotated[SessionName | None, Header(alias="X-Session", description="The session, instead of `user`.")]


@router.get("/v1/models", response_model=Models)
async def models(server: ServerOf) -> dict[str, Any]:
    """The one model of this server."""
    return {"object": "list", "data": [_model(server)]}


@router.get("/v1/models/{model:path}", response_model=Model)
async def model(model: str, server: ServerOf) -> dict[str, Any]:
    """The model."""
    server.check_model(model)
    return _model(server)


def _model(server: Server) -> dict[str, Any]:
    return {"id": server.name, "object": "model", "created": server.created, "owned_by": "nestlearn"}


@router.post("/v1/chat/completions", response_model=None, responses=json_or_events(ChatCompletion))
async def chat(
    body: ChatRequest, request: Request, server: ServerOf, owner: OwnerOf, x_session: SessionHeader = None
) -> dict[str, Any] | Response:
    """Answer a conversation. With ``learn`` the session then reads the last message and the answer."""
    server.check_model(body.model)
    call = await Call.begin(server, owner, x_session or body.user, body)
    messages = [message.plain() for message in body.messages]
    prompt = as_prompt(server.base.tokenizer, messages)
    stop = [*body.stops(), *([] if prompt is messages else ["\nYou:"])]
    limit = body.max_completion_tokens or body.max_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    stream, count = await call.answer(prompt, limit, stop, top)
    shape = _Chat(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), server)

    def source(text: str) -> Any:
        return as_turn(server.base.tokenizer, messages[-1], text)

    if body.stream:
        return Events(_chat_events(call, shape, stream, count, source), explain, call.held)
    return await while_connected(request, lambda: _chat_answer(call, shape, stream, count, source), call.held)


@router.post("/v1/completions", response_model=None, responses=json_or_events(Completion))
async def completions(
    body: CompletionRequest, request: Request, server: ServerOf, owner: OwnerOf, x_session: SessionHeader = None
) -> dict[str, Any] | Response:
    """Continue texts. With ``learn`` the session then reads each prompt with its continuation."""
    server.check_model(body.model)
    call = await Call.begin(server, owner, x_session or body.user, body)
    prompts = body.prompts()
    try:
        begun = [await call.answer(prompt, body.max_tokens, body.stops(), body.logprobs) for prompt in prompts]
    except BaseException:
        await call.held.aclose()
        raise
    shape = _Completion(f"cmpl-{secrets.token_hex(12)}", int(time.time()), server)
    if body.stream:
        return Events(_completion_events(call, shape, prompts, begun), explain, call.held)
    return await while_connected(request, lambda: _completion_answer(call, shape, prompts, begun), call.held)


@dataclass
class Call:
    """A request for answers: whose, with which session, and whether it learns."""

    server: Server
    owner: str
    name: str | None
    session: MemorySession
    learns: bool
    body: Generation
    began: float
    held: AsyncExitStack = field(default_factory=AsyncExitStack)

    @classmethod
    async def begin(cls, server: Server, owner: str, name: str | None, body: Generation) -> Call:
        """Open the session of a request.

        Raises:
            ApiError: it shall learn and names no session.
        """
        entry, session = await server.session_or_base(owner, name)
        learns = body.learn if body.learn is not None else entry is not None and entry.learn
        if learns and name is None:
            raise bad_request("learn=true needs a session: give the field user or the header X-Session.", "learn")
        return cls(server, owner, name, session, learns, body, time.monotonic())

    async def answer(
        self, prompt: Any, limit: int | None, stop: Sequence[str], top: int | None
    ) -> tuple[Stream[Piece], int]:
        """Begin an answer to a prompt; returns its pieces and the tokens of the prompt.

        Raises:
            ApiError: the prompt cannot be used, or is too long; or the server has too much to do.
        """
        most, room = self.server.limits.tokens, self.server.worker.decoder.positions
        if limit is not None and limit > most:
            raise bad_request(f"{limit} tokens exceed {most}, the limit of this server.", "max_tokens")
        try:
            ids = await to_thread.run_sync(self.session.prompt_ids, prompt)
            if limit is None:
                limit = most if room is None else max(min(most, room - len(ids)), 1)
            self.session.check_prompt(ids, limit)
        except PromptTooLong as error:
            raise bad_request(str(error), "messages", "context_length_exceeded") from error
        except (ValueError, TypeError, TemplateError) as error:
            raise bad_request(f"the prompt cannot be used: {error}", "messages") from error
        body = self.body
        temperature = 1.0 if body.temperature is None else body.temperature
        seed = None if body.seed is None else body.seed % 2**63
        self.server.metrics.tokens.labels("prompt").inc(len(ids))
        stream = self.server.worker.answer(
            self.session, ids, limit=limit, temperature=temperature, top_p=body.top_p or 1.0, seed=seed, stop=stop,
            top=top,
        )  # fmt: skip
        self.held.callback(stream.cancel)
        return stream, len(ids)

    async def pieces(self, stream: Stream[Piece]) -> AsyncIterator[Piece]:
        """The pieces of an answer, counted."""
        first, piece = True, None
        async for piece in stream:
            if first:
                self.server.metrics.first_token.observe(time.monotonic() - self.began)
            first = False
            yield piece
        if piece is not None:
            self.server.metrics.tokens.labels("answer").inc(piece.tokens)

    async def learn(self, source: Any) -> None:
        """Let the session read what was said, if it learns, even if the client has gone by now."""
        if self.learns and self.name is not None:
            await to_the_end(self.server.learn(self.owner, self.name, source))

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.body.stream_options is not None and self.body.stream_options.include_usage


def _usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


@dataclass
class _Shape:
    """The fields that all objects of one response have."""

    id: str
    created: int
    server: Server

    def object(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.server.name,
                "choices": choices, **more}  # fmt: skip

    def word(self, token: int) -> str:
        return self.server.base.tokenizer.decode([token])


class _Chat(_Shape):
    def choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = {"content": [self._score(score) for score in piece.scores]} if piece.scores else None
        return {"index": 0, "logprobs": logprobs, "finish_reason": piece.finish}

    def _score(self, score: TokenScore) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in score.top]
        return {**self._token(score.token, score.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        word = self.word(token)
        # A token may be a part of a character, which has no text of its own.
        return {"token": word, "logprob": _finite(logprob), "bytes": None if "\ufffd" in word else list(word.encode())}


class _Completion(_Shape):
    def choice(self, index: int, piece: Piece, offset: int) -> dict[str, Any]:
        return {"index": index, "text": piece.text, "finish_reason": piece.finish,
                "logprobs": self._scores(piece.scores, offset) if piece.scores else None}  # fmt: skip

    def _scores(self, scores: Sequence[TokenScore], offset: int) -> dict[str, Any]:
        words = [self.word(score.token) for score in scores]
        starts = [offset + sum(map(len, words[:place])) for place in range(len(words))]
        top = [{self.word(token): _finite(logprob) for token, logprob in score.top} for score in scores]
        return {"tokens": words, "token_logprobs": [_finite(score.logprob) for score in scores], "top_logprobs": top,
                "text_offset": starts}  # fmt: skip


def _finite(logprob: float) -> float:
    """JSON has no infinity and no NaN. The API says -9999 of what is impossible."""
    return logprob if math.isfinite(logprob) else -9999.0


async def _whole(call: Call, stream: Stream[Piece]) -> Piece:
    """All pieces of an answer as one."""
    pieces = [piece async for piece in call.pieces(stream)]
    scores = tuple(score for piece in pieces for score in piece.scores)
    return Piece("".join(piece.text for piece in pieces), scores, pieces[-1].finish, pieces[-1].tokens)


async def _chat_answer(
    call: Call, shape: _Chat, stream: Stream[Piece], count: int, source: Callable[[str], Any]
) -> dict[str, Any]:
    whole = await _whole(call, stream)
    await call.learn(source(whole.text))
    choice = {"message": {"role": "assistant", "content": whole.text, "refusal": None}, **shape.choice(whole)}
    return shape.object("chat.completion", [choice], usage=_usage(count, whole.tokens))


async def _chat_events(
    call: Call, shape: _Chat, stream: Stream[Piece], count: int, source: Callable[[str], Any]
) -> AsyncIterator[dict[str, Any]]:
    kind, usage, text, tokens = "chat.completion.chunk", {"usage": None} if call.with_usage else {}, "", 0
    first = {"delta": {"role": "assistant", "content": ""}, **shape.choice(Piece(""))}
    yield shape.object(kind, [first], **usage)
    async for piece in call.pieces(stream):
        text, tokens = text + piece.text, piece.tokens
        if piece.text or piece.scores:
            said = {"delta": {"content": piece.text}, **shape.choice(Piece(piece.text, piece.scores))}
            yield shape.object(kind, [said], **usage)
        if piece.finish is not None:
            yield shape.object(kind, [{"delta": {}, **shape.choice(Piece("", (), piece.finish))}], **usage)
    await call.learn(source(text))
    if call.with_usage:
        yield shape.object(kind, [], usage=_usage(count, tokens))


Begun = list[tuple[Stream[Piece], int]]


async def _completion_answer(call: Call, shape: _Completion, prompts: list[str], begun: Begun) -> dict[str, Any]:
    found = [await _whole(call, stream) for stream, _ in begun]
    for prompt, whole in zip(prompts, found, strict=True):
        await call.learn(prompt + whole.text)
    choices = [shape.choice(place, whole, len(prompts[place])) for place, whole in enumerate(found)]
    usage = _usage(sum(count for _, count in begun), sum(whole.tokens for whole in found))
    return shape.object("text_completion", choices, usage=usage)


async def _completion_events(
    call: Call, shape: _Completion, prompts: list[str], begun: Begun
) -> AsyncIterator[dict[str, Any]]:
    usage, tokens = {"usage": None} if call.with_usage else {}, 0
    for place, (stream, _) in enumerate(begun):
        text, piece = "", None
        async for piece in call.pieces(stream):
            offset = len(prompts[place]) + len(text)
            yield shape.object("text_completion", [shape.choice(place, piece, offset)], **usage)
            text += piece.text
        tokens += 0 if piece is None else piece.tokens
        await call.learn(prompts[place] + text)
    if call.with_usage:
        yield shape.object("text_completion", [], usage=_usage(sum(count for _, count in begun), tokens))
