"""Edits of a session: facts written into maps of a stacked model, taken back one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from nestlearn.continual.editing import EditMethod, Editor, EditReport, Fact, FactRows, general_directions
from nestlearn.continual.editing.edit import check_arguments
from nestlearn.continual.general import rows as general_rows
from nestlearn.models.stacking.edits import Edit
from nestlearn.models.stacking.general import own_text

from .backends import Backend, StackedBackend
from .reader import BlockTokenizer, Cursor
from .report import LogEntry
from .turns import turn_of

CONTEXTS = 2
"""Texts of the model's own before the prompt of a fact, each of some eight tokens."""


class EditedSession:
    """What `MemorySession` has for edits."""

    model: Any
    tokenizer: Any
    _backend: Backend
    _tokens_of: BlockTokenizer
    _cursor: Cursor
    _lock: Any

    log: tuple[LogEntry, ...]
    _end_document: Callable[[], None]

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Edits in force, oldest first."""
        return self._cursor.memory.levels.edits if isinstance(self._backend, StackedBackend) else ()

    def edit(
        self,
        facts: Sequence[Fact],
        *,
        method: EditMethod = "intattn",
        alpha: float | None = None,
        layers: Sequence[int] | None = None,
        general: str | None = None,
        seed: int = 0,
        progress: Callable[[str], None] | None = None,
    ) -> EditReport:
        """Write facts into the output maps of some layers at once (stacked models).

        The hidden state that makes the model say each target is searched at the last token of its subject. Then every
        map gets the smallest change that gives it there and keeps the outputs for general inputs. A part of an edit is
        kept for each map: ``n (2 in + out)`` numbers for n facts. The document that was being read ends.

        Args:
            facts: what the model should say. All are written or none.
            method: ``"intattn"``: MLP and attention, each by its share. ``"memit"``: MLPs only. ``"alphaedit"``: MLPs,
                only along directions that general inputs hardly use, with all earlier edits kept. ``"rome"``: the MLP
                of one layer, one fact after another, each exactly. See `nestlearn.continual.editing.solve`.
            alpha: share of the attention in ``"intattn"``; by default the measured share of its contribution (causal
                tracing, `nestlearn.continual.editing.tracing`).
            layers: numbers of the layers, next to each other. By default five layers that end at 3/10 of the depth.
            general: text whose inputs keep their outputs; None takes what the model itself writes.
            seed: of the noise of causal tracing, and of the text that the model writes.
            progress: called with a line about what is being done.

        Raises:
            ValueError: a Hope model, no facts, or arguments out of range; nothing was changed.

        Example:
            >>> from nestlearn import Level, MemorySession, stack_levels
            >>> from nestlearn.data import byte_tokenizer
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            ...                      num_attention_heads=2, max_position_embeddings=128)
            >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=16)], mode="split").eval()
            >>> session = MemorySession(model, byte_tokenizer())
            >>> report = session.edit([Fact("Ann lives in", "Ulm", subject="Ann")], general="Text of any kind. " * 20)
            >>> report.layers, len(session.edits)
            ((0,), 1)
            >>> session.undo_edit().facts
            (('Ann lives in', 'Ann', 'Ulm'),)
        """
        backend = self._editable()
        check_arguments(facts, method, alpha)
        with self._lock, turn_of(self.model):
            editor = self._editor(backend, general, seed, progress)
            levels, report = editor.edit(
                self._cursor.memory.levels, facts, method=method, alpha=alpha, layers=layers, seed=seed
            )
            self._put_edits(levels.edits)
            more = f" and {len(facts) - 1} more" if len(facts) > 1 else ""
            self.log = (*self.log, LogEntry.now(f"edited {facts[0].prompt} -> {facts[0].target}{more}", 0))
        return report

    def undo_edit(self, number: int = -1) -> Edit:
        """Take back one edit, the last by default; the others, and what was read, stay.

        Raises:
            ValueError: there is no such edit.
        """
        with self._lock:
            edits = list(self.edits)
            if not -len(edits) <= number < len(edits):
                raise ValueError(f"there is no edit {number} to take back; the session holds {len(edits)}.")
            found = edits.pop(number)
            self._put_edits(tuple(edits))
            self.log = (*self.log, LogEntry.now(f"took back {found.facts[0][0]} -> {found.facts[0][2]}", 0))
        return found

    def _put_edits(self, edits: tuple[Edit, ...]) -> None:
        """Keys and values of a document in reading are those of the model before the edit, so it ends."""
        self._end_document()
        memory = self._cursor.memory
        self._cursor = replace(self._cursor, memory=replace(memory, levels=replace(memory.levels, edits=edits)))

    def _editable(self) -> StackedBackend:
        if not isinstance(self._backend, StackedBackend):
            raise ValueError("facts can be edited in a stacked model; a Hope model learns them by reading.")
        return self._backend

    def _editor(
        self, backend: StackedBackend, general: str | None, seed: int, progress: Callable[[str], None] | None
    ) -> Editor:
        tell = progress or (lambda _: None)
        rows, directions = self._fact_rows(backend, seed), partial(self._directions, general, seed, tell)
        return Editor(self.model, rows, directions, backend.protect, tell)

    def _fact_rows(self, backend: StackedBackend, seed: int) -> FactRows:
        made = own_text(self.model, self.tokenizer, tokens=CONTEXTS * 10, length=10, seed=seed)
        contexts = [f"{self.tokenizer.decode(row, skip_special_tokens=True).strip()}. " for row in made]
        return FactRows(self.tokenizer, partial(self._tokens_of, first=True), backend.start_tokens, contexts)

    def _directions(
        self, text: str | None, seed: int, tell: Callable[[str], None], paths: Sequence[str]
    ) -> dict[str, Float[Tensor, "r in"]]:
        length = min(256, self._backend.positions or 256)

        def ids() -> Int[Tensor, "b t"]:
            if text is None:
                return own_text(
                    self.model, self.tokenizer, length=length, seed=seed,
                    progress=lambda at: tell(f"writing general text, token {at} of {length}"),
                )  # fmt: skip
            return general_rows(self.tokenizer, text, length=length)

        return general_directions(self.model, paths, (text, seed), ids, tell)
