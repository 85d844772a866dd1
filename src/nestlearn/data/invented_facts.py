"""Facts about invented people, each with statements, a question and its answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

PLACES = ("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Paris", "Tokyo", "Dublin", "Quito", "Malta", "Perth", "Kyoto")
TRADES = ("baker", "weaver", "sailor", "painter", "miller", "tailor", "potter", "singer", "hunter", "farmer", "smith")
PETS = ("cat", "dog", "owl", "goat", "horse", "parrot", "rabbit", "snake", "pony", "duck", "lizard", "hen")

# Relation: possible values, two wordings of the statement, and the question.
_RELATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "place": (PLACES, ("{name} lives in {value}.", "The home of {name} is {value}."), "Where does {name} live?"),
    "trade": (TRADES, ("{name} is a {value}.", "{name} works as a {value}."), "What is the trade of {name}?"),
    "pet": (PETS, ("{name} has a {value}.", "The pet of {name} is a {value}."), "What pet does {name} have?"),
}
RELATIONS = tuple(_RELATIONS)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        name: the invented person.
        relation: one of `RELATIONS`.
        value: the person's value of the relation.

    Example:
        >>> fact = Fact("Zamiko", "pet", "owl")
        >>> fact.statement(), fact.question
        ('Zamiko has a owl.', 'Question: What pet does Zamiko have?\\nAnswer:')
    """

    name: str
    relation: str
    value: str

    def statement(self, wording: int = 0) -> str:
        """The fact as a sentence, in wording 0 or 1."""
        return _RELATIONS[self.relation][1][wording].format(name=self.name, value=self.value)

    @property
    def question(self) -> str:
        """The prompt for the value. It ends before the space, which tokenizers join to the next word."""
        return f"Question: {_RELATIONS[self.relation][2].format(name=self.name)}\nAnswer:"

    @property
    def choices(self) -> tuple[str, ...]:
        """All possible values of the relation."""
        return _RELATIONS[self.relation][0]


def invent_facts(people: int, seed: int, relations: Sequence[str] = RELATIONS) -> list[Fact]:
    """One fact per person and relation; no two people share a name.

    Raises:
        ValueError: fewer than one person, or an unknown relation.

    Example:
        >>> len(invent_facts(people=4, seed=0))
        12
    """
    if people < 1:
        raise ValueError(f"people={people} must be at least 1.")
    for relation in relations:
        if relation not in _RELATIONS:
            raise ValueError(f"unknown relation {relation!r}; use {', '.join(RELATIONS)}.")
    generator = random.Random(f"facts {seed}")
    names: list[str] = []
    while len(names) < people:
        syllables = (generator.choice(_CONSONANTS) + generator.choice(_VOWELS) for _ in range(3))
        name = "".join(syllables).capitalize()
        if name not in names:
            names.append(name)
    return [Fact(name, relation, generator.choice(_RELATIONS[relation][0])) for name in names for relation in relations]
