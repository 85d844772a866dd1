"""Splits, order and duplicates are functions of names and texts alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestlearn.data.documents import (
    Document,
    LocalCorpus,
    drop_near_duplicates,
    shuffled,
    split_documents,
    stable_hash,
)

WORDS = [f"word{index}" for index in range(2000)]
names = st.lists(st.text(max_size=8), unique=True, min_size=2, max_size=30)


def prose(start: int, count: int = 100) -> str:
    return " ".join(WORDS[start : start + count])


@given(names, st.integers(0, 3))
def test_every_document_is_in_exactly_one_split(names: list[str], seed: int) -> None:
    documents = [Document("text", name) for name in names]
    train, validation = (split_documents(documents, split, seed) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(documents)
    assert validation


def test_adding_documents_moves_none() -> None:
    documents = [Document("text", f"name {index}") for index in range(1000)]
    before = {document.name for document in split_documents(documents[:800], "validation")}
    after = {document.name for document in split_documents(documents, "validation")}
    assert before == after & {document.name for document in documents[:800]}
    assert 70 <= len(after) <= 130  # one in ten


def test_the_seed_chooses_the_split() -> None:
    documents = [Document("text", f"name {index}") for index in range(100)]
    assert split_documents(documents, "validation", 0) != split_documents(documents, "validation", 1)


def test_equal_names_are_refused() -> None:
    with pytest.raises(ValueError, match="2 documents have only 1 distinct names"):
        split_documents([Document("a", "name"), Document("b", "name")], "train")


def test_hash_does_not_depend_on_the_process() -> None:
    assert stable_hash("a", 1) == 14809425904682091265
    assert stable_hash("ab", "c") != stable_hash("a", "bc")


def test_order_depends_on_names_not_on_the_order_given() -> None:
    documents = [Document("text", f"name {index}") for index in range(20)]
    assert shuffled(documents, 3) == shuffled(documents[::-1], 3)
    assert shuffled(documents, 3) != shuffled(documents, 4)
    assert shuffled(documents, 3) != documents


def test_near_duplicates_are_dropped() -> None:
    documents = [
        Document(prose(0), "original"),
        Document(prose(0).upper().replace(" ", ",\n"), "same words in another layout"),
        Document(prose(0, 90) + " another end", "edited"),
        Document(prose(20, 40), "excerpt"),
        Document(prose(0, 50) + " " + prose(500, 50), "half of it new"),
        Document(prose(200), "other"),
    ]
    kept = [document.name for document in drop_near_duplicates(documents)]
    assert len({"original", "same words in another layout"} & set(kept)) == 1
    assert kept[-1] == "other"
    assert len(kept) == 2


def test_pieces_of_several_documents_count_together() -> None:
    first, second = prose(0), prose(200)
    patchwork = Document(prose(10, 20) + " " + prose(210, 20) + " " + prose(900, 20), "patchwork")
    kept = drop_near_duplicates([Document(first, "first"), Document(second, "second"), patchwork])
    assert patchwork not in kept


def test_short_texts_are_compared_whole() -> None:
    documents = [Document("one two", "a"), Document("One, two!", "b"), Document("one two three", "c")]
    assert [document.name for document in drop_near_duplicates(documents)] == ["b", "c"]  # the longer of the two


def test_corpus_counts_bytes_and_slices() -> None:
    corpus = LocalCorpus("example", "train", (Document("é", "a"), Document("bc", "b")))
    assert corpus.num_bytes == 4
    assert corpus[1].text == "bc"
    assert corpus[:1] == (Document("é", "a"),)
    assert list(corpus) == list(corpus)
    assert repr(corpus) == "LocalCorpus('example', 'train', documents=2, num_bytes=4)"
