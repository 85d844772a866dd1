"""Generated chronicles: the same everywhere, and their names can only be known from the document itself."""

import re
from collections import Counter

from nestlearn.data import load_corpus
from nestlearn.data.chronicles import chronicles


def names(text: str) -> Counter[str]:
    """Pairs of capitalized words: people, and places but for their last word."""
    return Counter(re.findall(r"\b[A-Z][a-z]{3,} (?!Gate|Hill|Ford|Bridge)[A-Z][a-z]{3,}\b", text))


def test_they_are_the_same_on_every_machine() -> None:
    first = chronicles()[0].text
    assert first.startswith("Neobrux Reokluath was the finder of Suadrux. Tosim Fetrux was the mender of Draistox.")
    assert len({document.name for document in chronicles()}) == len(chronicles()) == 1000
    assert len({document.text for document in chronicles()}) == 1000


def test_names_come_back_in_their_document_and_in_no_other() -> None:
    texts = [document.text for document in chronicles()[:200]]
    found = [{name for name, times in names(text).items() if times >= 5} for text in texts]
    assert all(len(people) >= 3 for people in found)
    assert max(Counter(name for people in found for name in people).values()) == 1


def test_they_are_a_corpus_with_a_held_out_part() -> None:
    train, held_out = (load_corpus("chronicles", split) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 1000 and len(held_out) > 50
    assert not {d.name for d in train} & {d.name for d in held_out}
