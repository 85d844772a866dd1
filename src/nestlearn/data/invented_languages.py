"""Invented languages with an English translation of every sentence, which no model has seen in training."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

NOUNS = ("dog", "bird", "king", "farmer", "teacher", "friend", "horse", "sister", "doctor", "sailor", "girl", "boy")
VERBS = ("help", "paint", "follow", "clean", "call", "visit", "greet", "answer", "thank", "need")
ADJECTIVES = ("old", "young", "small", "tall", "quiet", "happy", "strange", "green")
"""English words, regular throughout: plurals in -s, past tense in -ed."""

Order = Literal["SVO", "SOV", "VSO", "VOS", "OSV", "OVS"]
_ORDERS: tuple[Order, ...] = ("SVO", "SOV", "VSO", "VOS", "OSV", "OVS")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


class SentencePair(NamedTuple):
    """A sentence and its translation."""

    foreign: str
    english: str


class NounPhrase(NamedTuple):
    """``the [adjective] noun[s]``."""

    noun: str
    adjective: str | None = None
    plural: bool = False


class Meaning(NamedTuple):
    """The meaning of a sentence: subject, verb, object and tense."""

    subject: NounPhrase
    verb: str
    object: NounPhrase
    past: bool = False


def in_english(meaning: Meaning) -> str:
    """The English sentence.

    Example:
        >>> in_english(Meaning(NounPhrase("dog", "old"), "help", NounPhrase("king", plural=True)))
        'the old dog helps the kings'
    """

    def phrase(noun: NounPhrase) -> str:
        words = ("the", noun.adjective, noun.noun + "s" * noun.plural)
        return " ".join(word for word in words if word)

    verb = meaning.verb + ("ed" if meaning.past else "" if meaning.subject.plural else "s")
    return f"{phrase(meaning.subject)} {verb} {phrase(meaning.object)}"


def draw_meaning(generator: random.Random) -> Meaning:
    """A random meaning; subject and object are different nouns."""

    def phrase(noun: str) -> NounPhrase:
        return NounPhrase(noun, generator.choice((None, *ADJECTIVES)), generator.random() < 0.5)

    subject, object_ = generator.sample(NOUNS, 2)
    return Meaning(phrase(subject), generator.choice(VERBS), phrase(object_), generator.random() < 0.5)


@dataclass(frozen=True)
class InventedLanguage:
    """A small language: a lexicon, an order of words, and affixes for the plural and the past.

    Every sentence has exactly one meaning, which `understand` finds, so a perfect translator exists.

    Args:
        lexicon: the foreign stem of every English noun, verb and adjective.
        order: order of subject, verb and object.
        adjective_first: whether adjectives precede their noun.
        plural, past: affixes of nouns and verbs.
        suffixing: whether affixes follow the stem; otherwise they precede it.

    Raises:
        ValueError: words are missing, or two forms of words are equal.

    Example:
        >>> language = InventedLanguage.invent(seed=0)
        >>> pair = next(language.pairs(seed=1))
        >>> in_english(language.understand(pair.foreign)) == pair.english
        True
    """

    lexicon: dict[str, str]
    order: Order
    adjective_first: bool
    plural: str
    past: str
    suffixing: bool = True

    def __post_init__(self) -> None:
        needed = {*NOUNS, *VERBS, *ADJECTIVES}
        if set(self.lexicon) != needed:
            wrong = sorted(needed ^ set(self.lexicon))
            raise ValueError(f"the lexicon must have exactly the {len(needed)} English words; it differs in {wrong}.")
        forms = [form for english in self.lexicon for form in self._forms(english)]
        if len(set(forms)) < len(forms):
            raise ValueError("two forms of words are equal; choose other stems or affixes.")

    @classmethod
    def invent(cls, seed: int) -> InventedLanguage:
        """The language of a seed, with stems of two or three syllables and affixes of one."""
        generator = random.Random(f"invented language {seed}")
        syllables = [c + v for c, v in product(_CONSONANTS, _VOWELS)]

        def stem() -> str:
            return "".join(generator.sample(syllables, generator.choice((2, 2, 3))))

        order, first = generator.choice(_ORDERS), generator.random() < 0.5
        plural, past = generator.sample(syllables, 2)
        suffixing = generator.random() < 0.5
        while True:
            lexicon = {english: stem() for english in (*NOUNS, *VERBS, *ADJECTIVES)}
            try:
                return cls(lexicon, order, first, plural, past, suffixing)
            except ValueError:  # two words are equal
                continue

    def _forms(self, english: str) -> tuple[str, ...]:
        stem = self.lexicon[english]
        if english in ADJECTIVES:
            return (stem,)
        return stem, self._affixed(stem, self.plural if english in NOUNS else self.past)

    def _affixed(self, stem: str, affix: str) -> str:
        return stem + affix if self.suffixing else affix + stem

    def say(self, meaning: Meaning) -> str:
        """The foreign sentence."""

        def phrase(noun: NounPhrase) -> list[str]:
            word = self._forms(noun.noun)[noun.plural]
            if noun.adjective is None:
                return [word]
            pair = [self.lexicon[noun.adjective], word]
            return pair if self.adjective_first else pair[::-1]

        parts = {
            "S": phrase(meaning.subject),
            "V": [self._forms(meaning.verb)[meaning.past]],
            "O": phrase(meaning.object),
        }
        return " ".join(word for place in self.order for word in parts[place])

    def understand(self, foreign: str) -> Meaning:
        """The meaning of a sentence of the language.

        Raises:
            ValueError: a word is unknown, or the words are in an order that the language does not have.
        """
        forms = {form: (english, i > 0) for english in self.lexicon for i, form in enumerate(self._forms(english))}
        words = foreign.split()
        for word in words:
            if word not in forms:
                raise ValueError(f"{word!r} is not a word of this language.")
        known = [forms[word] for word in words]
        verbs = [known_word for known_word in known if known_word[0] in VERBS]
        nouns = [i for i, (english, _) in enumerate(known) if english in NOUNS]
        if len(verbs) == 1 and len(nouns) == 2:
            offset = -1 if self.adjective_first else 1
            phrases = []
            for i in nouns:
                neighbour = known[i + offset][0] if 0 <= i + offset < len(known) else ""
                adjective = neighbour if neighbour in ADJECTIVES else None
                phrases.append(NounPhrase(known[i][0], adjective, known[i][1]))
            if self.order.index("O") < self.order.index("S"):
                phrases.reverse()
            meaning = Meaning(phrases[0], verbs[0][0], phrases[1], verbs[0][1])
            if self.say(meaning) == " ".join(words):
                return meaning
        raise ValueError(f"{foreign!r} is not a sentence of this language, whose order is {self.order}.")

    def pairs(self, seed: int, without: Collection[str] = ()) -> Iterator[SentencePair]:
        """An endless iterator over distinct sentences with translations (about 860,000 exist).

        Args:
            seed: seed of the choice; every language has the same English sentences.
            without: English sentences to leave out, for example those of another set.
        """
        generator, seen = random.Random(f"sentences {seed}"), set(without)
        while True:
            meaning = draw_meaning(generator)
            english = in_english(meaning)
            if english not in seen:
                seen.add(english)
                yield SentencePair(self.say(meaning), english)

    def dictionary(self) -> list[SentencePair]:
        """Every word with its translation, including plural and past forms."""
        endings = {True: "s", False: "ed"}
        found = []
        for english in self.lexicon:
            forms = self._forms(english)
            found.append(SentencePair(forms[0], english))
            found += [SentencePair(form, english + endings[english in NOUNS]) for form in forms[1:]]
        return found
