"""Where the feed-forward networks of a pretrained model are, and how they name their linear maps."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nestlearn.nn.ffn import feed_forward

MlpFilter = str | Mapping[str, str] | Callable[[str, nn.Module], bool] | None
"""What the caller may say about the MLPs of a model; see `find_networks`."""

_HOW = (
    "Name them by the argument `mlp`: a pattern of module paths such as mlp='model.layers.*.mlp' if the modules have "
    "maps of known names, otherwise a mapping such as "
    "mlp={'path': 'model.layers.*.mlp', 'up': 'fc1', 'down': 'fc2', 'act': 'activation_fn'} (and 'gate', where "
    "act(gate x) multiplies up x). Make a family known for good by nestlearn.models.stacking.register_family("
    "MapNames(up='fc1', down='fc2', act='activation_fn'), PhiConfig)."
)


@dataclass(frozen=True)
class MapNames:
    """Attributes of an MLP module that computes ``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gate."""

    up: str
    down: str
    gate: str | None = None
    act: str = "act"

    def maps(self) -> dict[str, str]:
        """``{map: attribute}`` in the order in which they are applied."""
        gate = {} if self.gate is None else {"gate": self.gate}
        return {**gate, "up": self.up, "down": self.down}


_KNOWN_NAMES = [
    MapNames("up_proj", "down_proj", "gate_proj", "act_fn"),  # Llama, Qwen, Mistral, Gemma
    MapNames("c_fc", "c_proj", None, "act"),  # GPT-2
    MapNames("dense_h_to_4h", "dense_4h_to_h", None, "act"),  # GPT-NeoX
]
"""Names by which MLPs are found; `add_names` appends to them."""


def add_names(names: MapNames) -> None:
    """Let `find_networks` find MLPs whose maps have these names."""
    if names not in _KNOWN_NAMES:
        _KNOWN_NAMES.append(names)


@dataclass(frozen=True)
class FoundNetwork:
    """An MLP of a model: its path, the module, and the names of its maps."""

    path: str
    module: nn.Module
    names: MapNames


def find_networks(model: nn.Module, mlp: MlpFilter = None) -> list[FoundNetwork]:
    """The MLPs of a model in the order of its layers.

    Args:
        model: any module.
        mlp: None finds modules with maps of known names (Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX and models built
            like them) directly inside the layers of a `ModuleList`; a string is a pattern of module paths; a function
            of (path, module) chooses; a mapping has the pattern as ``path`` and names ``up``, ``down``, ``act`` and,
            for gated networks, ``gate``.

    Raises:
        ValueError: nothing is found, or what was found is not such a network.
    """
    given = _given_names(mlp)
    found = []
    for path, module in model.named_modules():
        if not _wanted(path, module, mlp):
            continue
        names = given if given is not None else _known_names(module)
        if names is not None:
            _check_parts(path, module, names)
            found.append(FoundNetwork(path, module, names))
        elif mlp is not None:
            children = ", ".join(name for name, _ in module.named_children()) or "no submodules"
            raise ValueError(f"{path} ({type(module).__name__}) has {children}, no maps of known names. {_HOW}")
    if not found:
        asked = "no module with maps of known names" if mlp is None else f"no module that mlp={mlp!r} names"
        raise ValueError(f"{type(model).__name__} has {asked}: its MLPs cannot become levels. {_HOW}")
    return found


def _given_names(mlp: MlpFilter) -> MapNames | None:
    if not isinstance(mlp, Mapping):
        return None
    unknown, missing = set(mlp) - {"path", "up", "down", "gate", "act"}, {"path", "up", "down"} - set(mlp)
    if unknown or missing:
        raise ValueError(f"mlp={dict(mlp)!r} lacks {sorted(missing)} and has unknown keys {sorted(unknown)}. {_HOW}")
    return MapNames(mlp["up"], mlp["down"], mlp.get("gate"), mlp.get("act", "act"))


def _wanted(path: str, module: nn.Module, mlp: MlpFilter) -> bool:
    if mlp is None:
        # The MLP of a layer, not an expert below it, which sees tokens without their rows.
        parent = path.split(".")[-2:-1]
        return bool(parent) and parent[0].isdigit() and _known_names(module) is not None
    if callable(mlp):
        return bool(mlp(path, module))
    return fnmatch.fnmatchcase(path, mlp if isinstance(mlp, str) else mlp["path"])


def _known_names(module: nn.Module) -> MapNames | None:
    for names in _KNOWN_NAMES:
        if all(hasattr(module, attribute) for attribute in (*names.maps().values(), names.act)):
            return names
    return None


def _check_parts(path: str, module: nn.Module, names: MapNames) -> None:
    for attribute in names.maps().values():
        part = getattr(module, attribute, None)
        if not isinstance(part, nn.Linear | Conv1D):
            raise ValueError(
                f"{path}.{attribute} is a {type(part).__name__}; levels are made of nn.Linear or Conv1D maps. "
                "A quantized map must be dequantized (model.dequantize(), or load without quantization_config); an "
                f"adapter must be put on after stacking. {_HOW}"
            )
        if not part.weight.is_floating_point():
            raise ValueError(
                f"{path}.{attribute}.weight is {part.weight.dtype}: quantized weights cannot learn. Call "
                "model.dequantize() first, or load the model without quantization_config."
            )
    if not callable(getattr(module, names.act, None)):
        raise ValueError(f"{path}.{names.act} is no activation. {_HOW}")


def check_not_shared(model: nn.Module, found: list[FoundNetwork]) -> None:
    """Raise ValueError if a weight of the networks is used at a second place: one level would write into two."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    own = {f"{network.path}.{name}" for network in found for name, _ in network.module.named_parameters()}
    for names in places.values():
        if len(names) > 1 and own & set(names):
            raise ValueError(
                f"{' and '.join(names)} are one tied parameter; levels need weights of their own. Untie them first "
                "(give one module a copy of the parameter), or leave the layer out by `layers`."
            )


