"""A session: one user's memory over a shared model. It reads, generates, and is saved, forked and forgotten."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from nestlearn.data.control_tokens import LiteralText, control_ids
from nestlearn.models import HopeForCausalLM
from nestlearn.nn.state import flatten_state, unflatten_state

from .session_engines import Engine, HopeEngine, StackedEngine
from .session_file import fingerprint, read_session, write_session
from .session_generation import cut_at, generation_arguments
from .session_levels import LevelRow
from .session_reading import Place, SourceFailed, Walk, guarded, views_of
from .session_report import ReadReport
from .session_text import TokenReader, check_text, documents_of

Compare = Literal["levels", "off", "none"]
Progress = Callable[[ReadReport], None]
Source = str | Path | Iterable[str]

# Models whose rotary embedding keeps a table that longer inputs change: their sessions take turns.
_TURNS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


class ReadInterrupted(RuntimeError):
    """A source failed while it was read. What was read before stays learned; ``report`` says how much that is.

    The session is whole: it stands at the last whole segment, and the next read starts a new document.
    """

    def __init__(self, message: str, report: ReadReport) -> None:
        super().__init__(message)
        self.report = report


class PromptTooLong(ValueError):
    """A prompt and its answer do not fit into the model's positions."""


class MemorySession:
    """What one user's reading has taught a model; many sessions share one model, which never changes.

    Over a stacked model (`nestlearn.stack_levels`) every level learns from the loss of the next tokens, segment by
    segment; a `HopeForCausalLM` learns in its forward pass. Calls on one session wait for each other; different
    sessions may be used by different threads at once.

    Args:
        model: a stacked model (an adapter around it is fine) or a `HopeForCausalLM`, in evaluation mode.
        tokenizer: its tokenizer.
        context_length: tokens after which a stacked model's attention starts anew (default: the model's positions, at
            most 1,024), rounded down to whole segments. What was learned stays.
        compare: what `read` measures beside: ``"levels"`` the same text with writes off (all of them, those of a Hope
            model's mixers too), and with each level's writes ignored (one more forward pass each; on a Hope model one
            more reading); ``"off"`` with writes off only; ``"none"``.

    Raises:
        ValueError: a model without levels or in training mode, or a context too short for a segment.

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
        self, model: Any, tokenizer: Any, *, context_length: int | None = None, compare: Compare = "levels"
    ) -> None:
        if compare not in get_args(Compare):
            raise ValueError(f"compare={compare!r} does not exist; use 'levels', 'off' or 'none'.")
        if model.training:
            raise ValueError("the model is in training mode. Call model.eval() before it reads.")
        self.model, self.tokenizer, self.compare = model, tokenizer, compare
        kind = HopeEngine if isinstance(model, HopeForCausalLM) else StackedEngine
        self._engine: Engine = kind(model, tokenizer, context_length)
        self._tokens_of = TokenReader(tokenizer)
        self._place = Place(self._engine.fresh())
        self._lock = threading.RLock()

    # -- reading ------------------------------------------------------------------------------------------------

    def read(self, source: Source, *, end: bool = True, progress: Progress | None = None) -> ReadReport:
        """Learn from a text, and report how well each of its segments was predicted before it was written.

        A document is read in segments of the smallest period. Its last one may be shorter: it is written like the
        others, and the fastest level's period ends with it. With ``end=False`` the document goes on with the next
        read: what does not fill a segment (and the last 1,024 to 2,048 characters, which wait to be tokenized) is kept,
        so that ``read(a, end=False)`` and ``read(b)`` equal ``read(a + b)``. After the end of a document a stacked
        model keeps what it has learned, but no context.

        Args:
            source: a text; a `pathlib.Path` of a file or folder (each file is a document); or an iterable of pieces of
                one document (an open text file, a generator).
            end: whether the last document ends here.
            progress: called after every segment with the report so far.

        Raises:
            ValueError, TypeError: a source that is no text; nothing was learned from it. The files of a folder are all
                checked before the first is read.
            ReadInterrupted: a source failed on the way.
        """
        with self._lock, self._turn():
            documents, size = documents_of(source)
            report, began = ReadReport(total_bytes=size), time.monotonic()
            walk = Walk(self._engine, self._tokens_of, self._place, True, views_of(self._engine, self.compare))

            def follow(steps: Iterable[Any]) -> None:
                for place, score in steps:
                    self._place = place
                    if score is not None:
                        report.segments.append(score)
                        report.seconds = time.monotonic() - began
                        if progress is not None:
                            progress(report)

            try:
                self._follow_documents(walk, documents, end, follow)
            except BaseException as error:
                self._place = self._place.ended(self._engine)
                if isinstance(error, SourceFailed):
                    message = f"the text failed after {report.tokens} tokens: {error} What was read before is learned."
                    raise ReadInterrupted(message, report) from error.__cause__
                raise
            report.seconds = time.monotonic() - began
            return report

    @staticmethod
    def _follow_documents(
        walk: Walk, documents: Iterable[Iterable[str]], end: bool, follow: Callable[[Iterable[Any]], None]
    ) -> None:
        for number, document in enumerate(documents):
            if number:
                follow(walk.end())
            for piece in guarded(document):
                follow(walk.take(piece))
        if end:
            follow(walk.end())

    def score(self, source: Source) -> float:
        """Bits per byte of a text with what was learned up to now. Nothing is written, nothing changes.

        The text is read in a fresh context, so that of a stacked model only learned weights can help.
        """
        with self._lock, self._turn():
            documents, _ = documents_of(source)
            report = ReadReport()
            walk = Walk(self._engine, self._tokens_of, self._place.ended(self._engine), writes=False)

            def follow(steps: Iterable[Any]) -> None:
                report.segments.extend(score for _, score in steps if score is not None)

            try:
                self._follow_documents(walk, documents, True, follow)
            except SourceFailed as error:
                raise ValueError(f"the text failed after {report.tokens} tokens: {error}") from error.__cause__
            return report.bits_per_byte

    # -- generation ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | Sequence[dict[str, str]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        special_tokens: bool = False,
        **kwargs: Any,
    ) -> str:
        """What follows the prompt, with everything learned up to now. The session learns nothing from it.

        Args:
            prompt: a text, or a conversation ``[{"role": "user", "content": ...}, ...]`` to be written by the
                tokenizer's chat template. Nothing else is in a stacked model's context.
            max_new_tokens: at most so many.
            temperature: 0 takes the most likely token each time; above, tokens are drawn.
            top_p: draw from the most likely tokens of so much probability.
            seed: of the drawing (the process's random state is left as it was).
            stop: end before the first of these words.
            special_tokens: whether control tokens spelled out in a text are such (a start token among them, so none is
                put before); otherwise they are letters. In a conversation only those of the template are. The token
                at which a Hope model forgets (``reset_token_id``) is left out of prompts and never generated.
            kwargs: further arguments of ``model.generate`` (``streamer``, ``repetition_penalty``, ...).

        Returns:
            The continuation, without the prompt.

        Raises:
            ValueError: an empty prompt, one too long for the model (`PromptTooLong`), or arguments out of range.
        """
        words = [stop] if isinstance(stop, str) else list(stop)
        forgetting = self._engine.forgetting_tokens()
        ids = [token for token in self._prompt_ids(prompt, special_tokens) if token not in forgetting]
        with self._lock, self._turn(), self._engine.generating(self._place.mind) as state:
            self._check_prompt(ids, max_new_tokens)
            inputs = torch.tensor([ids], device=self.model.device)
            columns = self._engine.columns(self._place.mind) + len(ids)
            arguments = generation_arguments(
                self.tokenizer, self.model, len(ids), max_new_tokens, temperature, top_p, words, seed
            )
            if forgetting:
                arguments["suppress_tokens"] = list(forgetting)
            mask = inputs.new_ones(1, columns)
            output = self.model.generate(inputs, attention_mask=mask, **{**arguments, **state, **kwargs})
        return cut_at(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True), words)

    def _prompt_ids(self, prompt: str | Sequence[dict[str, str]], special_tokens: bool) -> list[int]:
        if not isinstance(prompt, str | bytes) and isinstance(prompt, Sequence):
            for message in prompt:
                check_text(message["content"], "a message of the prompt")
            return LiteralText(self.tokenizer).conversation(prompt)
        text = check_text(prompt, "the prompt")
        if special_tokens:
            return control_ids(self.tokenizer, text)
        return [*self._engine.start_tokens(), *(token for token, _ in self._tokens_of(text, first=True))]

    def _check_prompt(self, ids: list[int], max_new_tokens: int) -> None:
        if not ids:
            raise ValueError("the prompt is empty, and the tokenizer has no token that a text starts with.")
        room = self._engine.positions
        if room is not None and len(ids) + max_new_tokens > room:
            raise PromptTooLong(
                f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's {room} positions. "
                "Shorten the prompt (what was read need not be in it), or lower max_new_tokens."
            )

    # -- what was learned ---------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of what was learned."""
        return self._engine.nbytes(self._place.mind)

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return self._place.tokens

    def describe(self) -> list[LevelRow]:
        """Every level of every layer: period, writes, how far from its initial weights, bytes."""
        return self._engine.rows(self._place.mind, self._engine.fresh())

    def diff(self, other: MemorySession | None = None) -> list[LevelRow]:
        """How far this session's levels are from another's (None: from the model), as `describe`.

        Raises:
            ValueError: sessions over different models.
        """
        if other is not None and other.model is not self.model and fingerprint(other.model) != fingerprint(self.model):
            raise ValueError("the sessions are over different models; what they have learned cannot be compared.")
        return self._engine.rows(self._place.mind, self._engine.fresh() if other is None else other._place.mind)

    def forget(self, levels: Iterable[int] | None = None) -> None:
        """Return levels (by number, 0 the fastest) to their initial weights; None forgets everything.

        Raises:
            ValueError: a level that does not exist or never learns.
        """
        with self._lock:
            if levels is None:
                self._place = Place(self._engine.fresh())
                return
            chosen = list(levels)
            wrong = [level for level in chosen if level not in self._engine.levels]
            if wrong:
                raise ValueError(
                    f"levels {wrong} cannot be forgotten; those of this model that learn are "
                    f"{list(self._engine.levels)}. Without levels, everything is forgotten."
                )
            place = self._place.ended(self._engine)
            self._place = Place(self._engine.forget(place.mind, chosen), tokens=place.tokens)

    def fork(self) -> MemorySession:
        """An independent session that knows the same; costs no memory until one of them reads on."""
        other = MemorySession.__new__(MemorySession)
        other.__dict__.update(self.__dict__)
        other._lock = threading.RLock()
        return other

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the session to one file: what differs from the model, and the model's fingerprint.

        The file is complete or absent (it is written under another name and renamed), whatever happens meanwhile.

        Raises:
            OSError: it cannot be written; what was there before is untouched.
        """
        with self._lock:
            place, engine = self._place, self._engine
        tensors, spec = flatten_state(engine.to_tree(place.mind), "mind")
        header = {
            "kind": engine.kind,
            "model": type(self.model).__name__,
            "fingerprint": fingerprint(self.model),
            "spec": spec,
            "place": [place.text, [list(token) for token in place.waiting], place.blocks, place.segments, place.tokens],
            "context_length": engine.context_length,
            "compare": self.compare,
        }
        write_session(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path, model: Any, tokenizer: Any) -> MemorySession:
        """A session from a file, over the model that it was learned with.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, corrupted or foreign, or the session of another model.
        """
        tensors, header = read_session(Path(path))
        mine = fingerprint(model)
        if header.get("fingerprint") != mine:
            raise ValueError(
                f"{path} is a session over another model: a {header.get('model')} with fingerprint "
                f"{header.get('fingerprint')}, this is a {type(model).__name__} with {mine}. What it has learned "
                "belongs to the exact weights, levels and dtype it was learned with; load those."
            )
        try:
            session = cls(model, tokenizer, context_length=header["context_length"], compare=header["compare"])
            text, waiting, blocks, segments, tokens = header["place"]
            mind = session._engine.from_tree(unflatten_state(tensors, header["spec"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has an incomplete session header ({error!r}). Restore it from a copy.") from error
        waiting = tuple((int(token), size) for token, size in waiting)
        session._place = Place(mind, text, waiting, blocks, segments, tokens)
        return session

    def _turn(self) -> AbstractContextManager[Any]:
        """The lock of a model whose forward pass changes the model itself; nothing for others."""
        if not _has_changing_table(self.model):
            return nullcontext()
        with _TURNS_LOCK:
            return _TURNS.setdefault(self.model, threading.RLock())

    def __repr__(self) -> str:
        return f"MemorySession({type(self.model).__name__}, tokens={self.tokens}, bytes={self.nbytes})"


def _has_changing_table(model: Any) -> bool:
    """Whether the rotary frequencies depend on the longest input so far."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)
