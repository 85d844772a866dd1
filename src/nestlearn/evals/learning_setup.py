"""Makes the documents, the known text and the method of `nestlearn learn` from its options."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from nestlearn.continual.learner import ContinualLearner
from nestlearn.continual.pretrained import pretrained
from nestlearn.continual.session import open_session
from nestlearn.data import load_corpus
from nestlearn.data.documents import Document
from nestlearn.data.text_files import find_files, read_text
from nestlearn.evals.learning import METHODS, SessionMethod, StreamMethod, TrainingMethod, training_method
from nestlearn.fields import unknown_name

DEFAULT_RATES = {"finetune": 1e-5, "ewc": 1e-5, "replay": 1e-5, "lora": 1e-4}
"""Default learning rates of the methods that train weights."""
_KNOWN_DOCUMENTS = 32
"""Documents of the known corpus that EWC estimates importance on and replay stores."""


def stream_documents(paths: Sequence[str]) -> list[Document]:
    """All files of the paths, in the given order (files of a folder or pattern by name), without blank files.

    Raises:
        ValueError: no file, a binary file, or nothing but blanks.
    """
    files = [file for path in paths for file in find_files(path)]
    documents = [Document(read_text(file), file.name) for file in files]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"--stream {' '.join(paths)} holds no text; give UTF-8 files that are not empty.")
    return documents


def known_text(corpus: str, limit: int) -> str:
    """The beginnings of held-out documents of a corpus, about ``limit`` bytes together.

    Raises:
        ValueError: the corpus cannot be read.
    """
    documents = list(islice(load_corpus(corpus, "validation"), 8))
    share = max(1, limit // len(documents))
    return "\n".join(document.text[:share] for document in documents)


def make_method(
    method: str,
    model: str,
    *,
    session: Path | None = None,
    known: str = "python-docs",
    passes: int = 1,
    context_length: int | None = None,
    learning_rate: float | None = None,
    strength: float = 1.0,
    capacity: int = 256,
    rank: int = 8,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
) -> StreamMethod:
    """The method that learns the stream: a session of the model (``cms``), or training of its weights.

    Raises:
        ValueError: unknown method, a model that cannot learn by it, or a session without ``cms``.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if method == "cms":
        options = {} if context_length is None else {"context_length": context_length}
        return SessionMethod(open_session(model, session, dtype=dtype, device=device, **options), passes)
    if session is not None:
        raise ValueError(f"--session is for --method cms; {method} trains the model's weights. Leave it out.")
    # In float32 by default: rounding of bfloat16 weights loses steps of 1e-5.
    loaded, tokenizer = pretrained(model, dtype=dtype or torch.float32, device=device)
    room = getattr(loaded.config, "max_position_embeddings", None)
    if context_length is not None and room is not None and context_length > room:
        raise ValueError(f"--context-length {context_length} exceeds the {room} positions of the model.")
    rate = DEFAULT_RATES[method] if learning_rate is None else learning_rate
    # Methods that protect or replay known text get training documents of it; the held-out ones measure retention.
    old = list(islice(load_corpus(known, "train"), _KNOWN_DOCUMENTS)) if method in ("ewc", "replay") else []
    learner = ContinualLearner(
        loaded,
        partial(torch.optim.AdamW, lr=rate, weight_decay=0.0),
        method=training_method(method, strength=strength, capacity=capacity, rank=rank),
        epochs=passes, batch_size=1, score="bits", max_grad_norm=1.0, seed=seed,
    )  # fmt: skip
    beginnings = [Document(document.text[:4000], document.name) for document in old]
    return TrainingMethod(learner, tokenizer, context_length or min(room or 1024, 1024), beginnings)