@torch.no_grad()
def check_formula(network: FoundNetwork) -> None:
    """Raise ValueError unless the module computes what its maps say (skipped for weights without data)."""
    maps = maps_of(network.module, network.names)
    first = maps["up"].weight
    if first.is_meta:
        return
    x = torch.linspace(-1, 1, 2 * first.shape[1], device=first.device, dtype=first.dtype).view(1, 2, -1)
    training = network.module.training
    network.module.eval()
    expected, got = network.module(x), None
    network.module.train(training)
    if isinstance(expected, Tensor) and expected.shape == x.shape:
        got = feed_forward(lambda name, u: maps[name](u), getattr(network.module, network.names.act), x, "gate" in maps)
    tolerance = 100 * torch.finfo(first.dtype).eps * float(expected.abs().max()) if got is not None else 0.0
    if got is None or float((got - expected).abs().max()) > tolerance:
        formula = "down(act(gate x) * up x)" if "gate" in maps else "down(act(up x))"
        raise ValueError(
            f"{network.path} ({type(network.module).__name__}) does not compute {formula} with {network.names}: "
            f"such a module cannot become levels. {_HOW}"
        )


class LinearMap:
    """The weight ``[out, in]`` and the bias of an `nn.Linear` or a `Conv1D` (whose weight is stored transposed)."""

    def __init__(self, part: nn.Module) -> None:
        if not isinstance(part, nn.Linear | Conv1D):
            raise ValueError(
                f"a map of a stacked MLP has become a {type(part).__name__}. Put adapters on other modules (attention, "
                "for example) or stack with mode='add', and stack before quantizing."
            )
        self.weight = cast(Tensor, part.weight).mT if isinstance(part, Conv1D) else part.weight
        self.bias = cast("Tensor | None", part.bias)

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight.mT
        return y if self.bias is None else y + self.bias


def maps_of(module: nn.Module, names: MapNames) -> dict[str, LinearMap]:
    """``{"gate", "up", "down"}`` of an MLP module."""
    return {name: LinearMap(getattr(module, attribute)) for name, attribute in names.maps().items()}
