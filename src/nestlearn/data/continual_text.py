"""Intent classification as class-incremental streams: CLINC150 and Banking77 from local files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestlearn.data.continual import Examples, TaskStream, class_incremental

Encoder = Callable[[Sequence[str]], Tensor]
"""A function from texts to the model's inputs, one row per text."""


@dataclass(frozen=True)
class IntentTexts:
    """Short texts and their classes.

    Attributes:
        name: name of the data set.
        train, test: the texts.
        train_labels, test_labels: for each text the index of its label in `classes`.
        classes: the labels' names, in alphabetical order.
    """

    name: str
    train: tuple[str, ...]
    train_labels: tuple[int, ...]
    test: tuple[str, ...]
    test_labels: tuple[int, ...]
    classes: tuple[str, ...]

    @classmethod
    def from_pairs(cls, name: str, train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> IntentTexts:
        """Texts from (text, label) pairs.

        Raises:
            ValueError: the test has a label that no training text has.
        """
        classes = tuple(sorted({label for _, label in train}))
        place = {label: index for index, label in enumerate(classes)}
        unknown = sorted({label for _, label in test} - set(classes))
        if unknown or not classes:
            raise ValueError(f"{name}: the test has labels that no training text has: {unknown[:5]}.")
        return cls(
            name,
            tuple(text for text, _ in train),
            tuple(place[label] for _, label in train),
            tuple(text for text, _ in test),
            tuple(place[label] for _, label in test),
            classes,
        )

    def stream(self, encode: Encoder, *, tasks: int, order_seed: int = 0, **config: Any) -> TaskStream:
        """A stream of tasks with the encoded texts and equal numbers of classes.

        Args:
            encode: function from texts to inputs, called once for the training and once for the test texts.
            tasks: number of tasks (CLINC150: 10 of 15 classes, Banking77: 7 of 11).
            order_seed: seed of the order of the classes.
            config: description of the encoding, for the record.
        """
        learned = Examples(encode(self.train), torch.tensor(self.train_labels))
        held = Examples(encode(self.test), torch.tensor(self.test_labels))
        return class_incremental(
            self.name, learned, held, tasks=tasks, order_seed=order_seed, names=self.classes, config=config
        )

    def texts_by_task(self, stream: TaskStream) -> list[tuple[list[str], list[str]]]:
        """Training and test texts of each task, in the order of the stream's examples."""

        def of(texts: Sequence[str], labels: Sequence[int], classes: tuple[int, ...]) -> list[str]:
            return [text for text, label in zip(texts, labels, strict=True) if label in classes]

        return [
            (of(self.train, self.train_labels, task.classes), of(self.test, self.test_labels, task.classes))
            for task in stream.tasks
        ]


def load_clinc150(path: str | Path) -> IntentTexts:
    """CLINC150 (Larson et al. 2019): 150 intents, 15,000 training and 4,500 test texts; out-of-scope texts left out.

    Args:
        path: data_full.json of github.com/clinc/oos-eval, or its folder.

    Raises:
        ValueError: the file does not exist or has another form.
    """
    file = Path(path) / "data_full.json" if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        train, test = ([(str(text), str(label)) for text, label in content[part]] for part in ("train", "test"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not CLINC150 ({error!r}); give data/data_full.json of github.com/clinc/oos-eval."
        ) from error
    return IntentTexts.from_pairs("clinc150", train, test)


def load_banking77(path: str | Path) -> IntentTexts:
    """Banking77 (Casanueva et al. 2020): 77 intents of bank customers, 10,003 training and 3,080 test texts.

    Args:
        path: folder with train.csv and test.csv of github.com/PolyAI-LDN/task-specific-datasets.

    Raises:
        ValueError: the files do not exist or have another form.
    """
    folder = Path(path)
    try:
        train, test = (_read_pairs(folder / f"{part}.csv") for part in ("train", "test"))
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise ValueError(
            f"{folder} does not hold Banking77 ({error!r}); give the folder banking_data of "
            "github.com/PolyAI-LDN/task-specific-datasets."
        ) from error
    return IntentTexts.from_pairs("banking77", train, test)


def _read_pairs(file: Path) -> list[tuple[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return [(row["text"], row["category"]) for row in csv.DictReader(lines)]


def ngram_features(texts: Sequence[str], *, dimensions: int = 300, words: int = 2, seed: int = 0) -> Encoder:
    """A frozen encoder: TF-IDF of word n-grams, reduced by SVD, with features of mean variance 1.

    Args:
        texts: texts that fit the vocabulary, the frequencies and the SVD; no labels are used.
        dimensions: number of features.
        words: words of the longest n-gram.
        seed: seed of the randomized SVD.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise ImportError(
            "Text features need scikit-learn, which is not installed: pip install 'nestlearn[continual]'."
        ) from error
    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, words), sublinear_tf=True),
        TruncatedSVD(dimensions, random_state=seed),
    )
    fitted = pipeline.fit_transform(list(texts))
    scale = float((fitted**2).mean()) ** -0.5

    def encode(batch: Sequence[str]) -> Tensor:
        return torch.as_tensor(pipeline.transform(list(batch)) * scale, dtype=torch.float32)

    return encode


def token_encoder(tokenizer: Any, length: int) -> Encoder:
    """An encoder from texts to token ids, Long[n, length], cut or padded on the right with the tokenizer's padding.

    Args:
        tokenizer: a Hugging Face tokenizer.
        length: tokens per text.
    """

    def encode(batch: Sequence[str]) -> Tensor:
        ids = torch.full((len(batch), length), int(tokenizer.pad_token_id), dtype=torch.long)
        for row, tokens in enumerate(tokenizer(list(batch), add_special_tokens=False)["input_ids"]):
            kept = tokens[:length]
            ids[row, : len(kept)] = torch.tensor(kept, dtype=torch.long)
        return ids

    return encode
