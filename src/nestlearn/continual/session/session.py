"""A session: one user's memory over a shared model. It reads, generates, and is saved, forked and forgotten."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from nestlearn.data.control_tokens import LiteralText, control_ids
from nestlearn.models import HopeForCausalLM
from nestlearn.models.generation import generate_texts
from nestlearn.models.stacking.write import PROTECT
from nestlearn.nn.state import flatten_state, unflatten_state

from .backends import Backend, HopeBackend, PieceRead, ReadCall, StackedBackend, answer
from .editing import EditedSession
from .file import SESSION_FILE, check_fingerprint, fingerprint
from .levels import LevelRow
from .practice import PROMPT, QUESTIONS, OnPractice, Practice, PracticeReport, share
from .reader import (
    BlockTokenizer,
    Conversation,
    Cursor,
    DocumentReader,
    SourceFailed,
    check_text,
    documents_of,
    name_of_source,
    pieces_of,
)
from .report import LogEntry, ReadInterrupted, ReadReport, run_steps
from .turns import turn_of

Compare = Literal["off", "levels", "none"]
OnRead = Callable[[ReadReport], None]
Source = str | Path | Iterable[str] | Conversation
Asked = list[ReadCall] | ReadReport
"""What a reading gives: calls to be answered, or the report so far."""


class PromptTooLong(ValueError):
    """A prompt and its answer do not fit into the model's positions."""


