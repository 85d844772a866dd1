"""Where the feed-forward networks of a pretrained model are, and how they name their linear maps."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from nestlearn.nn.ffn import feed_forward

MlpFilter = str | Mapping[str, str] | Callable[[str, nn.Module], bool] | None
"""The caller's choice of MLPs; see `find_networks`."""

_HOW = (
    "Name them by the argument `mlp`: a pattern of module paths such as mlp='model.layers.*.mlp' if the modules have "
    "maps of known names, otherwise a mapping such as "
    "mlp={'path': 'model.layers.*.mlp', 'up': 'fc1', 'down': 'fc2', 'act': 'activation_fn'} (and 'gate', where "
    "act(gate x) multiplies up x). Register a family for good by nestlearn.models.stacking.register_family("
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


FAMILIES: dict[MapNames, dict[str, str]] = {
    MapNames("up_proj", "down_proj", "gate_proj", "act_fn"): {
        "llama": "LlamaConfig",
        "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config",
        "mistral": "MistralConfig",
        "gemma": "GemmaConfig",
        "gemma2": "Gemma2Config",
        "gemma3": "Gemma3TextConfig",
    },
    MapNames("c_fc", "c_proj"): {"gpt2": "GPT2Config"},
    MapNames("dense_h_to_4h", "dense_4h_to_h"): {"gpt_neox": "GPTNeoXConfig"},
}
"""Families of models by the names of their maps: ``{module of transformers: configuration}``.

`nestlearn.models.stacking.register_family` adds to it.
"""


def find_networks(model: nn.Module, mlp: MlpFilter = None) -> dict[str, MapNames]:
    """The MLPs of a model by path, in the order of its layers, with the names of their maps.

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
    found: dict[str, MapNames] = {}
    for path, module in model.named_modules():
        if not _wanted(path, module, mlp):
            continue
        names = given if given is not None else _known_names(module)
        if names is not None:
            _check_parts(path, module, names)
            found[path] = names
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
    for names in FAMILIES:
        if all(hasattr(module, attribute) for attribute in (*names.maps().values(), names.act)):
            return names
    return None


def _check_parts(path: str, module: nn.Module, names: MapNames) -> None:
    for attribute in names.maps().values():
        map_shape(getattr(module, attribute, None), f"{path}.{attribute}")
    if not callable(getattr(module, names.act, None)):
        raise ValueError(f"{path}.{names.act} is no activation. {_HOW}")


def map_shape(part: Any, path: str) -> tuple[int, int]:
    """``(out, in)`` of a linear map: an nn.Linear, a Conv1D, or a module that wraps or replaces one.

    Raises:
        ValueError: the module has no attributes with its sizes.
    """
    inner = getattr(part, "base_layer", part)  # adapters of PEFT
    for out, width in (("out_features", "in_features"), ("nf", "nx")):
        found = getattr(inner, out, None), getattr(inner, width, None)
        if isinstance(found[0], int) and isinstance(found[1], int):
            return found[0], found[1]
    raise ValueError(
        f"{path} is a {type(part).__name__}. A level changes a linear map: an nn.Linear, a Conv1D, or a module that "
        f"wraps or replaces one and has its in_features and out_features. {_HOW}"
    )


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight holds codes: whole numbers, or a tensor type that computes real ones from them (torchao).

    A weight that is divided over processes (DTensor) holds real numbers.

    Example:
        >>> is_quantized(torch.zeros(2, dtype=torch.int8)), is_quantized(torch.zeros(2))
        (True, False)
    """
    wrapped = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    return wrapped or not weight.is_floating_point()


@torch.no_grad()
def squares_by_unit(
    part: nn.Module, shape: tuple[int, int], down: bool, device: torch.device
) -> Float[Tensor, "hidden"]:
    """Sum of the squared weights of a linear map for each hidden unit: its output, or its input (``down``).

    A plain map is read. Any other (an adapter, a quantized or offloaded map) is called with unit vectors.
    """
    plain = type(part) in (nn.Linear, Conv1D) and "forward" not in vars(part)
    weight: Any = part.weight if plain else None
    plain = plain and not is_quantized(weight)
    if plain and not (weight.is_meta or part._forward_hooks or part._forward_pre_hooks):
        w = (weight.mT if isinstance(part, Conv1D) else weight).double()
        return w.square().sum(0 if down else 1)
    here = next((p for p in part.parameters() if p.is_floating_point()), torch.empty(0, device=device))
    place = {"dtype": here.dtype, "device": device if here.is_meta else here.device}
    bias, columns = part(torch.zeros(1, 1, shape[1], **place))[0], []
    for inputs in torch.arange(shape[1], device=place["device"]).split(1024):
        w = (part(F.one_hot(inputs, shape[1]).to(**place)[None])[0] - bias).double()
        columns.append(w.square().sum(1) if down else w.square().sum(0, keepdim=True))
    return torch.cat(columns).sum(0) if not down else torch.cat(columns)


def check_formula(module: nn.Module, path: str, names: MapNames, width: int) -> None:
    """Raise ValueError unless the module computes what its maps say (skipped for weights without data)."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    if like.is_meta:
        return
    training = module.training
    module.eval()
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.linspace(-1, 1, 2 * width, device=like.device, dtype=like.dtype).view(1, 2, -1).requires_grad_()
        expected, got = module(x), None
        if isinstance(expected, Tensor) and expected.shape == x.shape:
            maps = names.maps()
            act, gated = getattr(module, names.act), names.gate is not None
            got = feed_forward(lambda name, u: getattr(module, maps[name])(u), act, x, gated)
    module.train(training)
    bound = 100 * torch.finfo(like.dtype).eps
    if got is None or bool((got - expected).detach().abs().max() > bound * expected.detach().abs().max()):
        formula = "down(act(gate x) * up x)" if names.gate is not None else "down(act(up x))"
        raise ValueError(
            f"{path} ({type(module).__name__}) does not compute {formula} with {names}: such a module cannot become "
            f"levels. {_HOW}"
        )
    ones = torch.ones_like(expected)
    if not expected.requires_grad or torch.autograd.grad(expected, x, ones, allow_unused=True)[0] is None:
        raise ValueError(
            f"{path} passes no gradient to its input, so that the levels below it could not learn. Quantized maps must "
            "support training (bitsandbytes does). Load the model without quantization, or call model.dequantize()."
        )
