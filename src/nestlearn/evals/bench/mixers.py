"""Named mixers: what a benchmark compares, each a mapping of a mixer type and its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nestlearn.fields import unknown_name
from nestlearn.memory import catalog
from nestlearn.models.config import HopeConfig
from nestlearn.nn.config import mixer_types

_HOPE: dict[str, Any] = {"type": "self_modifying"}
# Steps up to 2 on unit keys: eigenvalues down to -1 (docs/decisions.md, 1 and 12).
_NORMALIZED: dict[str, Any] = {"step_size": "normalized", "max_step": 2.0}

_NAMED: dict[str, dict[str, Any]] = {
    "hope": _HOPE,
    "hope-static": _HOPE | {"adaptive": []},
    "hope-normalized": _HOPE | _NORMALIZED,
    "hope-static-normalized": _HOPE | {"adaptive": []} | _NORMALIZED,
    "deltanet-negative": {"type": "memory", "memory": "deltanet", "max_step": 2.0},
    "gated_deltanet-negative": {"type": "memory", "memory": "gated_deltanet", "max_step": 2.0},
    "attention": {"type": "attention", "conv_size": 4},
    "sliding_attention": {"type": "attention", "conv_size": 4, "window": 256},
    "transformer": {"type": "attention"},
}
_LIST_FIELDS = ("adaptive",)


def named_mixers() -> dict[str, dict[str, Any]]:
    """Every name a benchmark knows, with the mixer it stands for, a mapping of its type and fields.

    ``hope`` is self-modifying Titans and ``hope-static`` the same with projections that do not adapt;
    ``-normalized`` takes steps up to 2 on unit keys and ``-negative`` write strengths up to 2 (both reach negative
    eigenvalues); ``attention`` has the convolution of all mixers, ``transformer`` none. Every memory of the catalog and
    every other registered mixer type has its own name.
    """
    types = {name: {"type": name} for name in mixer_types() if name != "memory"}
    memories = {name: {"type": "memory", "memory": name} for name in catalog}
    return types | memories | {name: dict(fields) for name, fields in _NAMED.items()}


def mixer_fields(token: str, shared: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`HopeConfig` fields of a mixer token: a name, or a name with changed fields, ``name:field=value:field=value``.

    A field is one of the mixer, or else one of `HopeConfig`. Lists are joined by ``+``; an empty value is an empty list
    (``adaptive=``).

    Args:
        token: the mixer.
        shared: fields for every mixer that has them; the token's own come on top.

    Raises:
        ValueError: an unknown mixer or field (with the closest known ones), or a value that cannot be read.

    Example:
        >>> mixer_fields("hope:adaptive=k+v:hidden_size=8", {"chunk_size": 8, "window": 4})
        {'mixer': {'chunk_size': 8, 'type': 'self_modifying', 'adaptive': ['k', 'v']}, 'hidden_size': 8}
    """
    name, *changes = token.split(":")
    known = named_mixers()
    if name not in known:
        raise unknown_name("mixer", name, known)
    own = [f.name for f in fields(mixer_types()[known[name]["type"]])]
    mixer = {key: value for key, value in (shared or {}).items() if key in own} | known[name]
    others: dict[str, Any] = {}
    for change in changes:
        field, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"mixer {token!r}: {change!r} is no change of a field; write field=value.")
        value = [part for part in text.split("+") if part] if field in _LIST_FIELDS else _value(text)
        if field in own:
            mixer[field] = value
        elif field in HopeConfig.field_names():
            others[field] = value
        else:
            raise unknown_name(f"field of the mixer {name} or of HopeConfig", field, [*own, *HopeConfig.field_names()])
    return {"mixer": mixer} | others


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
