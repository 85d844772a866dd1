"""Make the adapter known to peft."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from .config import METHOD, ContinuumConfig
from .model import ContinuumModel


def add_member(kind: Any, name: str) -> None:
    """Add a member whose value is its name to an enumeration of words.

    peft reads the names of its methods from an enumeration, and has no function that adds one.

    Example:
        >>> from enum import Enum
        >>> class Colour(str, Enum):
        ...     RED = "RED"
        >>> add_member(Colour, "BLUE")
        >>> list(Colour), Colour("BLUE") is Colour.BLUE
        ([<Colour.RED: 'RED'>, <Colour.BLUE: 'BLUE'>], True)
    """
    if name in kind.__members__:
        return
    member = cast(Any, str.__new__(kind, name))
    member._name_ = member._value_ = name
    type.__setattr__(kind, name, member)
    kind._member_names_.append(name)
    kind._member_map_[name] = kind._value2member_map_[name] = member


def register() -> None:
    """Register the method with peft; a second call does nothing."""
    add_member(PeftType, METHOD)
    if METHOD not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=METHOD.lower(), config_cls=ContinuumConfig, model_cls=ContinuumModel, prefix=ContinuumModel.prefix
        )
