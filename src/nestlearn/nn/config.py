"""The configuration of a mixer, and the registry of mixer types that `HopeConfig` and files know by name."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import nn

from nestlearn.fields import check_fields, from_mapping, shown, unknown_name

Config = TypeVar("Config", bound="type[MixerConfig]")

_TYPES: dict[str, type[MixerConfig]] = {}
"""Classes of configurations by the name that files give them."""


@dataclass(frozen=True)
class MixerConfig(ABC):
    """Base class of the configurations of sequence layers: frozen dataclasses whose fields JSON can hold.

    A subclass declares fields (their annotations are checked, see `nestlearn.fields`), defines `build`, and gets its
    name from `register_mixer`. The layer that `build` returns has the protocol of `nestlearn.nn.Mixer`:
    ``forward(x, state, mask, reset, *, writes, return_state) -> (y, state)`` and ``flops_per_token(context_length)``.

    Raises:
        ValueError: a field is not what its annotation says.
    """

    type: ClassVar[str] = ""
    """The registered name."""

    def __post_init__(self) -> None:
        for cls in type(self).__mro__:
            if dataclasses.is_dataclass(cls):
                check_fields(self, cls)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))

    @abstractmethod
    def build(self, d_model: int, num_heads: int) -> nn.Module:
        """The layer for inputs ``[batch, tokens, d_model]``."""

    def check_sizes(self, d_model: int, num_heads: int) -> None:
        """Raise ValueError unless the layer can have this width and this number of heads."""
        if d_model < 1 or num_heads < 1 or d_model % num_heads:
            raise ValueError(
                f"{d_model=} is not divisible by {num_heads=}; choose a number of heads that divides the width."
            )

    @property
    def shortest_text(self) -> int:
        """Tokens that a text needs at least for every part of the layer to have something to do."""
        return 1

    @property
    def stored_tokens(self) -> int | None:
        """How many of the last tokens the state keeps one by one; None for all, 0 for none."""
        return 0

    @property
    def outlasts_documents(self) -> bool:
        """Whether part of the state survives a reset, so that documents of one row depend on earlier ones."""
        return False

    @property
    def work_period(self) -> int:
        """Tokens after which the work of a call repeats (a chunk, a segment): what estimates of memory measure."""
        return 32

    def to_dict(self) -> dict[str, Any]:
        """The type and every field, as JSON values.

        Raises:
            ValueError: a field holds an object that JSON cannot.
        """
        return {"type": self.type} | {f.name: _json(f.name, getattr(self, f.name)) for f in fields(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> MixerConfig:
        """The configuration of a registered type; inverse of `to_dict`. Fields left out have their defaults.

        Raises:
            ValueError: no type, an unknown type or field (with the closest known names), or a value that does not fit.

        Example:
            >>> import nestlearn.nn
            >>> MixerConfig.from_dict({"type": "attention", "window": 64}).window
            64
        """
        known = mixer_types()
        if "type" not in values:
            raise ValueError(
                f"a mixer must name its type, received the keys {sorted(map(str, values))}. "
                f"Add for example 'type': 'self_modifying'. Known: {', '.join(known)}."
            )
        name = values["type"]
        if not isinstance(name, str) or name not in known:
            raise unknown_name("mixer type", name, known)
        # JSON has lists only; fields that hold several values are tuples.
        items = ((key, tuple(value) if isinstance(value, list) else value) for key, value in values.items())
        rest = {key: value for key, value in items if key != "type"}
        return from_mapping(known[name], rest, f"field of the mixer {name!r}")


def register_mixer(name: str) -> Callable[[Config], Config]:
    """Class decorator: a `MixerConfig` under the name by which `HopeConfig` and saved models know it.

    Raises:
        TypeError: the class is not a frozen dataclass derived from `MixerConfig`.
        ValueError: the name is that of another class.

    Example:
        >>> from dataclasses import dataclass
        >>> @register_mixer("documentation.average")
        ... @dataclass(frozen=True)
        ... class AverageConfig(MixerConfig):
        ...     window: int = 4
        ...
        ...     def build(self, d_model, num_heads):
        ...         return nn.AvgPool1d(self.window)
        >>> MixerConfig.from_dict({"type": "documentation.average", "window": 8})
        AverageConfig(window=8)
    """

    def register(cls: Config) -> Config:
        parameters = vars(cls).get("__dataclass_params__") if isinstance(cls, type) else None
        if parameters is None or not parameters.frozen or not issubclass(cls, MixerConfig):
            raise TypeError(
                "a mixer is registered by its configuration, a class decorated with @dataclass(frozen=True) and "
                f"derived from nestlearn.nn.MixerConfig; received {shown(cls)}."
            )
        known = _TYPES.setdefault(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the mixer type {name!r} of {cls.__qualname__} belongs to {known} already; use another.")
        _TYPES[name] = cls
        cls.type = name
        return cls

    return register


def mixer_types() -> dict[str, type[MixerConfig]]:
    """Every registered type: its name and its class."""
    return dict(_TYPES)


def mixer_config(value: object) -> MixerConfig:
    """A configuration from itself, from a mapping, or from the name of a type whose defaults are meant.

    Raises:
        ValueError: anything else, and as `MixerConfig.from_dict`.

    Example:
        >>> import nestlearn.nn
        >>> mixer_config("tnt") == mixer_config({"type": "tnt"})
        True
    """
    if isinstance(value, MixerConfig):
        return value
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"mixer={shown(value)} must be the name of a mixer type, a mapping such as {{'type': 'attention'}}, or a "
            "MixerConfig."
        )
    return MixerConfig.from_dict(value)


def _json(name: str, value: Any) -> Any:
    """A field as JSON values, its containers copied."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_json(name, item) for item in value]
    if isinstance(value, Mapping):
        return {key: _json(name, item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return {field.name: _json(name, getattr(value, field.name)) for field in fields(value)}
    raise ValueError(f"{name}={shown(value)} is a {type(value).__name__}, which a saved configuration cannot hold.")
