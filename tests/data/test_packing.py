"""Packing: each token once, labels masked where nothing can be predicted, the same windows after an interruption."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from nestlearn.data import (
    Document,
    LocalCorpus,
    PackedDataset,
    PackedStream,
    StreamingCorpus,
    byte_tokenizer,
    load_corpus,
    pack,
)

TOKENIZER = byte_tokenizer()
BOS, EOS, PAD = 256, 257, 258


def corpus_of(*texts: str) -> LocalCorpus:
    return LocalCorpus("example", "train", tuple(Document(text, str(index)) for index, text in enumerate(texts)))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1), st.integers(2, 9))
def test_each_token_exactly_once(texts: list[str], length: int) -> None:
    data = PackedDataset(corpus_of(*texts), TOKENIZER, length, drop_last=False)
    ids = torch.cat([window["input_ids"] for window in data])
    assert data.num_tokens == sum(len(text.encode()) + 2 for text in texts)
    assert torch.all(ids[data.num_tokens :] == PAD)
    joined = ids[: data.num_tokens].tolist()
    documents = bytes(token if token < 256 else 0 for token in joined)
    assert joined.count(BOS) == joined.count(EOS) == len(texts)
    # Each document is whole, between its <s> and </s>.
    starts = [index for index, token in enumerate(joined) if token == BOS]
    ends = [index for index, token in enumerate(joined) if token == EOS]
    found = [documents[start + 1 : end].decode() for start, end in zip(starts, ends, strict=True)]
    assert sorted(found) == sorted(texts)


def test_labels() -> None:
    data = PackedDataset(corpus_of("ab", "cd"), TOKENIZER, 6, drop_last=False)
    assert len(data) == 2
    for window in data:
        ids, labels = window["input_ids"], window["labels"]
        unpredictable = (ids == BOS) | (ids == PAD)
        assert torch.equal(labels[~unpredictable], ids[~unpredictable])
        assert torch.all(labels[unpredictable] == -100)
    assert data[0]["labels"].tolist()[:5] == [-100, *data[0]["input_ids"].tolist()[1:4], -100]
    assert data[1]["labels"].tolist()[1:] == [EOS, -100, -100, -100, -100]


def test_the_last_window_is_dropped_in_training() -> None:
    corpus = corpus_of("abcdef")
    assert len(PackedDataset(corpus, TOKENIZER, 5)) == 1
    assert len(PackedDataset(corpus, TOKENIZER, 5, drop_last=False)) == 2
    assert PackedDataset(corpus, TOKENIZER, 5)[0]["input_ids"].tolist() == [BOS, *b"abcd"]


def test_the_seed_decides_the_order() -> None:
    corpus = corpus_of(*(f"text {index}" for index in range(20)))
    first, same, other = (
        torch.stack([w["input_ids"] for w in PackedDataset(corpus, TOKENIZER, 8, s)]) for s in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_windows_batch_in_a_loader() -> None:
    loader = DataLoader(PackedDataset(corpus_of("abcdefgh" * 4), TOKENIZER, 4), batch_size=2)
    assert next(iter(loader))["input_ids"].shape == (2, 4)


def test_iteration_ends() -> None:
    data = PackedDataset(corpus_of("abcdef"), TOKENIZER, 4)
    with pytest.raises(IndexError):
        data[2]
    assert torch.equal(data[-1]["input_ids"], data[1]["input_ids"])


def test_one_token_for_both_ends() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    window = PackedDataset(corpus_of("ab"), tokenizer, 3)[0]
    assert window["input_ids"].tolist() == window["labels"].tolist() == [97, 98, EOS]


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"has 4 tokens, not enough for one window of 64"):
        PackedDataset(corpus_of("ab"), TOKENIZER, 64)
    with pytest.raises(ValueError, match="sequence_length is 1"):
        PackedDataset(corpus_of("ab"), TOKENIZER, 1)
    endless = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="no end-of-text token"):
        PackedDataset(corpus_of("ab"), endless, 4)


@pytest.fixture
def stream(tmp_path: Path) -> StreamingCorpus:
    rows = (json.dumps({"text": f"document {index} " + "x" * (index % 11)}) + "\n" for index in range(60))
    (tmp_path / "train.jsonl").write_text("".join(rows))
    corpus = load_corpus(f"hf:{tmp_path}")
    assert isinstance(corpus, StreamingCorpus)
    return corpus


def ids_of(windows: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [window["input_ids"].tolist() for window in windows]


class TestStream:
    def test_each_token_once_and_in_full_windows(self, stream: StreamingCorpus) -> None:
        windows = list(pack(stream, TOKENIZER, 16))
        ids = [token for window in ids_of(windows) for token in window]
        total = sum(len(document.text.encode()) + 2 for document in stream)
        assert len(ids) == total // 16 * 16
        text = bytes(token if token < 256 else ord("|") for token in ids).decode()
        found = {part for part in text.split("|") if part}
        assert len(found & {document.text for document in stream}) >= len(list(stream)) - 1

    @pytest.mark.parametrize("block", [1, 8, 256])
    @pytest.mark.parametrize("taken", [0, 1, 13, 40])
    def test_interrupted_and_resumed_is_uninterrupted(self, stream: StreamingCorpus, taken: int, block: int) -> None:
        packed = PackedStream(stream, TOKENIZER, 16, seed=1, shuffle_documents=block)
        everything = ids_of(list(packed))
        iterator = iter(packed)
        first = ids_of(list(islice(iterator, taken)))
        # The first iteration left its last place in the object; the interruption is of the second.
        state = json.loads(json.dumps(packed.state_dict())) if taken else None
        resumed = PackedStream(stream, TOKENIZER, 16, seed=1, shuffle_documents=block)
        if state:
            resumed.load_state_dict(state)
        assert first + ids_of(list(resumed)) == everything
        assert ids_of(list(resumed)) == everything  # a further pass begins at the beginning

    def test_documents_are_shuffled_inside_blocks(self, stream: StreamingCorpus) -> None:
        in_order, shuffled = (list(PackedStream(stream, TOKENIZER, 16, shuffle_documents=n)) for n in (1, 16))
        assert ids_of(in_order) != ids_of(shuffled)

    def test_a_state_of_another_stream_is_refused(self, stream: StreamingCorpus) -> None:
        state = PackedStream(stream, TOKENIZER, 16, seed=1).state_dict()
        with pytest.raises(ValueError, match="'seed': 1"):
            PackedStream(stream, TOKENIZER, 16, seed=2).load_state_dict(state)

    @pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # forking is quick, and safe here
    def test_a_worker_process_reads_the_same(self, stream: StreamingCorpus) -> None:
        packed = PackedStream(stream, TOKENIZER, 16)
        loader = DataLoader(packed, batch_size=None, num_workers=1, multiprocessing_context="fork")
        assert sorted(ids_of(list(loader))) == sorted(ids_of(list(packed)))

    def test_a_stream_is_no_dataset(self, stream: StreamingCorpus) -> None:
        with pytest.raises(TypeError, match="is a stream and has no length"):
            PackedDataset(stream, TOKENIZER, 16)
        with pytest.raises(ValueError, match="shuffle_documents is 0"):
            PackedStream(stream, TOKENIZER, 16, shuffle_documents=0)
