"""`chronicles`: generated documents whose names and definitions come back, so that a reader needs its memory."""

from __future__ import annotations

import random
from functools import lru_cache

from nestlearn.data.documents import Document

DOCUMENTS, SENTENCES = 1000, 60
"""Documents, and sentences of each after its introductions."""

_ONSETS = "b br d dr f g gr h k kl l m n p pr r s st t tr v z".split()
_VOWELS = "a e i o u ai eo ua".split()
_CODAS = "n r l s m th nd rk x".split()
_ROLES = "keeper maker ruler reader mender finder singer seller".split()
_THINGS = "bell lamp map ring sword harp seal book".split()
_COLOURS = "amber black green red silver white blue golden".split()
_INTRODUCTIONS = ("{0} was the {1}. ", "In those years {0} was the {1}. ")
_SENTENCES = (
    "{0} met {1} at {2}. ",
    "Then {0} left {2} with {1}. ",
    "{0} gave the {3} to {1}. ",
    "At {2} lived {0} and {1}. ",
    "Nobody at {2} trusted {0}. ",
    "{0}, the {4}, came to {2}. ",
    "{1} wrote of the {3} to {0}. ",
    "The {3} was lost at {2} by {0}. ",
)


def _word(draw: random.Random, syllables: int) -> str:
    parts = [draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(syllables)]
    return ("".join(parts) + draw.choice(_CODAS)).capitalize()


def _chronicle(draw: random.Random) -> str:
    people = [f"{_word(draw, 2)} {_word(draw, 2)}" for _ in range(4)]
    places = [f"{_word(draw, 2)} {draw.choice(('Gate', 'Hill', 'Ford', 'Bridge'))}" for _ in range(3)]
    roles = [f"{draw.choice(_ROLES)} of {_word(draw, 2)}" for _ in people]
    things = [f"{draw.choice(_COLOURS)} {draw.choice(_THINGS)} of {_word(draw, 2)}" for _ in range(2)]
    text = [draw.choice(_INTRODUCTIONS).format(who, role) for who, role in zip(people, roles, strict=True)]
    for _ in range(SENTENCES):
        who, other = draw.sample(range(len(people)), 2)
        sentence = draw.choice(_SENTENCES)
        text.append(sentence.format(people[who], people[other], draw.choice(places), draw.choice(things), roles[who]))
    return "".join(text).rstrip() + "\n"


@lru_cache(maxsize=1)
def chronicles() -> tuple[Document, ...]:
    """Documents of about 2,500 bytes in which invented persons, places and things are named again and again.

    No name is in two documents but by chance: what a name goes on with can only be known from the document itself. The
    same on every machine.

    Example:
        >>> len(chronicles()), chronicles()[0].text == chronicles()[0].text
        (1000, True)
    """
    draw = random.Random(0)
    return tuple(Document(_chronicle(draw), f"chronicle/{i}") for i in range(DOCUMENTS))
