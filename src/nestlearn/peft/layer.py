"""A feed-forward network with the levels of one or more adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from nestlearn.memory.architectures import Linear
from nestlearn.models.stacking import MapNames
from nestlearn.models.stacking.families import map_shape, squares_by_unit
from nestlearn.nn import Level
from nestlearn.nn.cms.network import low_rank_linear, low_rank_start
from nestlearn.nn.ffn import feed_forward

from .config import ContinuumConfig


class AdapterLevel(nn.Module):
    """The initial weights of one level: a network, or with ``Level.rank`` the parts A and B of changes of maps.

    Args:
        level: its `nestlearn.nn.Level`.
        units: its hidden units; in mode ``split`` a part of those of the pretrained network.
        width: of input and output.
        gated: whether the network has a gate.
        like: a tensor with the dtype and device of the parameters.

    Example:
        >>> from nestlearn.nn import Level
        >>> level = AdapterLevel(Level(period=8, rank=2), range(0, 6), 4, gated=False, like=torch.zeros(1))
        >>> {name: tuple(w.shape) for name, w in level.named_parameters()}
        {'up_A': (2, 4), 'up_B': (6, 2), 'down_A': (2, 6), 'down_B': (4, 2)}
    """

    def __init__(self, level: Level, units: range, width: int, gated: bool, like: Tensor) -> None:
        super().__init__()
        self.level, self.units = level, units
        shapes = level.architecture(len(units), "swiglu" if gated else "gelu").shapes(width, width)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device)))

    @torch.no_grad()
    def start(self, base: nn.Module, names: MapNames) -> None:
        """Initial values: outputs and changes are 0; the first maps are as large as those of the pretrained network."""
        for name, parameter in self.named_parameters():
            if self.level.rank is not None:
                parameter.copy_(low_rank_start(name, tuple(parameter.shape)))
            elif name == "down":
                parameter.zero_()
            else:
                part = getattr(base, names.maps()[name])
                shape = map_shape(part, name)
                squares = squares_by_unit(part, shape, False, parameter.device).mean() / shape[1]
                parameter.copy_(torch.randn(parameter.shape, dtype=squares.dtype).to(parameter.device) * squares.sqrt())

    def linear(self) -> Linear:
        """The maps of the network, or the changes ``x -> B A x``, in the dtype of their input."""
        own = dict(self.named_parameters())

        def plain(name: str, u: Tensor) -> Tensor:
            return F.linear(u, own[name].to(u.dtype))

        return plain if self.level.rank is None else low_rank_linear(plain)

    def change(self, name: str) -> Float[Tensor, "out in"]:
        """``B A`` of a map, on the level's own hidden units."""
        own = dict(self.named_parameters())
        return own[f"{name}_B"] @ own[f"{name}_A"]


