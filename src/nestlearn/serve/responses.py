"""What the routes answer, for the OpenAPI document; and events of streams. Errors are in `errors`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from .errors import ErrorResponse


class Session(BaseModel):
    """A session in a list. Times are seconds since 1970."""

    id: str
    object: Literal["session"] = "session"
    created: int
    updated: int
    parent: str | None
    learn: bool
    tokens: int
    documents_read: int
    file_bytes: int


class LevelView(BaseModel):
    """One level of all networks together. ``change`` is the distance relative to the initial weights."""

    level: int | str
    period: int | None
    rule: str | None
    networks: int
    tokens: int
    change: float | None
    bytes: int


class DocumentView(BaseModel):
    """One reading, practice or edit."""

    what: str
    when: str
    bytes: int


class FactView(BaseModel):
    """A fact of an edit."""

    prompt: str
    subject: str
    target: str


class EditView(BaseModel):
    """An edit in force."""

    number: int
    method: str
    alpha: float
    facts: list[FactView]


class SessionDetails(Session):
    """A session with what it has learned."""

    memory_bytes: int
    levels: list[LevelView]
    documents: list[DocumentView]
    edits: list[EditView]


class SessionPage(BaseModel):
    """Some sessions in the order of their names."""

    object: Literal["list"] = "list"
    data: list[Session]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A session that does not exist any more."""

    id: str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: bool


class Diff(BaseModel):
    """How far the levels of two sessions are apart."""

    object: Literal["session.diff"] = "session.diff"
    id: str
    other: str
    levels: list[LevelView]


class Score(BaseModel):
    """Bits per byte of a text by a session, and by the model alone."""

    object: Literal["session.score"] = "session.score"
    id: str
    tokens: int
    bytes: int
    bits_per_byte: float | None
    base: float | None


class LevelFigures(LevelView):
    """What a level did: ``change`` is its way, ``gain`` the bits per byte that its writes of the text saved.

    ``gain`` is None for mixers and edited maps, ``finding`` for a level that does its work.
    """

    gain: float | None
    finding: str | None


class Health(BaseModel):
    """What the levels of a copy of a session did while it read a text; ``off`` is without the writes of any."""

    object: Literal["session.health"] = "session.health"
    id: str
    tokens: int
    bits_per_byte: float | None
    off: float | None
    levels: list[LevelFigures]


class Segment(BaseModel):
    """A segment before it was written."""

    number: int
    tokens: int
    bits_per_byte: float | None


class Compared(BaseModel):
    """A segment with the writes of this text ignored, in bits per byte."""

    number: int
    off: float | None


class ReadFigures(BaseModel):
    """Of the text so far."""

    tokens: int
    bytes: float
    bits_per_byte: float | None
    off: float | None
    seconds: float
    levels: list[LevelView] | None = None


class ReadEvent(ReadFigures):
    """A segment that was read."""

    object: Literal["session.read.progress"] = "session.read.progress"
    segment: Segment
    compared: list[Compared]


class ReadResult(ReadFigures):
    """A text that was read."""

    object: Literal["session.read"] = "session.read"
    session: Session


class PracticeFigures(BaseModel):
    """Losses of the last step in nats per token, of the text and of the answers to questions about it."""

    step: int
    steps: int
    questions: int
    text: float
    answers: float | None
    seconds: float


class PracticeEvent(PracticeFigures):
    """A step of practice."""

    object: Literal["session.practice.progress"] = "session.practice.progress"


class PracticeResult(PracticeFigures):
    """A practice that has ended."""

    object: Literal["session.practice"] = "session.practice"
    session: Session


class EditEvent(BaseModel):
    """A step of an edit."""

    object: Literal["session.edit.progress"] = "session.edit.progress"
    doing: str


class EditResult(BaseModel):
    """Facts that were written; ``before`` and ``after`` are ``-ln p`` per token of each target."""

    object: Literal["session.edit"] = "session.edit"
    method: str
    alpha: float
    layers: list[int]
    before: list[float]
    after: list[float]
    seconds: float
    session: Session


class Model(BaseModel):
    """The model of this server."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class Models(BaseModel):
    """All models of this server: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Status(BaseModel):
    """How the server is."""

    status: str


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


Finish = Literal["stop", "length"]


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None


class ChatChoice(BaseModel):
    """The answer; ``logprobs`` as in the OpenAI API."""

    index: int
    message: AnswerMessage
    finish_reason: Finish
    logprobs: dict[str, Any] | None


class ChatCompletion(BaseModel):
    """An answer in a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(BaseModel):
    """New text of an answer."""

    index: int
    delta: dict[str, str]
    finish_reason: Finish | None
    logprobs: dict[str, Any] | None


class ChatCompletionChunk(BaseModel):
    """An event of an answer in a conversation."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextChoice(BaseModel):
    """A continuation; ``logprobs`` as in the OpenAI API."""

    index: int
    text: str
    finish_reason: Finish | None
    logprobs: dict[str, Any] | None


class Completion(BaseModel):
    """Continuations of texts, or an event of them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


EVENTS: dict[type[BaseModel], type[BaseModel]] = {
    ReadResult: ReadEvent,
    PracticeResult: PracticeEvent,
    EditResult: EditEvent,
    ChatCompletion: ChatCompletionChunk,
    Completion: Completion,
}
"""The objects in the stream that ends as, or adds up to, a result."""


def json_or_events(result: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says of an operation that answers as a whole or, with ``stream``, by events."""
    place = "#/components/schemas/"
    kinds = [{"$ref": place + kind.__name__} for kind in (EVENTS[result], result, ErrorResponse)]
    event = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    data = {"anyOf": [event, {"const": "[DONE]"}], "description": "Events, then the result or an error."}
    item = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return {200: {"model": result, "content": {"text/event-stream": {"itemSchema": item}}}}
