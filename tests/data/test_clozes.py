"""Practice questions made from a text."""

from __future__ import annotations

import pytest

from nestlearn.data.clozes import clozes, title_of

TEXT = """Velmarrow: A Town

Velmarrow is a harbour town of 18,400 people. It was founded in 1683 by Ilsabet Krone. Most people fish.
"""


def test_names_and_numbers_are_left_out_one_at_a_time() -> None:
    assert [cloze.answer for cloze in clozes(TEXT)] == ["18,400", "1683", "Ilsabet Krone", "people"]
    for cloze in clozes(TEXT):
        assert cloze.sentence.replace("____", cloze.answer) in TEXT


@pytest.mark.parametrize(
    ("sentence", "answers"),
    [
        ("The score was 24–10 in the Bank of England.", ["24–10", "Bank of England"]),
        ("Paris is large.", []),
        ("Ancient Paris is large.", ["Ancient Paris"]),
        ("On 7 February 2016 it rained.", ["7 February 2016"]),
        ("The Bank of England fell.", ["Bank of England"]),
        ("Of the Nine nothing is left.", ["Nine"]),
        ("Élise Ødegård met Ωmega.", ["Élise Ødegård", "Ωmega"]),
        ("Nothing here repeats itself.", ["Nothing"]),
        ("a b c", []),
        ("Paris.", []),
        ("", []),
    ],
)
def test_what_is_left_out(sentence: str, answers: list[str]) -> None:
    assert [cloze.answer for cloze in clozes(sentence)] == answers


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("# A town\ntext", "A town"),
        ("A sentence.\ntext", None),
        ("A line alone", None),
        ("x" * 100 + "\ntext", None),
        ("\n\nTitle\n\ntext", "Title"),
    ],
)
def test_a_title_is_a_short_first_line(text: str, title: str | None) -> None:
    assert title_of(text) == title