class ContinuumLayer(nn.Module, BaseTunerLayer):
    """A feed-forward network in the place of which peft puts this module; see `ContinuumConfig` for what it computes.

    Args:
        base_layer: the pretrained network.
        names: of its maps.
        adapter_name: of the first adapter.
    """

    adapter_layer_names = ("continuum_levels",)

    def __init__(self, base_layer: nn.Module, names: MapNames, adapter_name: str) -> None:
        super().__init__()
        self.base_layer, self.names = base_layer, names
        self.continuum_levels = nn.ModuleDict({})
        self._disable_adapters, self.merged_adapters, self._active_adapter = False, [], adapter_name

    def update_layer(self, adapter_name: str, config: ContinuumConfig) -> None:
        """Add the levels of an adapter."""
        plan = config.plan(self.names)
        hidden, width = self._shape("up")
        gated = self.names.gate is not None
        if plan.mode == "split":
            units = plan.units(hidden)
        else:
            units = [range(level.units(width, "swiglu" if gated else "gelu")) for level in plan.levels]
        like = next((p for p in self.base_layer.parameters() if p.is_floating_point()), torch.empty(0))
        levels = [AdapterLevel(*pair, width, gated, like) for pair in zip(plan.levels, units, strict=True)]
        for level in levels:
            level.start(self.base_layer, self.names)
        self.continuum_levels[adapter_name] = nn.ModuleList(levels)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def levels(self, adapter_name: str) -> list[AdapterLevel]:
        """The levels of an adapter, fastest first; none if it leaves out this network."""
        if adapter_name not in self.continuum_levels:
            return []
        return list(cast(Sequence[AdapterLevel], self.continuum_levels[adapter_name]))

    def forward(self, x: Float[Tensor, "b t d"], *args: Any, **kwargs: Any) -> Float[Tensor, "b t d"]:
        """The pretrained network with the levels of all active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        idle = self.disable_adapters or self.merged
        active = [] if idle else [level for name in self.active_adapters for level in self.levels(name)]
        inside = [level for level in active if level.level.rank is not None]
        beside = [level for level in active if level.level.rank is None]
        act, gated = getattr(self.base_layer, self.names.act), self.names.gate is not None
        if inside:
            y = feed_forward(self._changed(inside), act, x, gated)
            for child in self.base_layer.children():
                y = child(y) if isinstance(child, nn.Dropout) else y
        else:
            y = self.base_layer(x, *args, **kwargs)
        for level in beside:
            y = y + feed_forward(level.linear(), act, x, gated)
        return y

    def _changed(self, levels: Sequence[AdapterLevel]) -> Linear:
        """The pretrained maps with the changes of levels, each on its own hidden units."""
        hidden = self._shape("up")[0]
        changes = [(level.units, level.linear()) for level in levels]

        def linear(name: str, u: Tensor) -> Tensor:
            z = self._map(name)(u)
            for units, change in changes:
                if name == "down":
                    z = z + change(name, u[..., units.start : units.stop])
                else:
                    z = z + F.pad(change(name, u), (units.start, hidden - units.stop))
            return z

        return linear

    def _map(self, name: str) -> nn.Module:
        return getattr(self.base_layer, self.names.maps()[name])

    def _shape(self, name: str) -> tuple[int, int]:
        return map_shape(self._map(name), name)

    # -- merging ------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the changes of levels inside the network to its weights.

        Args:
            safe_merge: refuse weights that would not be finite, before anything changes.
            adapter_names: None: the active ones.

        Raises:
            ValueError: levels beside the network, maps that are not plain matrices, or weights that are not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            changes = self._changes(adapter)
            if safe_merge and not all(bool((w + d).isfinite().all()) for w, d in changes):
                raise ValueError(f"the adapter {adapter!r} has weights that are not finite; it was not merged.")
            self._add(changes, 1)
            if changes:
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take the changes of merged adapters off the weights again."""
        while self.merged_adapters:
            self._add(self._changes(self.merged_adapters.pop()), -1)

    @torch.no_grad()
    def _add(self, changes: list[tuple[Tensor, Tensor]], sign: int) -> None:
        for weight, change in changes:
            weight.add_(change.to(weight), alpha=sign)

    @torch.no_grad()
    def _changes(self, adapter: str) -> list[tuple[Tensor, Tensor]]:
        """The part of a weight that each level changes, and the change."""
        found = []
        for level in self.levels(adapter):
            if level.level.rank is None:
                raise ValueError(
                    f"the adapter {adapter!r} cannot be merged: its levels are networks of their own beside the "
                    "feed-forward network (mode='add'), with an activation between their maps, so that no weights of "
                    "that network compute the sum. Use it unmerged, give it to nestlearn.peft.stack_adapter(model), or "
                    "train with mode='split', whose levels are changes of the maps themselves."
                )
            for name in self.names.maps():
                weight = _plain_weight(self._map(name), name)
                rows = slice(level.units.start, level.units.stop)
                found.append((weight[:, rows] if name == "down" else weight[rows], level.change(name)))
        return found


def _plain_weight(part: nn.Module, name: str) -> Float[Tensor, "out in"]:
    """The matrix of a map, to be changed in place."""
    weight: Any = getattr(part, "weight", None)
    if type(part) not in (nn.Linear, Conv1D) or not weight.is_floating_point() or type(weight) is not nn.Parameter:
        raise ValueError(
            f"the map {name!r} is a {type(part).__name__} without a plain matrix of weights (quantized, or inside of "
            "another adapter): nothing can be merged into it. Load the base model unquantized and without other "
            "adapters to merge."
        )
    return weight.mT if isinstance(part, Conv1D) else weight
