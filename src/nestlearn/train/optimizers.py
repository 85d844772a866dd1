"""The optimizers of a training run, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nestlearn.optim import DGD, M3, DeepMomentum, DeltaMomentum, param_groups

ENGINE = "adamw"
"""The training engine's own AdamW: what a run without `optimizer` gets."""

PLAIN = (bool, int, float, str, tuple)
"""Types of arguments that a run can set as options."""

REQUIRED = ("params", "lr", "weight_decay")
"""Arguments that every optimizer of a run takes."""


@dataclass(frozen=True)
class NamedOptimizer:
    """An optimizer that a run can be given by name.

    Attributes:
        make: the class, or a function that makes the optimizer: ``make(groups, lr=..., weight_decay=..., **settings)``.
            Where it has these arguments, it also gets ``model``, ``adamw`` (`MatrixOptimizer`) and ``adamw_lr``.
        fixed: settings that make it what its name says; a run cannot change them.
        defaults: settings that train networks, where `make` has other defaults.
        unused: settings that have no effect with `fixed`; a run cannot change them either.
        own_rate: a run takes the default of ``lr``. False: steps are as large as AdamW's, and a run takes its rate.
    """

    make: Callable[..., Optimizer]
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    unused: tuple[str, ...] = ()
    own_rate: bool = True

    def arguments(self) -> dict[str, Any]:
        """The arguments of `make` with their defaults; of a class also those that it passes on to its bases."""
        found: dict[str, Any] = {}
        for made in inspect.getmro(self.make) if isinstance(self.make, type) else (self.make,):
            parameters = inspect.signature(made.__init__ if isinstance(made, type) else made).parameters.values()
            found = {x.name: x.default for x in parameters if x.kind is not x.VAR_KEYWORD} | found
            if not any(x.kind is x.VAR_KEYWORD for x in parameters):
                break
        return found


# Muon is M3 without slow memory and second moment. torch's own Muon takes 2-D weights only: this one trains stacks of
# matrices, kernels and, by AdamW, the rest in one object with one state. A test compares the two.
_REGISTERED: dict[str, NamedOptimizer] = {
    "m3": NamedOptimizer(M3, own_rate=False),
    "muon": NamedOptimizer(
        M3,
        fixed={"alpha": 0.0, "second_moment": False, "accumulate": "ema"},
        unused=("slow_period", "mix", "timescales", "slow_from", "damping", "eps"),
        own_rate=False,
    ),
    # With the printed erase=1 the step also pulls every answer to zero, and a network stops learning (decision 44).
    "dgd": NamedOptimizer(
        DGD,
        fixed={"precondition": "implicit"},
        defaults={"erase": 0.0},
        unused=("refresh", "momentum", "damping"),
    ),
    "dgd-inverse": NamedOptimizer(DGD, fixed={"precondition": "inverse"}, unused=("form", "erase"), own_rate=False),
    "delta-momentum": NamedOptimizer(DeltaMomentum),
    "deep-momentum": NamedOptimizer(DeepMomentum),
}


def register_optimizer(name: str, optimizer: NamedOptimizer | Callable[..., Optimizer]) -> None:
    """Make an optimizer known by its name, for `TrainConfig.optimizer`; the same name again replaces it.

    Args:
        name: of the optimizer.
        optimizer: its class, or a function that makes it; `NamedOptimizer` where it needs more settings.

    Raises:
        ValueError: the name of the engine's own optimizer, or an optimizer without an argument that a run needs.

    Example:
        >>> register_optimizer("momentum", torch.optim.SGD)
        >>> optimizer_options("momentum")["momentum"]
        0
    """
    entry = optimizer if isinstance(optimizer, NamedOptimizer) else NamedOptimizer(optimizer)
    if name == ENGINE:
        raise ValueError(f"{name!r} is the training engine's own optimizer; choose another name.")
    arguments = entry.arguments()
    missing = [argument for argument in REQUIRED if argument not in arguments]
    if missing or (entry.own_rate and arguments["lr"] is inspect.Parameter.empty):
        what = f"takes no {' and no '.join(missing)}" if missing else "has no default for lr"
        raise ValueError(
            f"The optimizer {name!r} {what}. A run makes it as make(params, lr=..., weight_decay=...) and takes the "
            "default of lr as its learning rate, or AdamW's with NamedOptimizer(..., own_rate=False)."
        )
    _REGISTERED[name] = entry


