"""A page about an invented town, with questions in other words: text that no model has seen."""

from __future__ import annotations

import random
from typing import NamedTuple

_ONSETS, _VOWELS, _CODAS = "b d f g k l m n p r s t v z br dr kr st tr".split(), "aeiou", ["", "l", "n", "r", "s", "sk"]
_ENDINGS = ("mere", "wick", "holm", "stad", "ford", "dale", "by", "mouth")
_FIRST = ("Ilsabet", "Oda", "Tomas", "Pell", "Sigrun", "Rufus", "Marit", "Jorun", "Kasper", "Linnea", "Edda", "Bram")
_TRADES = ("salt merchant", "lens grinder", "ferry captain", "dentist", "beekeeper", "clockmaker", "glassblower")
_ANIMALS = ("goats", "otters", "herons", "hedgehogs", "storks", "badgers")
_COLOURS = ("yellow", "green", "violet", "orange", "crimson", "silver")
_DAYS = ("Tuesday", "Wednesday", "Thursday", "Saturday", "Sunday")

_PARAGRAPHS = (
    "{town} is a harbour town on the shore of Lake {lake}, in the province of {province}. It was founded in {founded} "
    "by the {trade} {founder}, who had come from {origin}. Three {animals} appear on its coat of arms.",
    "The oldest building of {town} is the {hall}, on {street} Street. It is a museum today, and its curator is "
    "{curator}. It opens every {day}.",
    "A tram, line {line}, connects the harbour with the hill; it is painted {colour}. The line was opened in {opened} "
    "and planned by the engineer {engineer}.",
    "The mayor of {town} is {mayor}, once a {mayor_trade}. The river {river} flows through the town and is crossed by "
    "a bridge that {builder} built in {bridge}.",
)
_QUESTIONS = (
    ("Which lake lies beside {town}?", "lake", "place"),
    ("In which province would you find {town}?", "province", "place"),
    ("When did {town} begin to exist?", "founded", "year"),
    ("Who started the town of {town}?", "founder", "person"),
    ("What was the job of the founder of {town}?", "trade", "trade"),
    ("Where did the founder of {town} live before?", "origin", "place"),
    ("Which animals are shown in the arms of {town}?", "animals", "animals"),
    ("What is the name of the oldest house in {town}?", "hall", "place"),
    ("Who is in charge of the museum in {town}?", "curator", "person"),
    ("On which day can one visit the museum of {town}?", "day", "day"),
    ("What is the number of the tram in {town}?", "line", "number"),
    ("Which colour does the tram of {town} have?", "colour", "colour"),
    ("Since when does the tram of {town} run?", "opened", "year"),
    ("Which engineer designed the tram of {town}?", "engineer", "person"),
    ("Who governs {town}?", "mayor", "person"),
    ("What did the mayor of {town} do before?", "mayor_trade", "trade"),
    ("Which river runs through {town}?", "river", "place"),
    ("Who made the bridge of {town}?", "builder", "person"),
)


class Question(NamedTuple):
    """A question in other words than the page, the right answer, and three wrong ones of the same kind.

    Wrong answers stand on the page too where it has some of their kind.
    """

    text: str
    answer: str
    wrong: tuple[str, ...]


def invent_town(seed: int) -> tuple[str, list[Question]]:
    """A page of about 200 words, its first line a title, and 18 questions about it.

    Example:
        >>> page, questions = invent_town(seed=0)
        >>> all(question.answer in page for question in questions)
        True
    """
    draw = random.Random(f"town {seed}")
    people = [f"{first} {_word(draw)}" for first in draw.sample(_FIRST, len(_FIRST))]
    places = [_word(draw) + draw.choice(_ENDINGS) for _ in range(12)]
    # The town is older than its bridge and its tram.
    years = sorted(draw.sample(range(1612, 1990), 8))
    trades = draw.sample(_TRADES, len(_TRADES))
    kinds = {
        "person": people,
        "place": places,
        "year": list(map(str, years)),
        "trade": trades,
        "animals": draw.sample(_ANIMALS, len(_ANIMALS)),
        "colour": draw.sample(_COLOURS, len(_COLOURS)),
        "day": draw.sample(_DAYS, len(_DAYS)),
        "number": list(map(str, draw.sample(range(2, 40), 6))),
    }
    town, left = _word(draw) + draw.choice(_ENDINGS), {kind: iter(values) for kind, values in kinds.items()}
    found = {name: next(left[kind]) for _, name, kind in _QUESTIONS}
    others = {"street": next(left["place"]), "bridge": next(left["year"])}
    page = "\n\n".join(paragraph.format(town=town, **found, **others) for paragraph in _PARAGRAPHS)
    used = {kind: [found[name] for _, name, k in _QUESTIONS if k == kind] for kind in kinds}
    questions = []
    for text, name, kind in _QUESTIONS:
        wrong = [value for value in used[kind] if value != found[name]]
        draw.shuffle(wrong)
        wrong += [value for value in kinds[kind] if value not in used[kind]]
        questions.append(Question(text.format(town=town), found[name], tuple(wrong[:3])))
    return f"{town}: a town and its people\n\n{page}\n", questions


def _word(draw: random.Random) -> str:
    """An invented name of two syllables."""
    syllables = (draw.choice(_ONSETS) + draw.choice(_VOWELS) + draw.choice(_CODAS) for _ in range(2))
    return "".join(syllables).capitalize()
