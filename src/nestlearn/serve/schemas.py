"""Requests and their limits. Types are strict: ``"5"`` is no number.

Requests of the OpenAI API may have fields that this server does not know: they are ignored. Those that would change the
answer and are not supported are refused unless they have no effect. Requests of sessions have no unknown fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from nestlearn.continual.editing import EditMethod

from .store import NAME

MAX_SEED = 2**53 - 1
"""The largest integer that every reader of JSON has exactly."""
MAX_PROMPTS = 16
MAX_FACTS = 64
"""Facts that are written at once."""
MAX_PRACTICE = 200_000
"""Characters that are practised at once."""
MAX_HEALTH = 10_000
"""Characters of a text with which levels are measured: it is read once for each level, and twice more."""
WHOLE = BeforeValidator(lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)
"""In JSON 1.0 is an integer, too."""
SessionName = Annotated[str, WithJsonSchema({"type": "string", "pattern": NAME, "minLength": 1, "maxLength": 64})]
"""The name of a session; `nestlearn.serve.store.check_name` refuses others."""
SOME_TEXT = {"type": "string", "minLength": 1, "pattern": r"^[^\u0000]*[^\s\u0000][^\u0000]*$"}
"""A text that says something; `nestlearn.continual.session.reader.check_text` refuses others."""
SomeText = Annotated[str, WithJsonSchema(SOME_TEXT)]
AnyText = Annotated[str, WithJsonSchema({"type": "string", "pattern": r"^[^\u0000]*$"})]
"""A part of a prompt, which may be empty."""
Stop = str | Annotated[list[str], Field(max_length=4)] | None


class Open(BaseModel):
    """A request of the OpenAI API."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Closed(BaseModel):
    """A request of this server alone."""

    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(Open):
    """What a stream holds beside the answer."""

    include_usage: bool = False


class Generation(Open):
    """Fields of both kinds of completions."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    seed: Annotated[int, WHOLE] | None = None
    stop: Stop = None
    n: Annotated[int, Field(ge=1, le=1, description="Only 1."), WHOLE] | None = 1
    user: SessionName | None = Field(None, description="The session; the header X-Session has priority.")
    learn: bool | None = Field(None, description="Whether the session learns from the exchange; its own by default.")
    presence_penalty: Annotated[float, Field(ge=0, le=0, description="Only 0.")] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=0, le=0, description="Only 0.")] | None = 0.0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def stops(self) -> list[str]:
        """The stop words."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [word for word in given if word]


class TextPart(Open):
    """A part of a message."""

    type: Literal["text"]
    text: AnyText


class Message(Open):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: AnyText | Annotated[list[TextPart], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        """Role and text; a developer is the system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(Open):
    """Text alone is supported."""

    type: Literal["text"] = "text"


_SCORED: dict[str, Any] = {
    "if": {"properties": {"top_logprobs": {"type": "integer", "minimum": 1}}, "required": ["top_logprobs"]},
    "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
}


class ChatRequest(Generation):
    """The body of ``POST /v1/chat/completions``."""

    model_config = ConfigDict(json_schema_extra=_SCORED)

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0, description="Not supported.")] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true.")
        return self


class CompletionRequest(Generation):
    """The body of ``POST /v1/completions``."""

    prompt: AnyText | Annotated[list[AnyText], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5), WHOLE] | None = None
    echo: Annotated[Literal[False], Field(description="Not supported.")] | None = False
    suffix: Annotated[str, Field(max_length=0, description="Not supported.")] | None = None
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = 1

    def prompts(self) -> list[str]:
        """All prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class NewSession(Closed):
    """The body of ``POST /v1/sessions``."""

    id: SessionName | None = Field(None, description="The name; a random one by default.")
    learn: bool = Field(False, description="Whether conversations are learned from.")


class ChangeSession(Closed):
    """The body of ``PATCH /v1/sessions/{id}``."""

    learn: bool


class ReadRequest(Closed):
    """The body of ``POST /v1/sessions/{id}/read``."""

    text: SomeText
    name: Annotated[str, Field(max_length=200)] | None = Field(None, description="Of the document, in the log.")
    compare: bool = Field(False, description="Whether to score the text with writes ignored as well.")
    levels: bool = Field(False, description="Whether to tell the levels' distance from the model after each segment.")
    stream: bool = Field(False, description="Whether to send every segment as an event.")


class ScoreRequest(Closed):
    """The body of ``POST /v1/sessions/{id}/score``."""

    text: SomeText


class HealthRequest(Closed):
    """The body of ``POST /v1/sessions/{id}/health``."""

    text: Annotated[SomeText, WithJsonSchema({**SOME_TEXT, "maxLength": MAX_HEALTH}), Field(max_length=MAX_HEALTH)]


class PracticeRequest(Closed):
    """The body of ``POST /v1/sessions/{id}/practice``; see `MemorySession.practice`."""

    texts: Annotated[list[SomeText], Field(min_length=1, max_length=100)]
    passes: Annotated[int, Field(ge=1, le=1000), WHOLE] = 30
    questions: Annotated[int, Field(ge=0, le=64), WHOLE] = 8
    lr: Annotated[float, Field(gt=0, le=100)] = 1.0
    minutes: Annotated[float, Field(gt=0, le=1440)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), WHOLE] = 0
    stream: bool = False

    @model_validator(mode="after")
    def _check(self) -> PracticeRequest:
        # All of it is tokenized before the first step, while answers wait.
        if (length := sum(map(len, self.texts))) > MAX_PRACTICE:
            raise ValueError(f"{length:,} characters are more than {MAX_PRACTICE:,}; let the session read such a text.")
        return self


class FactOf(Closed):
    """A fact: what the model should say after a prompt; see `nestlearn.Fact`."""

    prompt: Annotated[SomeText, WithJsonSchema({**SOME_TEXT, "maxLength": 500}), Field(max_length=500)]
    target: Annotated[SomeText, WithJsonSchema({**SOME_TEXT, "maxLength": 200}), Field(max_length=200)]
    subject: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(
        None, description="Words of the prompt that it is about; by default its last name or number."
    )


class EditRequest(Closed):
    """The body of ``POST /v1/sessions/{id}/edit``; see `MemorySession.edit`."""

    facts: Annotated[list[FactOf], Field(min_length=1, max_length=MAX_FACTS)]
    method: EditMethod = "intattn"
    stream: bool = Field(False, description="Whether to send an event for every step.")


class ForkRequest(Closed):
    """The body of ``POST /v1/sessions/{id}/fork``."""

    id: SessionName | None = Field(None, description="The name of the copy; a random one by default.")


class ForgetRequest(Closed):
    """The body of ``POST /v1/sessions/{id}/forget``."""

    levels: Annotated[list[Annotated[int, WHOLE]], Field(min_length=1)] | None = Field(
        None, description="None forgets everything."
    )
