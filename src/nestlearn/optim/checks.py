"""Checks of optimizers' settings. Each raises ValueError with the value received and what it must be."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NoReturn, get_args

from torch import Tensor


def one_of(name: str, value: object, words: Any) -> None:
    """Raises ValueError unless the value is one of the words of a `typing.Literal`."""
    if value not in get_args(words):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(get_args(words))}.")


def not_negative(name: str, value: float | Tensor, meaning: str) -> None:
    """Raises ValueError unless the value is 0 or more."""
    if not isinstance(value, (Real, Tensor)) or not float(value) >= 0.0:
        raise ValueError(f"{name} is {value!r}; it must be 0 or more: {meaning}.")


def positive(name: str, value: float, meaning: str) -> None:
    """Raises ValueError unless the value is a number above 0."""
    if not isinstance(value, Real) or not value > 0:
        raise ValueError(f"{name} is {value!r}; it must be positive: {meaning}.")


def share(name: str, value: float, meaning: str) -> None:
    """Raises ValueError unless the value is a number in (0, 1]."""
    if not isinstance(value, Real) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} is {value!r}; it must be in (0, 1]: {meaning}.")


def kept(name: str, value: float, meaning: str) -> None:
    """Raises ValueError unless the value is a number in [0, 1)."""
    if not isinstance(value, Real) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} is {value!r}; it must be in [0, 1): {meaning}.")


def fractions(name: str, values: Sequence[float], count: int) -> None:
    """Raises ValueError unless these are `count` numbers in [0, 1)."""
    numbers = isinstance(values, Sequence) and all(isinstance(value, Real) for value in values)
    if not numbers or len(values) != count or not all(0.0 <= value < 1.0 for value in values):
        raise ValueError(f"{name} is {values!r}; it must be {count} numbers in [0, 1), each the part kept at a step.")


def numbers(name: str, values: Sequence[float], least: float, meaning: str) -> None:
    """Raises ValueError unless this is one number or more, each of at least `least`."""
    given = isinstance(values, Sequence) and all(isinstance(value, Real) for value in values)
    if not given or not values or not all(least <= value < float("inf") for value in values):
        raise ValueError(f"{name} is {values!r}; it must be a tuple of numbers of at least {least:g}: {meaning}.")


def whole_number(name: str, value: object, meaning: str) -> int:
    """`value` if it is a positive integer.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1: {meaning}.")
    return int(value)


def refuse_copy(optimizer: object) -> NoReturn:
    """Raises TypeError for an optimizer that is copied or pickled though it belongs to one model."""
    raise TypeError(
        f"A {type(optimizer).__name__} cannot be copied or pickled: its copy would not train the copied model. "
        "Copy the model, make an optimizer for it as this one was made, and give that "
        "load_state_dict(copy.deepcopy(optimizer.state_dict()))."
    )
