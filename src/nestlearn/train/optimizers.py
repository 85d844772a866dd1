"""The optimizers of a training run, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nestlearn import optim
from nestlearn.optim import param_groups

ENGINE = "adamw"
"""The training engine's own AdamW: what a run without `optimizer` gets."""

PLAIN = (bool, int, float, str, tuple)


@dataclass(frozen=True)
class Recipe:
    """An optimizer of `nestlearn.optim` that a run can be given.

    Attributes:
        symbol: its name there.
        fixed: settings that make it what its name says.
        defaults: settings that train networks where the class has other ones.
        unused: settings that then do nothing.
        own_rate: it has a learning rate of its own; otherwise its steps are as large as AdamW's, and so is its rate.
    """

    symbol: str
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    unused: tuple[str, ...] = ()
    own_rate: bool = False


# Muon is M3 without slow memory and second moment (a test compares it with torch's, which takes nothing but 2-D
# weights): stacks of matrices, kernels and AdamW for the rest are in one object with one state.
RECIPES: dict[str, Recipe] = {
    "m3": Recipe("M3"),
    "muon": Recipe("M3", {"alpha": 0.0, "second_moment": False, "accumulate": "ema"}, unused=("slow_period", "eps")),
    # As printed (erase 1) the step also pulls every answer to zero, and a network stops learning there (decision 44).
    "dgd": Recipe("DGD", defaults={"erase": 0.0}, own_rate=True),
    "delta-momentum": Recipe("DeltaMomentum", own_rate=True),
    "deep-momentum": Recipe("DeepMomentum", own_rate=True),
}


def optimizer_names() -> list[str]:
    """The names that `TrainConfig.optimizer` takes."""
    return [ENGINE, *(name for name, recipe in RECIPES.items() if hasattr(optim, recipe.symbol))]


def optimizer_options(name: str) -> dict[str, Any]:
    """The options of an optimizer with their defaults: numbers, words, truth values and tuples of them.

    Example:
        >>> optimizer_options("m3")["slow_period"], optimizer_options("adamw")
        (10, {})
    """
    if name == ENGINE:
        return {}
    recipe = RECIPES[name]
    given = {key: x for key, x in _arguments(recipe.symbol).items() if isinstance(x, PLAIN)}
    taken = {"lr", "weight_decay", *recipe.fixed, *recipe.unused}
    options = {key: default for key, default in given.items() if key not in taken}
    return {"adamw_lr": None, **options, **recipe.defaults}


def _arguments(symbol: str) -> dict[str, Any]:
    """Arguments of a class and, where it passes others on, of the classes it is made of, with their defaults."""
    found: dict[str, Any] = {}
    for kind in inspect.getmro(getattr(optim, symbol)):
        parameters = inspect.signature(kind.__init__).parameters.values()
        found = {x.name: x.default for x in parameters if x.kind is not x.VAR_KEYWORD} | found
        if not any(x.kind is x.VAR_KEYWORD for x in parameters):
            return found
    return found


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown optimizer or option, naming those that there are."""
    if name not in optimizer_names():
        raise ValueError(f"Unknown optimizer {name!r}. Choose one of: {', '.join(optimizer_names())}.")
    known = optimizer_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown and not known:
        raise ValueError(
            f"{name} has no option {unknown[0]!r}: it is set by --learning-rate, --weight-decay, --beta1 and --beta2."
        )
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}. Its options: {', '.join(sorted(known))}.")


def own_learning_rate(name: str) -> float | None:
    """The default rate of an optimizer whose steps are of another size than AdamW's, None for the rest."""
    recipe = RECIPES.get(name)
    return float(_arguments(recipe.symbol)["lr"]) if recipe and recipe.own_rate else None


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
        name: one of `optimizer_names` but for the engine's own.
        model: on its device, in parts if it is to be (FSDP2).
        lr: peak rate of the matrices.
        adamw_lr: peak rate of embeddings, head, vectors and scalars, unless it is among the options.
        weight_decay: of all but vectors and scalars.
        betas: of AdamW.
        options: others, by name.

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
    recipe = RECIPES[name]
    settings: dict[str, Any] = {**recipe.defaults, **options}
    settings = {key: tuple(x) if isinstance(x, list) else x for key, x in settings.items()}
    rest = settings.pop("adamw_lr", None)
    adamw_lr = adamw_lr if rest is None else float(rest)
    groups = param_groups(model, lr=lr, adamw_lr=adamw_lr)
    if "model" in _arguments(recipe.symbol):
        settings["model"] = model
    if "adamw_lr" in _arguments(recipe.symbol):
        settings["adamw_lr"] = adamw_lr  # of matrices that its rule leaves to AdamW
    make = getattr(optim, recipe.symbol)
    try:
        return make(groups, lr=lr, weight_decay=weight_decay, adamw={"adamw_betas": betas}, **recipe.fixed, **settings)
    except TypeError as error:
        raise ValueError(f"{name} does not take these options, {dict(options)}: {error}.") from error
