"""Practice questions made from a text alone: its sentences, each with a name, number or long word left out."""

from __future__ import annotations

import re
from typing import NamedTuple

TITLE = 80
"""Longest first line of a document, in characters, that can be its title."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_NUMBER = r"\d[\d,.:–-]*\d|\d"
_NAME = r"[^\W\d_a-z][\w'’.-]*\w|[^\W\d_a-z]"
# Names and numbers, and what joins them: "Bank of England", "24-10", "7 February 2016".
_SPAN = re.compile(rf"(?:{_NAME}|{_NUMBER})(?:\s+(?:of |the |de |and )?(?:{_NAME}|{_NUMBER}))*")
# "In 1683", "The Bank of England": a short first word has its capital from the sentence.
_OPENING = re.compile(r"[^\W\d_]{1,3}\s+(?:(?:of|the|de|and)\s+)*")
_WORD = re.compile(r"[^\W\d_]{6,}")


class Cloze(NamedTuple):
    """A sentence with ``____`` in place of what was left out, and what was left out."""

    sentence: str
    answer: str


def title_of(text: str) -> str | None:
    """The first line of a text, if it is short, no sentence, and not all of the text.

    Example:
        >>> title_of("Packet switching\\nPacket switching contrasts with circuit switching.")
        'Packet switching'
    """
    first, _, rest = text.strip().partition("\n")
    first = first.strip().lstrip("#").strip()
    return first if rest.strip() and 0 < len(first) <= TITLE and first[-1] not in ".!?:;," else None


def clozes(text: str) -> list[Cloze]:
    """All practice questions of a text, in its order.

    Names and numbers are left out one at a time. The first word of a sentence has a capital anyway, so that it counts
    only within a longer name, and not if it has three letters or fewer. A sentence without any has its longest word
    left out, if that has six letters or more.

    Example:
        >>> [cloze.answer for cloze in clozes("The town was founded by Ilsabet Krone in 1683. Rain falls everywhere.")]
        ['Ilsabet Krone', '1683', 'everywhere']
    """
    body = text.strip()
    if title_of(body) is not None:
        body = body.partition("\n")[2]
    found: list[Cloze] = []
    for sentence in filter(None, map(str.strip, _SENTENCE.split(body))):
        spans = [span for span in map(_span, _SPAN.finditer(sentence)) if span is not None]
        if not spans:
            spans = sorted((m.span() for m in _WORD.finditer(sentence)), key=lambda span: span[0] - span[1])[:1]
        found += [Cloze(f"{sentence[:start]}____{sentence[end:]}", sentence[start:end]) for start, end in spans]
    return [cloze for cloze in found if cloze.sentence.strip("_ .!?\"'")]


def names(text: str) -> list[str]:
    """The names and numbers of a text, as `clozes` finds them in a sentence.

    Example:
        >>> names("The capital of New Zealand is")
        ['New Zealand']
    """
    spans = (_span(match) for match in _SPAN.finditer(text))
    return [text[span[0] : span[1]] for span in spans if span is not None]


def _span(match: re.Match[str]) -> tuple[int, int] | None:
    """Where a name or number is; None for a plain first word of a sentence."""
    start, end = match.span()
    if start == 0 and (opening := _OPENING.match(match.group())):
        return opening.end(), end
    plain = start == 0 and not match.group()[0].isdigit() and " " not in match.group()
    return None if plain else (start, end)