def find_optimizer(name: str) -> NamedOptimizer:
    """The registered optimizer of a name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in _REGISTERED:
        raise ValueError(
            f"Unknown optimizer {name!r}. Choose one of: {', '.join(optimizer_names())}. One of another package is "
            "known once that package has called nestlearn.train.register_optimizer; the command line imports the "
            "packages that have an entry point in the group nestlearn.plugins."
        )
    return _REGISTERED[name]


def optimizer_names() -> list[str]:
    """The names that `TrainConfig.optimizer` takes."""
    return [ENGINE, *_REGISTERED]


def optimizer_options(name: str) -> dict[str, Any]:
    """The options of an optimizer with their defaults: numbers, words, truth values and tuples of them.

    Example:
        >>> optimizer_options("m3")["slow_period"], optimizer_options("adamw")
        (10, {})
    """
    if name == ENGINE:
        return {}
    entry = find_optimizer(name)
    arguments = entry.arguments()
    set_otherwise = {"lr", "weight_decay", *entry.fixed, *entry.unused}
    own = {key: x for key, x in arguments.items() if isinstance(x, PLAIN) and key not in set_otherwise}
    return {**({"adamw_lr": None} if "adamw" in arguments else {}), **own, **entry.defaults}


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown optimizer or option; the message names the known ones."""
    known = optimizer_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown and name == ENGINE:
        raise ValueError(
            f"{name} has no option {unknown[0]!r}: it is set by --learning-rate, --weight-decay, --beta1 and --beta2."
        )
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}. Its options: {', '.join(sorted(known)) or 'none'}.")


def own_learning_rate(name: str) -> float | None:
    """The default rate of an optimizer whose steps are of another size than AdamW's; None for the others."""
    entry = _REGISTERED.get(name)
    return float(entry.arguments()["lr"]) if entry is not None and entry.own_rate else None


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    adamw_lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    options: Mapping[str, Any],
) -> Optimizer:
    """An optimizer for all trainable parameters of a model, by name.

    Args:
        name: one of `optimizer_names`, but not the engine's own.
        model: on its device; with FSDP2 after `fully_shard`.
        lr: peak rate; of an optimizer with an argument ``adamw``, that of the matrices.
        adamw_lr: peak rate of what such an optimizer leaves to AdamW (embeddings, head, vectors and scalars), unless
            the options have another one.
        weight_decay: of all parameters but vectors and scalars.
        betas: of AdamW.
        options: the optimizer's other settings, by name.

    Raises:
        ValueError: an unknown name or option, or a value out of range.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> optimizer = build_optimizer("m3", layer, lr=1e-3, adamw_lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95),
        ...                             options={"slow_period": 5})
        >>> [(group["rule"], group["slow_period"]) for group in optimizer.param_groups]
        [('matrix', 5), ('adamw', 5)]
    """
    check_optimizer(name, options)
    entry = find_optimizer(name)
    arguments = entry.arguments()
    settings: dict[str, Any] = {**entry.defaults, **options}
    settings = {key: tuple(x) if isinstance(x, list) else x for key, x in settings.items()}
    rest = settings.pop("adamw_lr", None)
    adamw_lr = lr if "adamw" not in arguments else adamw_lr if rest is None else float(rest)
    # `adamw_lr` as an argument: of matrices that the rule leaves to AdamW.
    offered = {"model": model, "adamw_lr": adamw_lr, "adamw": {"adamw_betas": betas}}
    settings |= {key: value for key, value in offered.items() if key in arguments}
    groups = param_groups(model, lr=lr, adamw_lr=adamw_lr)
    try:
        return entry.make(groups, lr=lr, weight_decay=weight_decay, **entry.fixed, **settings)
    except TypeError as error:
        raise ValueError(f"{name} does not take these options, {dict(options)}: {error}.") from error
