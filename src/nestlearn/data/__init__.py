"""Corpora, tokenizers, windows of tokens, and streams of tasks.

Example:
    >>> windows = pack(load_corpus("python-docs"), byte_tokenizer(), sequence_length=256)
    >>> windows[0]["input_ids"].shape
    torch.Size([256])
"""

from nestlearn.data.continual import (
    Examples,
    StreamTask,
    TaskStream,
    class_incremental,
    document_stream,
    permuted_digits,
    split_digits,
)
from nestlearn.data.continual_text import IntentTexts, load_banking77, load_clinc150
from nestlearn.data.corpora import CORPUS_SPECS, load_corpus
from nestlearn.data.documents import Corpus, Document, LocalCorpus, SplitName
from nestlearn.data.packing import PackedDataset, PackedStream, pack
from nestlearn.data.streams import StreamingCorpus
from nestlearn.data.tokenizers import byte_tokenizer, bytes_per_token, document_ids, train_bpe

__all__ = [
    "CORPUS_SPECS",
    "Corpus",
    "Document",
    "Examples",
    "IntentTexts",
    "LocalCorpus",
    "PackedDataset",
    "PackedStream",
    "SplitName",
    "StreamTask",
    "StreamingCorpus",
    "TaskStream",
    "byte_tokenizer",
    "bytes_per_token",
    "class_incremental",
    "document_ids",
    "document_stream",
    "load_banking77",
    "load_clinc150",
    "load_corpus",
    "pack",
    "permuted_digits",
    "split_digits",
    "train_bpe",
]
