"""Sentences with translations from local files (MTOB's JSON, tables of Manchu and English, ...)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nestlearn.data.invented_languages import SentencePair
from nestlearn.data.text_files import read_text

# The names that published collections use for a sentence and its translation, in order of preference.
_FOREIGN = ("original", "source", "foreign", "manchu", "kalamang", "src")
_ENGLISH = ("ground_truth", "translation", "target", "english", "tgt")


def load_pairs(path: str | Path, foreign: str | None = None, english: str | None = None) -> list[SentencePair]:
    """The pairs of a ``.json`` (a list of objects), ``.jsonl``, ``.csv`` or ``.tsv`` file (with a header line).

    Entries without both sentences are left out, such as the canary at the top of MTOB's files.

    Args:
        path: the file.
        foreign, english: names of the two columns or keys; by default the usual names are tried
            (original, source, manchu, ...; ground_truth, translation, target, english).

    Raises:
        ValueError: the file does not exist, has another format, or has no such column or no pair.

    Example:
        >>> load_pairs("splits/test_examples_ke.json")                                       # doctest: +SKIP
        [SentencePair(foreign=..., english=...), ...]
    """
    file = Path(path)
    entries = list(_entries(file))
    names = {str(name) for entry in entries for name in entry}
    if foreign is not None and foreign == english:
        raise ValueError(f"foreign and english are both {foreign!r}; name two columns of {file}.")
    # A column that the caller named is not guessed again.
    first = _column(foreign, _FOREIGN, names if foreign is not None else names - {english}, "foreign", file)
    second = _column(english, _ENGLISH, names if english is not None else names - {first}, "english", file)
    texts = ((entry.get(first), entry.get(second)) for entry in entries)
    pairs = [
        SentencePair(a.strip(), b.strip())
        for a, b in texts
        if isinstance(a, str) and isinstance(b, str) and a.strip() and b.strip()
    ]
    if not pairs:
        raise ValueError(f"{file} has the columns {first!r} and {second!r}, but no entry with text in both.")
    return pairs


def _entries(file: Path) -> Iterable[Mapping[str, Any]]:
    text, kind = read_text(file), file.suffix.lower()
    try:
        if kind == ".json":
            content = json.loads(text)
        elif kind == ".jsonl":
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif kind in (".csv", ".tsv"):
            return list(csv.DictReader(io.StringIO(text), delimiter="\t" if kind == ".tsv" else ","))
        else:
            raise ValueError(f"{file} is not a .json, .jsonl, .csv or .tsv file; convert it to one of them.")
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, list):
        raise ValueError(f"{file} holds a {type(content).__name__}; a list of objects with two sentences is needed.")
    return [entry for entry in content if isinstance(entry, dict)]


def _column(given: str | None, usual: tuple[str, ...], names: set[str], argument: str, file: Path) -> str:
    if given is not None:
        if given not in names:
            raise ValueError(f"{file} has no column {given!r}; it has {', '.join(sorted(names)) or 'none'}.")
        return given
    by_lower = {name.lower(): name for name in sorted(names)}
    for name in usual:
        if name in by_lower:
            return by_lower[name]
    raise ValueError(
        f"{file} has the columns {', '.join(sorted(names)) or '(none)'}; name the right one: load_pairs(..., "
        f"{argument}=...)."
    )
