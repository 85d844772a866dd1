"""Type and range of a configuration's fields, checked by their declarations.

A field is declared by its annotation: ``int``, ``float``, ``bool``, ``str``, ``None``, ``Literal[...]``, unions, lists,
tuples and dicts of them, or a class, whose instances fit. ``Annotated[int, Between(1, 8)]`` adds a range. Checks are
strict: a bool is no number, a float is no integer, NaN and infinity are no numbers, and the string ``"no"`` is no bool.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

LARGEST = 2**31 - 1
"""Largest size that a field can have: torch indexes a dimension of this length with 32 bits."""

MAX_SEED = 2**32 - 1
"""Largest seed: the generators of NumPy take seeds of 32 bits, without a sign."""


@dataclass(frozen=True)
class Between:
    """A range of numbers for `Annotated`; without its ends where ``open`` names them.

    Args:
        low: smallest value.
        high: largest value.
        open: ends that do not belong to the range: ``"low"``, ``"high"`` or ``"both"``.

    Example:
        >>> Between(0, 1, open="low").holds(0), Between(0, 1, open="low").holds(1)
        (False, True)
    """

    low: float = -math.inf
    high: float = math.inf
    open: Literal["", "low", "high", "both"] = ""

    def holds(self, value: float) -> bool:
        """Whether the number lies in the range."""
        above = self.low < value if self.open in ("low", "both") else self.low <= value
        below = value < self.high if self.open in ("high", "both") else value <= self.high
        return above and below

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.open in ('low', 'both') else 'at least'} {self.low:g}")
        if self.high < math.inf:
            limit = f"{self.high}" if isinstance(self.high, int) else f"{self.high:g}"
            parts.append(f"{'below' if self.open in ('high', 'both') else 'at most'} {limit}")
        return " and ".join(parts)


Made = TypeVar("Made")

Size = Annotated[int, Between(1, LARGEST)]
Count = Annotated[int, Between(0, LARGEST)]
Positive = Annotated[float, Between(0, 1e12, open="low")]
Fraction = Annotated[float, Between(0, 1)]


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """A ValueError that names what was received and the closest known names.

    Example:
        >>> print(unknown_name("memory", "titan", ["titans", "deltanet"]))
        unknown memory 'titan'. Did you mean 'titans'?
    """
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(match) for match in close)}?" if close else f"Known: {', '.join(known)}."
    return ValueError(f"unknown {kind} {shown(name)}. {hint}")


def shown(value: object) -> str:
    """``repr`` of a value in at most 100 characters; an integer of thousands of digits has no ``repr``."""
    try:
        text = repr(value)
    except ValueError:
        return f"a {type(value).__name__} of {value.bit_length()} bits" if isinstance(value, int) else "a value"
    return text if len(text) <= 100 else f"{text[:97]}..."


@functools.cache
def declarations(cls: type) -> dict[str, Any]:
    """``{field: annotation}`` of the fields that a class itself declares."""
    return inspect.get_annotations(cls, eval_str=True)


def check_fields(config: object, cls: type | None = None, where: str = "") -> None:
    """Check every field that a class declares.

    Args:
        config: the object that holds the values.
        cls: the class whose declarations count; by default that of ``config``.
        where: put before the name of a field, for example ``"cms[0]."``.

    Raises:
        ValueError: a value is not what its field's annotation says; the message names field, value and what fits.

    Example:
        >>> @dataclass
        ... class Window:
        ...     tokens: Size = 4
        >>> check_fields(Window(4))
        >>> check_fields(Window(True))
        Traceback (most recent call last):
            ...
        ValueError: tokens=True must be an integer of at least 1 and at most 2147483647.
    """
    for name, declared in declarations(type(config) if cls is None else cls).items():
        if get_origin(declared) is not ClassVar:
            check_value(f"{where}{name}", getattr(config, name), declared)


def from_mapping(cls: Callable[..., Made], values: Mapping[str, Any], kind: str) -> Made:
    """The dataclass ``cls`` with these fields.

    Raises:
        ValueError: a name that is no field of the class (``kind`` says what it should be), or what the class refuses.

    Example:
        >>> from_mapping(Between, {"hihg": 1}, "field of a range")
        Traceback (most recent call last):
            ...
        ValueError: unknown field of a range 'hihg'. Did you mean 'high'?
    """
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise unknown_name(kind, name, known)
    return cls(**values)


def check_value(name: str, value: object, declared: Any) -> None:
    """Raise ValueError unless the value is what the annotation ``declared`` says.

    Example:
        >>> check_value("rate", float("nan"), Positive)
        Traceback (most recent call last):
            ...
        ValueError: rate=nan must be a finite number above 0 and at most 1e+12.
    """
    if _fits(value, declared):
        return
    names = [choice for choice in _choices(declared) if isinstance(choice, str)]
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.5) if isinstance(value, str) else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{name}={shown(value)} must be {_described(declared)}.{hint}")


def _is_union(declared: Any) -> bool:
    return get_origin(declared) in (Union, types.UnionType)


def _fits(value: object, declared: Any) -> bool:
    """Whether a value is of a declared type and in its range."""
    origin, parts = get_origin(declared), get_args(declared)
    if origin is Annotated:
        limits = [limit for limit in parts[1:] if isinstance(limit, Between)]
        return _fits(value, parts[0]) and all(limit.holds(value) for limit in limits)  # type: ignore[arg-type]
    if _is_union(declared):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return isinstance(value, dict) and all(_fits(key, parts[0]) and _fits(item, parts[1]) for key, item in pairs)
    if declared in _PLAIN:
        return _PLAIN[declared](value)
    return isinstance(value, declared)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -(2**1023) < value < 2**1023 and math.isfinite(value)


# Integers above 64 bits fit into no tensor.
_PLAIN: dict[Any, Any] = {
    bool: lambda value: isinstance(value, bool),
    int: lambda value: isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63,
    float: _is_number,
    str: lambda value: isinstance(value, str),
    type(None): lambda value: value is None,
    None: lambda value: value is None,
    Any: lambda value: True,
}
_NAMES: dict[Any, str] = {
    bool: "True or False", int: "an integer", float: "a finite number", str: "a string", type(None): "None",
    None: "None", Any: "anything",
}  # fmt: skip


def _choices(declared: Any) -> list[Any]:
    """All values that a declaration lists, at whatever depth."""
    if get_origin(declared) is Literal:
        return list(get_args(declared))
    return [choice for part in get_args(declared) for choice in _choices(part)]


def _described(declared: Any) -> str:
    """A declaration in words."""
    origin, parts = get_origin(declared), get_args(declared)
    if origin is Annotated:
        limits = " and ".join(str(x) for x in parts[1:] if isinstance(x, Between))
        return f"{_described(parts[0])}{' of ' if limits.startswith('at') else ' '}{limits}"
    if _is_union(declared):
        return " or ".join(map(_described, parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (list, tuple):
        return f"a list with each item {_described(parts[0])}"
    if origin is dict:
        return f"a mapping from {_described(parts[0])} to {_described(parts[1])}"
    return _NAMES.get(declared) or f"of the class {declared.__name__}"
