"""Windows of equal length from documents.

Documents are shuffled by hash, each becomes `<s> text </s>`, all are concatenated and cut into windows. A label is the
token itself, since Hugging Face models shift labels inside. The label of `<s>` is -100: it always follows `</s>`.
Where a tokenizer has one token for both ends (GPT-2, Qwen, ...), it stands after each document only and is predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from nestlearn.data.documents import Corpus, shuffled, stable_hash
from nestlearn.data.streams import StreamingCorpus
from nestlearn.data.synthetic import IGNORE
from nestlearn.data.tokenizers import encode

PackedWindow = dict[str, Tensor]
_T = TypeVar("_T")


def pack(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, sequence_length: int, seed: int = 0
) -> PackedDataset | PackedStream:
    """A `PackedDataset` for a corpus in memory, a `PackedStream` for one that streams."""
    if isinstance(corpus, StreamingCorpus):
        return PackedStream(corpus, tokenizer, sequence_length, seed)
    return PackedDataset(corpus, tokenizer, sequence_length, seed)


class PackedDataset(Dataset[PackedWindow]):
    """Windows of a corpus held in memory.

    Args:
        corpus: the documents.
        tokenizer: a tokenizer with an end-of-text token.
        sequence_length: tokens per window.
        seed: seed of the order of documents.
        drop_last: leave out the last window if it is not full (training). Otherwise padding fills it, with labels of
            -100 (evaluation).

    Raises:
        ValueError: the text does not fill a window, a special token is missing, or `sequence_length` is below 2.

    Example:
        >>> data = PackedDataset(load_corpus("python-docs"), byte_tokenizer(), sequence_length=256, seed=0)
        >>> {name: tuple(tokens.shape) for name, tokens in data[0].items()}
        {'input_ids': (256,), 'labels': (256,)}
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        seed: int = 0,
        *,
        drop_last: bool = True,
    ) -> None:
        if isinstance(corpus, StreamingCorpus):
            raise TypeError(
                f"{corpus.name} is a stream and has no length. Use PackedStream, or pack(), which chooses the class."
            )
        self.sequence_length = sequence_length
        self._bos, eos = _ends(tokenizer, sequence_length)
        documents = shuffled(list(corpus), seed)
        parts = encode(tokenizer, [document.text for document in documents])
        self._tokens = np.concatenate([_framed(part, self._bos, eos) for part in parts] or [np.empty(0, np.int32)])
        full, rest = divmod(len(self._tokens), sequence_length)
        self._length = full + (0 if drop_last else rest > 0)
        self._padding = _token_id(tokenizer, "pad", eos)
        if self._length == 0:
            raise ValueError(
                f"{corpus.name} ({corpus.split}) has {len(self._tokens)} tokens, not enough for one window of "
                f"{sequence_length}. Use more text, a smaller sequence_length, or drop_last=False."
            )

    def __len__(self) -> int:
        return self._length

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents, including `<s>` and `</s>`, before any are dropped."""
        return len(self._tokens)

    def digest(self) -> str:
        """SHA-256 of all tokens, in hexadecimal: equal for equal texts, tokenizer and seed."""
        return hashlib.sha256(self._tokens.tobytes()).hexdigest()

    def __getitem__(self, index: int) -> PackedWindow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = (index % len(self)) * self.sequence_length
        return _window(
            self._tokens[start : start + self.sequence_length], self.sequence_length, self._bos, self._padding
        )


class PackedStream(IterableDataset[PackedWindow]):
    """Windows of a streaming corpus; iteration can be resumed without reading again.

    Documents are shuffled within blocks of `shuffle_documents`. A place is the stream's state at the beginning of the
    block, the number of its documents that are used up, and the tokens left over. A last window that is not full is
    left out. Loader processes divide the data set's shards; `state_dict` knows only the main process, so use it
    without them.

    Args:
        corpus: a `StreamingCorpus`.
        tokenizer: with a beginning- and an end-of-text token.
        sequence_length: tokens per window.
        seed: seed of the order inside blocks.
        shuffle_documents: documents per block; 1 keeps the order of the corpus.
    """

    def __init__(
        self,
        corpus: StreamingCorpus,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        seed: int = 0,
        *,
        shuffle_documents: int = 256,
    ) -> None:
        if shuffle_documents < 1:
            raise ValueError(f"shuffle_documents is {shuffle_documents}; it must be at least 1.")
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle_documents = shuffle_documents
        self._tokenizer = tokenizer
        self._bos, self._eos = _ends(tokenizer, sequence_length)
        self._start: Mapping[str, Any] | None = None
        self._place: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[PackedWindow]:
        start, self._start = self._start, None
        for tokens in self._windows(start):
            yield _window(tokens, self.sequence_length, self._bos, self._eos)

    def state_dict(self) -> dict[str, Any]:
        """The place after the last yielded window, as plain data for JSON."""
        return {"place": self._place, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Starts the next iteration at the saved place.

        Raises:
            ValueError: the state was saved with another corpus, window length, seed or block size.
        """
        if state["settings"] != self._settings():
            raise ValueError(f"The state is of a stream with {state['settings']}; this one has {self._settings()}.")
        self._start = self._place = state["place"]

    def _settings(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus.name,
            "split": self.corpus.split,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "shuffle_documents": self.shuffle_documents,
        }

    def _windows(self, start: Mapping[str, Any] | None) -> Iterator[np.ndarray]:
        reader = self.corpus.read(start["stream"] if start else None)
        used = int(start["used"]) if start else 0
        rest = np.asarray(start["rest"] if start else [], dtype=np.int32)
        length = self.sequence_length
        while True:
            stream = reader.state()
            block = list(islice(reader, self.shuffle_documents))
            if not block:
                return
            # The first document's name gives each block its own order.
            ordered = shuffled(block, stable_hash(self.seed, block[0].name))
            for position, document in enumerate(ordered[used:], start=used):
                ids = encode(self._tokenizer, [document.text])[0]
                tokens = np.concatenate([rest, _framed(ids, self._bos, self._eos)])
                full = len(tokens) // length * length
                rest = tokens[full:]
                for begin in range(0, full, length):
                    left = tokens[begin + length :].tolist()
                    self._place = {"stream": stream, "used": position + 1, "rest": left}
                    yield tokens[begin : begin + length]
            used = 0


def _ends(tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> tuple[int | None, int]:
    """The tokens around a document; the first is None if the tokenizer has one token for both ends."""
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}; a next-token loss needs at least 2.")
    eos = _token_id(tokenizer, "eos", None)
    if eos is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no end-of-text token, so documents cannot be told apart. "
            "Set tokenizer.eos_token, and bos_token if there is one."
        )
    bos = _token_id(tokenizer, "bos", None)
    return (None if bos == eos else bos), eos


def _token_id(tokenizer: PreTrainedTokenizerBase, kind: str, default: _T) -> int | _T:
    value = getattr(tokenizer, f"{kind}_token_id")
    return default if value is None else int(value)


def _framed(ids: np.ndarray, bos: int | None, eos: int) -> np.ndarray:
    return np.concatenate([[] if bos is None else [bos], ids, [eos]]).astype(np.int32)


def _window(tokens: np.ndarray, length: int, bos: int | None, padding: int) -> PackedWindow:
    input_ids = torch.full((length,), padding, dtype=torch.int64)
    input_ids[: len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
    labels = input_ids.clone() if bos is None else input_ids.masked_fill(input_ids == bos, IGNORE)
    labels[len(tokens) :] = IGNORE
    return {"input_ids": input_ids, "labels": labels}
