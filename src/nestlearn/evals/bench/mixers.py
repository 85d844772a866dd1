"""Named mixers: what a benchmark compares, each a set of `HopeConfig` fields."""

from __future__ import annotations

from typing import Any

from nestlearn.fields import unknown_name
from nestlearn.memory import catalog
from nestlearn.models.config import ATTENTION_MIXERS, HopeConfig

_HOPE: dict[str, Any] = {"mixer": "self_modifying_titans"}
# Steps up to 2 on unit keys: eigenvalues down to -1 (docs/decisions.md, 1 and 12).
_NORMALIZED: dict[str, Any] = {"step_size": "normalized", "max_step": 2.0}

_NAMED: dict[str, dict[str, Any]] = {
    "hope": _HOPE,
    "hope-static": _HOPE | {"adaptive": []},
    "hope-normalized": _HOPE | _NORMALIZED,
    "hope-static-normalized": _HOPE | {"adaptive": []} | _NORMALIZED,
    "deltanet-negative": {"mixer": "deltanet", "max_step": 2.0},
    "gated_deltanet-negative": {"mixer": "gated_deltanet", "max_step": 2.0},
    "transformer": {"mixer": "attention", "conv_size": 0},
}
_LIST_FIELDS = ("adaptive",)


def named_mixers() -> dict[str, dict[str, Any]]:
    """Every name a benchmark knows, with the fields it stands for.

    ``hope`` is self-modifying Titans and ``hope-static`` the same with projections that do not adapt;
    ``-normalized`` takes steps up to 2 on unit keys and ``-negative`` write strengths up to 2 (both reach negative
    eigenvalues); ``transformer`` is attention without convolution; every memory of the catalog and every attention
    has its own name.
    """
    plain = {name: {"mixer": name} for name in (*ATTENTION_MIXERS, *catalog)}
    return plain | {name: dict(fields) for name, fields in _NAMED.items()}


def mixer_fields(token: str) -> dict[str, Any]:
    """The fields of a mixer token: a name, or a name with fields changed, ``name:field=value:field=value``.

    Lists are joined by ``+``; an empty value is an empty list (``adaptive=``).

    Raises:
        ValueError: an unknown mixer or field (with the closest known ones), or a value that cannot be read.

    Example:
        >>> mixer_fields("hope:adaptive=k+v:memory_chunk_size=8")
        {'mixer': 'self_modifying_titans', 'adaptive': ['k', 'v'], 'memory_chunk_size': 8}
    """
    name, *changes = token.split(":")
    known = named_mixers()
    if name not in known:
        raise unknown_name("mixer", name, known)
    fields = known[name]
    for change in changes:
        field, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"mixer {token!r}: {change!r} is no change of a field; write field=value.")
        if field not in HopeConfig.field_names():
            raise unknown_name("HopeConfig field", field, HopeConfig.field_names())
        fields[field] = [part for part in text.split("+") if part] if field in _LIST_FIELDS else _value(text)
    return fields


def _value(text: str) -> Any:
    """A number, true, false, none, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
