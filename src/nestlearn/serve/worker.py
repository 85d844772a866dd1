"""The one thread that uses the model: it decodes all answers together, and reads a segment of one text in between.

Each round takes three small steps: one token for every answer that is being generated, a piece of one prompt or some
short prompts, and one step of one task (a segment that is read, or a step of practice). So an answer never waits longer
than for one segment, and new answers join between two tokens. While there are no answers, several readings share a
pass, each with a segment.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.continual.session import MemorySession
from nestlearn.continual.session.backends import PieceRead, ReadCall, read_rows
from nestlearn.continual.session.decoding import Decoder, Row
from nestlearn.models.generation import GrowingText, drawing

from .errors import ApiError, busy
from .limits import Limits

T = TypeVar("T")
PROMPT_PIECE = 256
"""Tokens of prompts that are read at once."""
READINGS = 8
"""Readings that share a pass."""


@dataclass(frozen=True)
class TokenScore:
    """A token, ``ln p`` of it by the model, and the most likely tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """New text of an answer and the scores of its tokens. The last piece says why the answer ends."""

    text: str
    scores: tuple[TokenScore, ...] = ()
    finish: str | None = None
    tokens: int = 0


class Stream(Generic[T]):
    """Events of the worker for one coroutine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self.cancelled = False

    def put(self, event: T | BaseException | None) -> None:
        """Hand an event over: a value, an error, or None for the end."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:  # the loop was closed: nobody listens
            self.cancelled = True

    def cancel(self) -> None:
        """Nobody waits for more events."""
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[T]:
        try:
            while (event := await self._queue.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.cancel()


@dataclass
class Answer:
    """An answer that is being generated.

    Args:
        ids: the prompt.
        row: the memory and the cache of it.
        limit: the most tokens.
        text: what was said.
        drawn: chooses tokens; None takes the most likely one.
        top: how many likely tokens are scored at each; None scores nothing.
        stream: of its pieces.
    """

    ids: Sequence[int]
    row: Row
    limit: int
    text: GrowingText
    drawn: Any
    top: int | None
    stream: Stream[Piece] = field(default_factory=Stream)
    read: int = 0
    count: int = 0
    token: int = 0
    scores: list[tuple[int, TokenScore]] = field(default_factory=list)


@dataclass
class Task:
    """Steps that are taken between tokens, and the stream of what they give.

    Args:
        steps: a generator of events. A reading also gives lists of calls, and is sent what was read.
        stream: of the events.
        session: that reads.
        asked: the calls that a reading waits for.
    """

    steps: Generator[Any, Any, Any]
    stream: Stream[Any]
    session: MemorySession | None
    asked: list[ReadCall] | None = None


class Worker:
    """The thread.

    Args:
        decoder: of the model.
        tokenizer: of the model.
        ends: tokens that end an answer.
        never: tokens that no answer may hold.
        limits: of answers and tasks at a time.
    """

    def __init__(self, decoder: Decoder, tokenizer: Any, ends: Sequence[int], never: Sequence[int], limits: Limits):
        self.decoder, self.tokenizer, self.limits = decoder, tokenizer, limits
        self._ends, self._never = frozenset(ends), list(never)
        self._wake = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._prompts: deque[Answer] = deque()
        self._rows: list[Answer] = []
        self._tasks: deque[Task] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="nestlearn-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End all answers and tasks with an error, and the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def answers(self) -> int:
        """Answers that are generated or wait."""
        return len(self._rows) + len(self._prompts) + len(self._waiting)

    # -- for coroutines -----------------------------------------------------------------------------------------

    def answer(
        self, session: Any, ids: Sequence[int], *, limit: int, temperature: float, top_p: float, seed: int | None,
        stop: Sequence[str], top: int | None,
    ) -> Stream[Piece]:  # fmt: skip
        """Begin an answer to a prompt with what the session has learned up to now.

        Raises:
            ApiError: too many wait (429).
        """
        self._refuse_if_full()
        drawn = drawing(temperature, top_p, seed, session.model.device) if temperature else None
        answer = Answer(ids, self.decoder.begin(session), limit, GrowingText(self.tokenizer, stop), drawn, top)
        with self._wake:
            self._waiting.append(answer)
            self._wake.notify()
        return answer.stream

    def task(self, steps: Generator[Any, Any, Any], session: MemorySession | None = None) -> Stream[Any]:
        """Take the steps of a generator, one in each round; the stream has what it gives.

        Args:
            steps: to take; those of `MemorySession.asking`, or of a generator around it, need its ``session``.
            session: that reads.

        Raises:
            ApiError: too many wait (429).
        """
        self._refuse_if_full()
        task = Task(steps, Stream(), session)
        with self._wake:
            self._tasks.append(task)
            self._wake.notify()
        return task.stream

    def _refuse_if_full(self) -> None:
        if self._stopping:
            raise ApiError(503, "the server is stopping.", "server_stopping", retry_after=5)
        if self.answers + len(self._tasks) >= self.limits.rows + self.limits.waiting:
            raise busy(f"{self.answers} answers and {len(self._tasks)} readings wait already. Try again soon.", 2)

    # -- on the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self.answers or self._tasks)
                if self._stopping:
                    break
            self._round()
        error = ApiError(503, "the server has stopped; nothing of this request was learned.", "server_stopping")
        for answer in (*self._rows, *self._prompts, *self._waiting):
            answer.stream.put(error)
        for task in self._tasks:
            task.steps.close()
            task.stream.put(error)

    def _round(self) -> None:
        self._admit()
        self._step_rows()
        self._step_prompts()
        self._step_tasks()

    def _admit(self) -> None:
        """Drop answers that nobody waits for, and take new ones where there is room."""
        self._keep([not answer.stream.cancelled for answer in self._rows])
        self._prompts = deque(answer for answer in self._prompts if not answer.stream.cancelled)
        while self._waiting and len(self._rows) + len(self._prompts) < self.limits.rows:
            answer = self._waiting.popleft()
            if not answer.stream.cancelled:
                self._prompts.append(answer)

    def _keep(self, kept: Sequence[bool]) -> None:
        places = [place for place, keep in enumerate(kept) if keep]
        if len(places) < len(self._rows):
            self._rows = [self._rows[place] for place in places]
            self.decoder.keep(places)

    def _step_rows(self) -> None:
        if not self._rows:
            return
        try:
            logits = self.decoder.step([answer.token for answer in self._rows])
            going = self._choose(self._rows, logits)
        except Exception as error:  # noqa: BLE001 - the thread goes on; those who wait are told
            for answer in self._rows:
                answer.stream.put(error)
            going = [False] * len(self._rows)
        self._keep(going)

    def _step_prompts(self) -> None:
        """Read a piece of one prompt, or some short ones. Those that are read to the end give a token and join."""
        if self._prompts:
            self._read_prompts(self._next_prompts())

    def _next_prompts(self) -> list[Answer]:
        """The first prompt, and those behind it that fit into the same pass: each whole, padded to the longest."""
        chosen, width = [self._prompts.popleft()], 0
        while self._prompts and all(answer.read == 0 for answer in (*chosen, self._prompts[0])):
            width = max(len(answer.ids) for answer in (*chosen, self._prompts[0]))
            if width * (len(chosen) + 1) > PROMPT_PIECE:
                break
            chosen.append(self._prompts.popleft())
        return chosen

    def _read_prompts(self, answers: list[Answer]) -> None:
        """Read in one pass. If that fails, each is tried alone: one must not fail the others."""
        pieces = [answer.ids[answer.read : answer.read + PROMPT_PIECE] for answer in answers]
        try:
            logits = self.decoder.read([answer.row for answer in answers], pieces)
        except Exception as error:  # noqa: BLE001 - as above
            if len(answers) == 1:
                answers[0].stream.put(error)
                return
            for answer in answers:
                self._read_prompts([answer])
            return
        for answer, piece, scores in zip(answers, pieces, logits, strict=True):
            answer.read += len(piece)
            self._begin(answer, scores)

    def _begin(self, answer: Answer, scores: Float[Tensor, "v"]) -> None:
        """Let an answer join, with its first token, if its prompt is read to the end."""
        try:
            if answer.read < len(answer.ids):
                self._prompts.append(answer)
            elif self._choose([answer], scores[None])[0]:
                self.decoder.join(answer.row)
                self._rows.append(answer)
        except Exception as error:  # noqa: BLE001 - as above
            answer.stream.put(error)

    def _step_tasks(self) -> None:
        """One step of one task. Readings that wait for a segment share the pass if there are no answers."""
        if not self._tasks:
            return
        task = self._tasks.popleft()
        if task.stream.cancelled:
            task.steps.close()
        elif task.asked is None:
            self._go_on(task, None)
        else:
            others = [] if self.answers else [t for t in self._tasks if t.asked and not t.stream.cancelled]
            self._read_segments([task, *others[: READINGS - 1]])

    def _read_segments(self, tasks: list[Task]) -> None:
        """Read in one pass what tasks wait for. If that fails, each is tried alone: one must not fail the others."""
        calls = [(task.session._backend, call) for task in tasks if task.session for call in task.asked or ()]
        try:
            read = iter(read_rows(calls))
        except Exception as error:  # noqa: BLE001 - as above
            if len(tasks) > 1:
                for task in tasks:
                    self._read_segments([task])
                return
            self._drop(tasks[0])
            tasks[0].steps.close()
            tasks[0].stream.put(error)
            return
        for task in tasks:
            self._go_on(task, [next(read) for _ in task.asked or ()])

    def _go_on(self, task: Task, read: list[PieceRead] | None) -> None:
        """Hand over the next event. A reading goes on to the calls that it waits for."""
        self._drop(task)
        try:
            given = task.steps.send(read)
            while not isinstance(given, list):
                task.stream.put(given)
                if read is None:
                    break
                given = next(task.steps)
        except StopIteration:
            task.stream.put(None)
        except Exception as error:  # noqa: BLE001 - as above
            task.stream.put(error)
        else:
            task.asked = given if isinstance(given, list) else None
            with self._wake:
                self._tasks.append(task)

    def _drop(self, task: Task) -> None:
        """Take a task out of those that wait, if it is there."""
        with self._wake:
            self._tasks = deque(other for other in self._tasks if other is not task)

    @torch.inference_mode()
    def _choose(self, answers: Sequence[Answer], logits: Float[Tensor, "n v"]) -> list[bool]:
        """Choose the next token of every answer; whether each goes on."""
        if self._never:
            logits = logits.clone()
            logits[:, self._never] = -torch.inf
        likely, going = logits.argmax(-1).tolist(), []
        for answer, scores, token in zip(answers, logits, likely, strict=True):
            if answer.drawn is not None:
                token = int(answer.drawn(cast(Any, None), scores[None].float())[0].argmax())
            going.append(self._accept(answer, token, scores))
        return going

    def _accept(self, answer: Answer, token: int, scores: Float[Tensor, "v"]) -> bool:
        """Add a token to an answer, and hand over what is final; whether the answer goes on."""
        answer.token, answer.count = token, answer.count + 1
        ended = token in self._ends
        if not ended:
            if answer.top is not None:
                answer.scores.append((len(answer.text.text), _score(token, scores, answer.top)))
            said = answer.text.add(token)
        else:
            said = ""
        finish = "stop" if ended or answer.text.stopped else "length" if answer.count >= answer.limit else None
        if finish is not None:
            said += answer.text.end()
            answer.stream.put(Piece(said, _final(answer, finish=True), finish, answer.count))
            answer.stream.put(None)
            return False
        if said:
            answer.stream.put(Piece(said, _final(answer, finish=False), None, answer.count))
        return True


def _score(token: int, scores: Float[Tensor, "v"], top: int) -> TokenScore:
    logs = scores.float().log_softmax(-1)
    best = logs.topk(top)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenScore(token, float(logs[token]), tuple(pairs))


def _final(answer: Answer, *, finish: bool) -> tuple[TokenScore, ...]:
    """Scores of the tokens whose text was handed over. Those of a stop word never are."""
    said = len(answer.text.text)
    kept = answer.text.stopped or not finish
    final = tuple(score for start, score in answer.scores if not kept or start < said)
    answer.scores = [] if finish else [pair for pair in answer.scores if pair[0] >= said]
    return final
