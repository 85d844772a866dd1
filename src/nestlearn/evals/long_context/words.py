"""Words for the keys of needles; sentences of a book."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from nestlearn.data.text_files import find_files, read_text

_ADJECTIVES = """
able airy amber ample bold brave brief bright brisk calm candid cheerful civil clear clever coastal cold cosmic crisp
curious daring deep distant dry eager early easy fair famous fast fierce fine firm fluent fond formal fresh frugal
gentle gifted glad golden grand green happy hardy hollow honest humble icy idle jolly keen kind large late lively
lone loyal lucky lunar mellow mild modest narrow neat noble novel oval pale patient plain polite proud quick quiet
rapid rare ready remote rich rough round royal rustic sandy sharp shy silent silver simple slow smooth soft solid
sparse spry steady stern sturdy subtle sunny sweet swift tall tame tender thin tidy tiny true upper urban vast velvet
vivid warm wary white whole wide wild wise witty young
""".split()

_NOUNS = """
acorn anchor apple arrow atlas badge banjo barrel basin basket beacon beetle bell berry blanket bottle branch brick
bridge brook bucket button cabin cable camel candle canoe canyon carpet castle cedar chapel cherry clock cloud clover
comet copper coral cotton cradle crane cricket crown curtain daisy desert diary dolphin donkey dragon drum eagle
engine falcon feather fern fiddle finch flag flute forest fossil fountain fox garden gate giant ginger glacier goose
grape hammer harbor harp hazel helmet heron hill honey horse island ivory jacket jungle kettle kite ladder lagoon
lantern lemon letter lily lizard magnet mango maple marble meadow melon mirror moose mountain needle nest oak oasis
ocean olive orchard otter owl oyster paddle palace panda paper parrot pebble pencil pepper piano pigeon pillow pilot
planet pond poplar prairie quill rabbit raven reef ribbon river robin rocket saddle sail salmon shadow shell shovel
slipper sparrow spider spoon statue stone summit swan table temple thimble thistle tiger tower trumpet tulip tunnel
turtle valley vessel violin wagon walnut whale willow window winter wolf wren zebra
""".split()

# An end of a sentence: its mark, closing quotes or brackets, space, then a possible beginning of another sentence.
_END = re.compile(r"""(?<=[.!?])(["'”’)\]]*)\s+(?=["'“‘(\[]*[A-Z])""")
_TITLES = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|Hon|Rev|Esq|No|[A-Z])\.$")


@cache
def key_words() -> tuple[str, ...]:
    """All adjective-noun pairs of a fixed list, so that a seed gives the same keys on every machine.

    Example:
        >>> key_words()[0], len(key_words()) > 20_000
        ('able-acorn', True)
    """
    return tuple(f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS)


def key_nouns() -> tuple[str, ...]:
    """The nouns of the list, for keys of one word."""
    return tuple(_NOUNS)


def sentences(text: str) -> list[str]:
    """The sentences of a text, with single spaces for white space.

    Example:
        >>> sentences('"Stop!" he said. Mr. Fox\\n went on. Why?')
        ['"Stop!" he said.', 'Mr. Fox went on.', 'Why?']
    """
    pieces = _END.sub(r"\1\n", " ".join(text.split())).split("\n")
    found: list[str] = []
    for piece in pieces:
        if found and _TITLES.search(found[-1]):
            found[-1] += f" {piece}"
        elif piece:
            found.append(piece)
    return found


def read_sentences(path: str | Path) -> list[str]:
    """The sentences of a text file, or of all files of a folder in the order of their names.

    Raises:
        ValueError: there is no file, no UTF-8 text, or no sentence.
    """
    found = sentences("\n".join(read_text(file) for file in find_files(str(path))))
    if not found:
        raise ValueError(f"{path} holds no sentences to hide needles in. Give a book as UTF-8 text.")
    return found
