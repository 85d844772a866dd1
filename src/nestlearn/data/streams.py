"""Hugging Face datasets, read as streams: only what is read is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nestlearn.data.documents import Document, SplitName, stable_hash
from nestlearn.data.hub import hub_unreachable

if TYPE_CHECKING:
    import datasets

_TEXT_COLUMNS = ("text", "content", "document", "sentence")
_VALIDATION_SPLITS = ("validation", "valid", "dev", "test")
_HELD_OUT = 100  # of a data set with a train split only, one document in a hundred is held out
_FIX = "Write hf:NAME or hf:NAME:CONFIG, e.g. hf:Salesforce/wikitext:wikitext-103-raw-v1."


@dataclass(frozen=True)
class StreamingCorpus:
    """A Hugging Face data set as documents, in the data set's own order.

    Args:
        name: the spec that it was loaded from.
        split: `"train"` or `"validation"`.
        dataset: the streaming data set.
        column: the column that holds the text.
        held_out: None if the data set has a validation split. Otherwise one document in this many, by the hash of its
            text, is validation. (Row numbers would differ between loader processes, and copies stay together.)
        seed: seed of that hash.
    """

    name: str
    split: SplitName
    dataset: datasets.IterableDataset
    column: str
    held_out: int | None = None
    seed: int = 0

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def read(self, state: Mapping[str, Any] | None = None) -> StreamReader:
        """A reader at the beginning, or at a place that `StreamReader.state` returned."""
        return StreamReader(self, state)

    def holds(self, text: str) -> bool:
        """Whether a document with this text belongs to this split."""
        if self.held_out is None:
            return True
        held_out = stable_hash("stream", self.seed, text) % self.held_out == 0
        return held_out == (self.split == "validation")


class StreamReader(Iterator[Document]):
    """One pass over a `StreamingCorpus`; its place can be saved and restored."""

    def __init__(self, corpus: StreamingCorpus, state: Mapping[str, Any] | None = None) -> None:
        self._corpus = corpus
        self._index = int(state["index"]) if state else 0
        self._dataset = copy.deepcopy(corpus.dataset)  # a data set keeps its place in itself
        if state:
            self._dataset.load_state_dict(copy.deepcopy(state["dataset"]))
        self._state = copy.deepcopy(dict(state)) if state else None
        self._rows = iter(self._dataset)

    def __next__(self) -> Document:
        while True:
            row = next(self._rows)
            self._state = None
            index, self._index = self._index, self._index + 1
            text = row[self._corpus.column]
            if text and self._corpus.holds(text):
                return Document(text, f"{self._corpus.name}#{index}")

    def state(self) -> dict[str, Any] | None:
        """The place after the last document read, as plain data for JSON; None at the beginning."""
        if self._index == 0:
            return None
        if self._state is None:
            self._state = {"index": self._index, "dataset": self._dataset.state_dict()}
        return copy.deepcopy(self._state)


def stream_corpus(spec: str, split: SplitName, seed: int = 0) -> StreamingCorpus:
    """The corpus `hf:NAME[:CONFIG]` (`spec` without the `hf:`).

    The validation split is the data set's `validation` or `test`, or one training document in a hundred.

    Raises:
        ValueError: the data set, its configuration, its training split or a text column is missing, or the Hub cannot
            be reached.
    """
    name, _, config = spec.partition(":")
    if not name:
        raise ValueError(f"hf:{spec} names no data set. {_FIX}")
    unreachable = hub_unreachable(name)
    if unreachable:
        raise ValueError(f"hf:{spec} cannot be opened: the Hugging Face Hub cannot be reached ({unreachable}). {_FIX}")
    import datasets

    try:
        splits = datasets.load_dataset(name, config or None, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"hf:{spec} cannot be opened: {error}. {_FIX} Is the network reachable?") from error
    available = sorted(str(key) for key in splits)
    own = next((key for key in _VALIDATION_SPLITS if key in available), None)
    chosen = own if own and split == "validation" else "train"
    if chosen not in available:
        raise ValueError(f"hf:{spec} has the splits {available} and no training split. Choose another data set.")
    dataset = splits[chosen]
    return StreamingCorpus(f"hf:{spec}", split, dataset, _text_column(spec, dataset), None if own else _HELD_OUT, seed)


def _text_column(spec: str, dataset: datasets.IterableDataset) -> str:
    columns = list(dataset.column_names or next(iter(dataset)))
    found = next((column for column in _TEXT_COLUMNS if column in columns), None)
    if found is None:
        raise ValueError(f"hf:{spec} has the columns {columns}, none of {list(_TEXT_COLUMNS)}. Rename the text column.")
    return found
