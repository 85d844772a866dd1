"""`load_corpus`: documents from a spec such as `python-docs`."""

from __future__ import annotations

import difflib
from typing import get_args

from nestlearn.data.chronicles import chronicles
from nestlearn.data.documents import LocalCorpus, SplitName, split_documents
from nestlearn.data.python_docs import python_docs, python_source
from nestlearn.data.streams import StreamingCorpus, stream_corpus
from nestlearn.data.text_files import text_corpus

_INSTALLED = {"python-docs": python_docs, "python-source": python_source, "chronicles": chronicles}
CORPUS_SPECS = (*_INSTALLED, "text:PATH", "hf:NAME[:CONFIG]")
"""The forms of a spec, for help texts."""


def load_corpus(spec: str, split: SplitName = "train", seed: int = 0) -> LocalCorpus | StreamingCorpus:
    """The corpus that a spec names.

    Args:
        spec: one of
            `python-docs`: documentation topics and docstrings of the running Python, about 2.4 MB;
            `python-source`: the source text of its standard library, about 10 MB;
            `chronicles`: generated documents whose invented names come back, about 2.5 MB;
            `text:PATH`: a file, a folder or a glob pattern of UTF-8 text;
            `hf:NAME[:CONFIG]`: a Hugging Face data set, streamed.
        split: `"train"` or `"validation"`; no document is in both.
        seed: seed of the choice of validation documents.

    Returns:
        A `LocalCorpus`, or a `StreamingCorpus` for `hf:`. Both can be iterated repeatedly.

    Raises:
        ValueError: the spec or split is unknown, there is nothing to read, or the content is binary.

    Example:
        >>> corpus = load_corpus("python-docs", "validation")
        >>> corpus[0].name
        'topic/...'
    """
    if split not in get_args(SplitName):
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(map(repr, get_args(SplitName)))}.")
    if spec in _INSTALLED:
        return LocalCorpus(spec, split, split_documents(_INSTALLED[spec](), split, seed))
    kind, colon, rest = spec.partition(":")
    if kind == "text" and rest:
        return text_corpus(rest, split, seed)
    if kind == "hf" and rest:
        return stream_corpus(rest, split, seed)
    raise ValueError(f"Unknown corpus {spec!r}; the forms are {', '.join(CORPUS_SPECS)}.{_hint(spec, kind, colon)}")


def _hint(spec: str, kind: str, colon: str) -> str:
    if colon and kind in ("text", "hf"):
        return f" Something must follow {kind}:."
    close = difflib.get_close_matches(spec, _INSTALLED, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" For a file or folder write 'text:{spec}'."
