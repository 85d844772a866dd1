"""The MLP module of a stacked model: the pretrained network, and the levels that learn in its place or beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nestlearn.memory import AssociativeMemory
from nestlearn.memory.types import Weights
from nestlearn.nn.cms.level import MapShapes, level_memory
from nestlearn.nn.cms.network import low_rank_shapes
from nestlearn.nn.cms.tape import Tape
from nestlearn.nn.ffn import feed_forward

from .families import maps_of
from .plan import StackPlan
from .state import active_levels


class LevelWeights(nn.Module):
    """Parameters of a level beside the pretrained ones: whole maps (``add``, ``copy``), and the A of ``W_0 + B A``.

    B starts at zero and is no parameter.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], like: Tensor) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device)))

    def of(self, name: str) -> Tensor:
        return cast(Tensor, self.get_parameter(name))


class StackedMLP(nn.Module):
    r"""What `stack_levels` adds to the class of an MLP; its parameters keep their names.

    With M the pretrained network, M_l the network of level l at its weights of the last period's end (NL Eq. 71):

    - ``add``:   ``y = M(x) + sum_l M_l(x)``, the down map of every M_l starting at zero;
    - ``split``: ``y = sum_l M_l(x)``, M_l the hidden units of level l; hidden units of no level stay as they are;
    - ``copy``:  ``y = mean_l M_l(x)``, every M_l starting as M.

    Biases belong to M and do not change. Which fast weights are read, and whether errors are recorded, is the
    business of the `nestlearn.models.stacking.reading` around the call; without one, levels are at their initial
    weights.
    """

    unstacked_class: ClassVar[type[nn.Module]]
    stack_plan: StackPlan
    stack_path: str
    levels: nn.ModuleList

    def install(self, plan: StackPlan, path: str) -> None:
        """Add the levels' own parameters, uninitialized."""
        self.stack_plan, self.stack_path = plan, path
        maps = maps_of(self, plan.names)
        hidden, width = maps["up"].weight.shape
        own = [self._own_shapes(i, units, width) for i, units in enumerate(self._hidden_units(hidden, width))]
        self.levels = nn.ModuleList(LevelWeights(shapes, maps["up"].weight) for shapes in own)

    def remove(self) -> None:
        """Undo `install`."""
        del self.levels, self.stack_plan, self.stack_path

    @torch.no_grad()
    def start_levels(self) -> None:
        """Initial values of the levels' own parameters: the pretrained network, or networks that give zero.

        Parameters that `from_pretrained` has loaded are kept.
        """
        maps = maps_of(self, self.stack_plan.names)
        for own in self.levels:
            for name, parameter in own.named_parameters():
                if getattr(parameter, "_is_hf_initialized", False):
                    continue
                if name not in maps:  # A of a map of low rank
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
                elif self.stack_plan.mode == "copy":
                    parameter.copy_(maps[name].weight)
                elif name == "down":
                    parameter.zero_()
                else:
                    parameter.normal_(0, float(maps[name].weight.float().square().mean().sqrt()))

    def _hidden_units(self, hidden: int, width: int) -> list[int]:
        """Hidden units of every level."""
        plan = self.stack_plan
        if plan.mode == "split":
            return [len(units) for units in plan.units(hidden)]
        if plan.mode == "copy":
            return [hidden] * len(plan.levels)
        return [level.units(width, "gelu" if plan.names.gate is None else "swiglu") for level in plan.levels]

    def _own_shapes(self, index: int, units: int, width: int) -> dict[str, tuple[int, int]]:
        """Parameters of a level beside the pretrained ones."""
        up, level = (units, width), self.stack_plan.levels[index]
        full = {**({} if self.stack_plan.names.gate is None else {"gate": up}), "up": up, "down": (width, units)}
        whole = self.stack_plan.mode == "add" or (self.stack_plan.mode == "copy" and index > 0)
        low = {} if level.rank is None else low_rank_shapes(full, level.rank)
        return {**(full if whole else {}), **{name: shape for name, shape in low.items() if name.endswith("_A")}}

    # -- levels -------------------------------------------------------------------------------------------------

    def dense(self, index: int) -> Weights:
        """``{map: [out, in]}``: the initial network of a level, in ``split`` views of the pretrained weights."""
        own = self.levels[index]
        if "up" in dict(own.named_parameters()):
            # Adapters may stand on the pretrained maps, which this level does not use.
            return {name: cast(LevelWeights, own).of(name) for name in self.stack_plan.names.maps()}
        maps = maps_of(self, self.stack_plan.names)
        if self.stack_plan.mode == "copy":
            return {name: part.weight for name, part in maps.items()}
        return self._slice({name: part.weight for name, part in maps.items()}, self._units(index))

    def _units(self, index: int) -> range:
        return self.stack_plan.units(maps_of(self, self.stack_plan.names)["up"].weight.shape[0])[index]

    @staticmethod
    def _slice(weights: Weights, units: range) -> Weights:
        part = slice(units.start, units.stop)
        return {name: w[:, part] if name == "down" else w[part] for name, w in weights.items()}

    def initial(self, index: int) -> Weights:
        """``{map: [out, in]}`` that a level learns from: its dense maps, or A and B = 0 of each."""
        dense, rank = self.dense(index), self.stack_plan.levels[index].rank
        if rank is None:
            return dense
        own = cast(LevelWeights, self.levels[index])
        shapes = low_rank_shapes({name: (w.shape[0], w.shape[1]) for name, w in dense.items()}, rank)
        zero = next(iter(dense.values()))
        return {name: own.of(name) if name.endswith("_A") else zero.new_zeros(shape) for name, shape in shapes.items()}

    def memory(self, index: int) -> AssociativeMemory:
        """The memory that a level is: its rule, retention and clock over its maps."""
        return level_memory(
            self.stack_plan.levels[index],
            MapShapes.of({n: (w.shape[0], w.shape[1]) for n, w in self.initial(index).items()}),
        )

    @torch.no_grad()
    def weight_norm(self, index: int) -> Float[Tensor, ""]:
        """Frobenius norm of a level's initial network; a map that starts at zero counts as its pretrained twin."""
        names, parts = self.stack_plan.names.maps(), []
        for name, w in self.dense(index).items():
            square = w.double().square().sum()
            if self.stack_plan.mode == "add" and name == "down":
                square = getattr(self, names[name]).weight.double().square().mean() * w.numel()
            parts.append(square)
        return torch.stack(parts).sum().sqrt()

    # -- reading ------------------------------------------------------------------------------------------------

    def forward(self, x: Float[Tensor, "b t d"], *args: Any, **kwargs: Any) -> Float[Tensor, "b t d"]:
        """The class's own forward, with levels."""
        plan, now = self.stack_plan, active_levels(self.stack_plan)
        state, tape = (None, None) if now is None else (now.state, now.tape)
        fast = None if state is None else state.networks.get(self.stack_path)
        if plan.mode == "add":
            y = super().forward(x, *args, **kwargs)
            return y + self._levels(x, fast, tape).to(y.dtype)
        if plan.mode == "split" and fast is None and tape is None:
            return super().forward(x, *args, **kwargs)
        y = self._levels(x, fast, tape)
        if plan.mode == "copy":
            y = y / len(plan.levels)
        else:
            y = self._add_frozen_units(x, y)
        bias = maps_of(self, plan.names)["down"].bias
        y = (y if bias is None else y + bias).to(x.dtype)
        for child in self.children():
            y = child(y) if isinstance(child, nn.Dropout) else y
        return y

    def _levels(self, x: Tensor, fast: Any, tape: Tape | None) -> Tensor:
        total = None
        for index, level in enumerate(self.stack_plan.levels):
            held = None if fast is None or fast[index] is None else fast[index].weights.anchor
            y = self._level(index, x, held, tape if level.period is not None else None)
            total = y if total is None else total + y
        assert total is not None
        return total

    def _level(self, index: int, x: Tensor, fast: Weights | None, tape: Tape | None) -> Tensor:
        """The network of one level at fast weights ``[rows, out, in]`` (None: initial)."""
        dense, key = self.dense(index), (self.stack_path, index)
        low_rank = self.stack_plan.levels[index].rank is not None
        biases = self._hidden_biases(index)
        if fast is not None:
            fast = {name: for_rows(w, x.shape[0]) for name, w in fast.items()}
        elif low_rank and tape is not None:
            fast = {name: w.unsqueeze(0) for name, w in self.initial(index).items()}

        def fast_map(name: str, u: Tensor, w: Tensor) -> Tensor:
            u = u.to(torch.promote_types(u.dtype, w.dtype))
            z = u @ w.to(u.dtype).mT
            return z if tape is None else tape.record(key, name, u, z)

        def linear(name: str, u: Tensor) -> Tensor:
            if not low_rank:
                z = fast_map(name, u, dense[name] if fast is None else fast[name])
            else:
                z = u @ dense[name].to(u.dtype).mT
                if fast is not None:
                    z = z + fast_map(f"{name}_B", fast_map(f"{name}_A", u, fast[f"{name}_A"]), fast[f"{name}_B"])
            return z if name not in biases else z + biases[name]

        return feed_forward(linear, self._act(), x, "gate" in dense)

    def _hidden_biases(self, index: int) -> Weights:
        """Biases of the hidden units; the networks of ``add`` have none."""
        plan = self.stack_plan
        if plan.mode == "add":
            return {}
        maps = maps_of(self, plan.names)
        found = {name: part.bias for name, part in maps.items() if name != "down" and part.bias is not None}
        if plan.mode == "copy" or not found:
            return found
        return self._slice(found, self._units(index))

    def _add_frozen_units(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` plus what the hidden units of no level give."""
        maps = maps_of(self, self.stack_plan.names)
        hidden = maps["up"].weight.shape[0]
        rest = range(self.stack_plan.units(hidden)[-1].stop, hidden)
        if not rest:
            return y
        weights = self._slice({name: part.weight for name, part in maps.items()}, rest)
        biases = {n: p.bias[rest.start :] for n, p in maps.items() if n != "down" and p.bias is not None}

        def linear(name: str, u: Tensor) -> Tensor:
            z = u @ weights[name].mT
            return z if name not in biases else z + biases[name]

        return y + feed_forward(linear, self._act(), x, "gate" in maps)

    def _act(self) -> Callable[[Tensor], Tensor]:
        return getattr(self, self.stack_plan.names.act)


def for_rows(w: Float[Tensor, "r out in"], batch: int) -> Float[Tensor, "b out in"]:
    """Weights of ``r`` rows for a batch: one row serves all, several may each stand for as many beams or samples.

    Raises:
        ValueError: the batch is no multiple of the rows.
    """
    rows = w.shape[0]
    if rows in (1, batch):
        return w
    if batch % rows:
        raise ValueError(
            f"the level state holds {rows} rows, the input has {batch}. Use a state of one row for all, of one row for "
            "each, or of one row for each prompt that several sequences are generated from."
        )
    return w.repeat_interleave(batch // rows, 0)


@functools.cache
def stacked_mlp_class(base: type[nn.Module]) -> type[StackedMLP]:
    """The class of a stacked MLP over the class of a pretrained one."""
    return cast(
        type[StackedMLP],
        type(f"Stacked{base.__name__}", (StackedMLP, base), {"unstacked_class": base, "__module__": __name__}),
    )
