"""A page about an invented town, with questions in other words: text that no model has seen."""

from __future__ import annotations

import random
from typing import NamedTuple

_FIRST = ("Alice", "Martin", "Clara", "Victor", "Helen", "Oscar", "Nora", "Felix", "Irene", "Hugo", "Marta", "Simon")
_LAST = (
    "Carter",
    "Novak",
    "Brandt",
    "Moreau",
    "Hughes",
    "Petrov",
    "Vidal",
    "Sorensen",
    "Okafor",
    "Tanaka",
    "Reyes",
    "Kemp",
)
_PLACE = (
    "Amber",
    "Stone",
    "Silver",
    "Oak",
    "Raven",
    "Copper",
    "Winter",
    "Fox",
    "Maple",
    "Iron",
    "Heron",
    "Salt",
    "Birch",
)
_ENDINGS = ("wick", "mere", "ford", "dale", "field", "bury", "haven", "gate")
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


class TownQuestion(NamedTuple):
    """A question in other words than the page, the right answer, and wrong ones of the same kind.

    ``wrong``: three that are not on the page. ``near``: up to three that answer other questions about it, so that what
    is merely familiar does not help.
    """

    text: str
    answer: str
    wrong: tuple[str, ...]
    near: tuple[str, ...]


def invent_town(seed: int) -> tuple[str, list[TownQuestion]]:
    """A page of about 200 words, its first line a title, and 18 questions about it.

    Example:
        >>> page, questions = invent_town(seed=0)
        >>> all(question.answer in page for question in questions)
        True
    """
    draw = random.Random(f"town {seed}")
    first, last = draw.sample(_FIRST, len(_FIRST)), draw.sample(_LAST, len(_LAST))
    town, *places = [f"{word}{draw.choice(_ENDINGS)}" for word in draw.sample(_PLACE, len(_PLACE))]
    kinds = {
        "person": [" ".join(name) for name in zip(first, last, strict=True)],
        "place": places,
        # The town is older than its tram and its bridge.
        "year": list(map(str, sorted(draw.sample(range(1612, 1990), 8)))),
        "trade": draw.sample(_TRADES, len(_TRADES)),
        "animals": draw.sample(_ANIMALS, len(_ANIMALS)),
        "colour": draw.sample(_COLOURS, len(_COLOURS)),
        "day": draw.sample(_DAYS, len(_DAYS)),
        "number": list(map(str, draw.sample(range(2, 40), 6))),
    }
    left = {kind: iter(values) for kind, values in kinds.items()}
    found = {name: next(left[kind]) for _, name, kind in _QUESTIONS}
    others = {"street": next(left["place"]), "bridge": next(left["year"])}
    fresh = {kind: list(values) for kind, values in left.items()}
    page = "\n\n".join(paragraph.format(town=town, **found, **others) for paragraph in _PARAGRAPHS)
    questions = []
    for text, name, kind in _QUESTIONS:
        near = [found[other] for _, other, k in _QUESTIONS if k == kind and other != name]
        wrong, near = draw.sample(fresh[kind], 3), draw.sample(near, min(3, len(near)))
        questions.append(TownQuestion(text.format(town=town), found[name], tuple(wrong), tuple(near)))
    return f"{town}: a town and its people\n\n{page}\n", questions