class MemorySession(EditedSession):
    """The memory of one user over a model. Many sessions share one model, which never changes.

    A stacked model (`nestlearn.stack_levels`) learns from the loss of the next tokens, segment by segment, in every
    level. A `HopeForCausalLM` learns in its forward pass. Calls on one session wait for each other; threads may use
    different sessions at once.

    Args:
        model: a stacked model (an adapter around it is fine) or a `HopeForCausalLM`, in evaluation mode.
        tokenizer: its tokenizer.
        context_length: tokens after which the attention of a stacked model starts anew, rounded down to whole segments
            (default: the model's positions, at most 1,024). What was learned stays.
        compare: what `read` measures for comparison. ``"off"``: the same text with all writes ignored, those of the
            mixers of a Hope model too. ``"levels"``: also with the writes of each level ignored. ``"none"``: nothing.
            All writes off cost up to two fifths of the time of reading, each level one more forward pass.
        protect: ``c_0`` of a stacked model's memory of general inputs (`nestlearn.models.stacking.protect`): a smaller
            one keeps writes further from general inputs. None writes without it.
        settings: ``rule``, ``lr``, ``retain``, ``clip`` and ``momentum`` of the levels of a stacked model, in place of
            those with which it was stacked: one value for all, or a sequence with one for each level that learns. See
            `nestlearn.nn.Level`.

    Raises:
        ValueError: a model without levels or in training mode, a context too short for a segment, or a setting that
            cannot work.
        TypeError: an unknown setting.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, max_position_embeddings=128)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=16), Level(period=64)]).eval()
        >>> session = MemorySession(model, byte_tokenizer())
        >>> report = session.read("What is read once may be known later. " * 10)
        >>> report.tokens, report.bits_per_byte < report.off
        (380, True)
        >>> session.save("mine.session")
        >>> MemorySession.load("mine.session", model, byte_tokenizer()).diff(session)[0].change
        0.0
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        context_length: int | None = None,
        compare: Compare = "off",
        protect: float | None = PROTECT,
        **settings: Any,
    ) -> None:
        if compare not in get_args(Compare):
            raise ValueError(f"compare={compare!r} does not exist; use 'off', 'levels' or 'none'.")
        if model.training:
            raise ValueError("the model is in training mode. Call model.eval() before it reads.")
        self.model, self.tokenizer, self.compare = model, tokenizer, compare
        kind = HopeBackend if isinstance(model, HopeForCausalLM) else StackedBackend
        self._backend: Backend = kind(model, tokenizer, context_length, protect, settings)
        self._tokens_of = BlockTokenizer(tokenizer)
        self._cursor = Cursor(self._backend.fresh())
        self.log: tuple[LogEntry, ...] = ()
        self._lock = threading.RLock()

    # -- reading ------------------------------------------------------------------------------------------------

    def read(
        self, source: Source, *, end: bool = True, progress: OnRead | None = None, name: str | None = None
    ) -> ReadReport:
        """Learn from a text, and report how well each of its segments was predicted before it was written.

        A document is read in segments of the smallest period. The last one may be shorter: it is written like the
        others, and the period of the fastest level ends with it. After the end of a document a stacked model keeps what
        it has learned, but no context.

        With ``end=False`` the document goes on with the next read. The session keeps what does not fill a segment, and
        the last 1,024 to 2,048 characters, which are not tokenized yet. So ``read(a, end=False)`` and ``read(b)`` equal
        ``read(a + b)``.

        Args:
            source: a text; a `pathlib.Path` of a file or folder (each file is a document); an iterable of pieces of
                one document (an open text file, a generator); or a conversation, a list of messages
                ``{"role": ..., "content": ...}``, which the chat template of the tokenizer makes one document. Control
                tokens that the template writes are such; those spelled out in contents are letters.
            end: whether the last document ends here.
            progress: called after every segment with the report so far.
            name: of the source in ``log``; by default its path, or its beginning.

        Raises:
            ValueError, TypeError: the source is no text; nothing was learned. All files of a folder are checked before
                the first is read.
            ReadInterrupted: the source failed later; what was read before is learned.
        """
        with closing(self.reading(source, end=end, name=name)) as steps:
            return run_steps(steps, progress)

    def reading(
        self, source: Source, *, end: bool = True, name: str | None = None
    ) -> Generator[ReadReport, None, ReadReport]:
        """`read` as a generator: it gives the report after every segment, and returns it at the end.

        One thread can so do other work between two segments. It has to run the generator to its end or close it, on the
        thread that began it: until then other readings of the session wait. What was read before it is closed is
        learned.

        Raises:
            ValueError, TypeError, ReadInterrupted: see `read`.
        """
        return (yield from answer(self._backend, self.asking(source, end=end, name=name)))

    def asking(
        self, source: Source, *, end: bool = True, name: str | None = None
    ) -> Generator[Asked, list[PieceRead], ReadReport]:
        """`reading` that does not read itself: it also gives lists of calls, and is sent what was read."""
        with self._lock:
            reader = DocumentReader(self._backend, self._tokens_of, self._cursor.memory, compare=self.compare)
            try:
                report = yield from self._read(source, reader, end)
            except ReadInterrupted as error:
                self.log = (*self.log, LogEntry.now(name or name_of_source(source), error.report.bytes))
                raise
            # Only now is it known that the source can be read, and so named.
            self.log = (*self.log, LogEntry.now(name or name_of_source(source), report.bytes))
            return report

    def score(self, source: Source) -> float:
        """Bits per byte of a text with what was learned up to now. Nothing is written, nothing changes.

        The text is read in a fresh context, so of a stacked model only learned weights can help.

        Raises:
            ValueError, TypeError, ReadInterrupted: see `read`.
        """
        with closing(self.scoring(source)) as steps:
            return run_steps(steps).bits_per_byte

    def scoring(self, source: Source) -> Generator[ReadReport, None, ReadReport]:
        """`score` as a generator: it gives the report after every segment, as `reading` does, and returns it."""
        other = self.fork()
        other._end_document()
        reader = DocumentReader(self._backend, self._tokens_of, other._cursor.memory, writes=False)
        return (yield from answer(self._backend, other._read(source, reader, True)))

    def _read(self, source: Source, reader: DocumentReader, end: bool) -> Generator[Asked, list[PieceRead], ReadReport]:
        """The loop of a reading: score a segment, write it, move the cursor."""
        documents, size = reader.documents(source)
        report, began = ReadReport(reader.scores, total_bytes=size), time.monotonic()
        with turn_of(self.model):
            try:
                for piece in pieces_of(documents, end):
                    self._cursor = reader.take(self._cursor, piece)
                    while count := reader.next_segment(self._cursor, ending=piece is None):
                        self._cursor = yield from reader.read(self._cursor, count)
                        if piece is None and not self._cursor.waiting:
                            yield from reader.compare()
                        report.seconds = time.monotonic() - began
                        yield report
                    if piece is None:
                        self._cursor = yield from reader.end_document(self._cursor)
                yield from reader.compare()
                report.seconds = time.monotonic() - began
            except BaseException as error:
                self._end_document()
                if isinstance(error, SourceFailed):
                    message = f"the source failed after {report.tokens} tokens, which were read: {error}"
                    raise ReadInterrupted(message, report) from error.__cause__
                raise
        return report

    def _end_document(self) -> None:
        self._cursor = self._cursor.end_document(self._backend.end_document(self._cursor.memory))

    # -- practice -----------------------------------------------------------------------------------------------

    def practice(
        self,
        *sources: str | Path | Iterable[str],
        passes: int = 30,
        questions: int = QUESTIONS,
        lr: float = 1.0,
        minutes: float | None = None,
        prompt: str = PROMPT,
        seed: int = 0,
        progress: OnPractice | None = None,
    ) -> PracticeReport:
        """Learn documents by heart: read them many times, and answer questions made from them (stacked models).

        Reading once tells a model what a text is about; asked without the text, it answers hardly better. Here every
        step learns four windows of 256 tokens and eight questions, sentences of the documents in which a name or a
        number is left out (`nestlearn.data.clozes`), with their answers. A step of fewer windows is shorter in
        proportion. Steps fall linearly to a tenth. What was learned is kept after every step, so an interrupt loses
        nothing.

        The effect of one step is that of a segment in `read`, see `nestlearn.models.stacking.practice.practise`. With a
        memory of general inputs (`nestlearn.continual.protect`) other text is left alone.

        Args:
            sources: texts, paths or pieces of one document, as in `read`. A short first line that is no sentence is the
                title of its document.
            passes: how often every window is read.
            questions: of one step; 0 reads the text only.
            lr: factor of the steps of all levels; 1 suits an orthogonalized level of ``lr`` 3 (`nestlearn stack`'s).
            minutes: stop after this time.
            prompt: of the questions, with ``{sentence}`` and ``{topic}``.
            seed: of the order and the choice of questions.
            progress: called after every step with the report so far.

        Raises:
            ValueError: a Hope model, no text, or arguments out of range; nothing was learned.
        """
        steps = self.practising(
            *sources, passes=passes, questions=questions, lr=lr, minutes=minutes, prompt=prompt, seed=seed
        )
        with closing(steps):
            return run_steps(steps, progress)

    def practising(
        self,
        *sources: str | Path | Iterable[str],
        passes: int = 30,
        questions: int = QUESTIONS,
        lr: float = 1.0,
        minutes: float | None = None,
        prompt: str = PROMPT,
        seed: int = 0,
    ) -> Generator[PracticeReport, None, PracticeReport]:
        """`practice` as a generator: it gives the report after every step, as `reading` does after every segment."""
        backend = self._backend
        if not isinstance(backend, StackedBackend):
            raise ValueError("a Hope model learns in its forward pass and cannot practise; let it read the text again.")
        began = time.monotonic()
        texts = ["".join(pieces) for source in sources for pieces in documents_of(source)[0]]
        options: dict[str, Any] = {"passes": passes, "questions": questions, "prompt": prompt, "seed": seed}
        made = Practice(self.tokenizer, texts, backend.start_tokens, lr=lr, minutes=minutes, **options)
        report = PracticeReport(made.steps, len(made.questions))
        with self._lock, turn_of(self.model):
            self._end_document()
            memory = self._cursor.memory
            for text, asked in made:
                fall = 1 - 0.9 * report.steps / report.total
                memory, losses = backend.practise(memory, [*text, *asked], lr * fall * share(text))
                self._cursor = replace(self._cursor, memory=backend.end_practice(memory))
                report.add(text, asked, losses, time.monotonic() - began)
                yield report
                if minutes is not None and report.seconds >= 60 * minutes:
                    break
            for text in texts:
                self.log = (*self.log, LogEntry.now(f"practised {name_of_source(text)}", len(text.encode())))
        return report

    # -- generation ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Conversation,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        special_tokens: bool = False,
        **options: Any,
    ) -> str:
        """Continue a prompt with everything learned up to now. The session learns nothing from it.

        Args:
            prompt: a text, or a conversation ``[{"role": "user", "content": ...}, ...]`` for the chat template of the
                tokenizer. A stacked model has nothing else in its context.
            max_new_tokens, temperature, top_p, seed, stop, options: see `nestlearn.models.generate_texts`.
            special_tokens: whether control tokens spelled out in a text are such (a start token among them, so none is
                added); by default they are letters. In a conversation only the template writes control tokens. The
                token at which a Hope model forgets (``reset_token_id``) is left out of prompts and never generated.

        Returns:
            The continuation, without the prompt.

        Raises:
            ValueError: an empty prompt, one too long for the model (`PromptTooLong`), or arguments out of range.
        """
        ids = self.prompt_ids(prompt, special_tokens)
        self.check_prompt(ids, max_new_tokens)
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop}
        with self._lock, turn_of(self.model), self._backend.generating(self._cursor.memory, len(ids)) as state:
            options = {"max_new_tokens": max_new_tokens, **sampling, **state, **options}
            return generate_texts(self.model, self.tokenizer, [ids], **options)[0]

    def active(self) -> AbstractContextManager[None]:
        """A context in which every forward pass of the stacked model uses what was learned up to now; nothing is
        written. So any evaluation measures the session.

        Raises:
            ValueError: the session of a Hope model, whose forward passes start without its cache.
        """
        return self._backend.active(self._cursor.memory)

    def prompt_ids(self, prompt: str | Conversation, special_tokens: bool = False) -> list[int]:
        """Tokens of a prompt of `generate`, without those at which the model forgets."""
        if not isinstance(prompt, str | bytes) and isinstance(prompt, Sequence):
            for message in prompt:
                check_text(message["content"], "a message of the prompt")
            ids = LiteralText(self.tokenizer).conversation(prompt)
        elif special_tokens:
            ids = control_ids(self.tokenizer, check_text(prompt, "the prompt"))
        else:
            tokens = self._tokens_of(check_text(prompt, "the prompt"), first=True)
            ids = [*self._backend.start_tokens, *(token for token, _ in tokens)]
        forgetting = self._backend.forgetting_tokens()
        return [token for token in ids if token not in forgetting]

    def check_prompt(self, ids: list[int], max_new_tokens: int) -> None:
        """Raise ValueError for an empty prompt, `PromptTooLong` for one that leaves no room for so many tokens."""
        if not ids:
            raise ValueError("the prompt is empty, and the tokenizer has no token that a text starts with.")
        room = self._backend.positions
        if room is not None and len(ids) + max_new_tokens > room:
            raise PromptTooLong(
                f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's {room} positions. "
                "Shorten the prompt (what was read need not be in it), or lower max_new_tokens."
            )

    # -- what was learned ---------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of what was learned."""
        return self._cursor.memory.nbytes

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return self._cursor.tokens

    @property
    def unfinished(self) -> tuple[int, int] | None:
        """Characters and segments read of a document that has not ended, as in a file that was saved while it was read.

        ``read(text[characters:])`` goes on with it. None between documents.
        """
        return (self._cursor.characters, self._cursor.segments) if self._cursor.characters else None

    def describe(self) -> list[LevelRow]:
        """Every level of every layer: period, writes, distance from its initial weights, bytes."""
        return self.diff()

    def diff(self, other: MemorySession | None = None) -> list[LevelRow]:
        """How far the levels of this session are from those of another one (None: from the model).

        Raises:
            ValueError: sessions over different models.
        """
        if other is not None and other.model is not self.model and fingerprint(other.model) != fingerprint(self.model):
            raise ValueError("the sessions are over different models; what they have learned cannot be compared.")
        base = self._backend.fresh() if other is None else other._cursor.memory
        return self._backend.rows(self._cursor.memory, base)

    def forget(self, levels: Iterable[int] | None = None) -> None:
        """Return levels (by number, 0 the fastest) to their initial weights; None forgets everything, edits too.

        Raises:
            ValueError: a level that does not exist or never learns.
        """
        with self._lock:
            if levels is None:
                self._cursor, self.log = Cursor(self._backend.fresh()), ()
                return
            chosen, learning = list(levels), self._backend.levels
            if wrong := [level for level in chosen if level not in learning]:
                raise ValueError(
                    f"levels {wrong} cannot be forgotten; those of this model that learn are {list(learning)}. "
                    "Without levels, everything is forgotten."
                )
            memory = self._backend.end_document(self._cursor.memory).forget(chosen)
            self._cursor = Cursor(memory, tokens=self._cursor.tokens)

    def fork(self) -> MemorySession:
        """An independent session that knows the same; costs no memory until one of them reads on."""
        other = MemorySession.__new__(MemorySession)
        other.__dict__.update(self.__dict__)
        other._lock = threading.RLock()
        return other

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the session to one file: what differs from the model, and the fingerprint of the model.

        Between documents the file has two bytes for a number that was learned and one for its momentum, inside of one
        four for each. The loaded session goes on exactly as this one: it is rounded when a document ends.

        The file is complete or absent: the session is written under another name and renamed.

        Raises:
            OSError: it cannot be written; what was there before is untouched.
            ValueError: ``path`` holds something else than a session, which stays.
        """
        with self._lock:
            cursor = self._cursor
        memory = self._backend.to_tree(cursor.memory)
        rest = (cursor.text, cursor.waiting, cursor.blocks, cursor.segments, cursor.tokens, cursor.characters)
        tensors, spec = flatten_state((memory, *rest), "cursor")
        header = {
            "model": type(self.model).__name__,
            "fingerprint": fingerprint(self.model),
            "context_length": self._backend.context_length,
            "compare": self.compare,
            "log": [asdict(entry) for entry in self.log],
            "settings": self._backend.settings_of_file(),
            "spec": spec,
        }
        SESSION_FILE.write(
            Path(path), tensors, header, "the session in memory is whole; free some space, and save again"
        )

    @classmethod
    def load(cls, path: str | Path, model: Any, tokenizer: Any, **settings: Any) -> MemorySession:
        """A session from a file, over the model with which it was learned.

        Args:
            path: of the file.
            model: with which it was learned. It may have been stacked with other settings, or protected since.
            tokenizer: of the model.
            settings: ``protect`` and settings of levels, in place of those in the file; see `MemorySession`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, corrupted, no session, or the session of another model.
        """
        tensors, header = SESSION_FILE.read(Path(path))
        check_fingerprint(Path(path), header, model)
        try:
            options = {name: header[name] for name in ("context_length", "compare", "settings", "spec")}
        except KeyError as error:
            raise ValueError(f"{path} has an incomplete session header ({error!r}). Restore it from a copy.") from error
        known, spec = options.pop("settings"), options.pop("spec")
        session = cls(model, tokenizer, **options, **{**known, **settings})
        if session._backend.settings_of_file().get("rule") != known.get("rule"):
            raise ValueError(f"{path} was learned by the rules {known.get('rule')}, which cannot change later.")
        try:
            memory, *rest = unflatten_state(tensors, spec)
            session._cursor = Cursor(session._backend.from_tree(memory), *rest)
            session._cursor.check(model.get_input_embeddings().weight.shape[0])
            session.log = tuple(LogEntry(**entry) for entry in header["log"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has an incomplete session header ({error!r}). Restore it from a copy.") from error
        except ValueError as error:
            why = str(error).rstrip(".")
            raise ValueError(f"{path} cannot be a session of this model: {why}. Restore it from a copy.") from error
        return session

    def __repr__(self) -> str:
        return f"MemorySession({type(self.model).__name__}, tokens={self.tokens}, bytes={self.nbytes})"
