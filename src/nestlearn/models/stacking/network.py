"""The MLP of a stacked model: the pretrained network, the levels on it, and the fast weights that a call reads.

A level learns the *change* D of a linear map ``W_0``. The pretrained module is called for ``W_0 x``, and the level adds
``D x``. So everything that wraps or replaces that module (an adapter, a quantized weight, an offloading hook) works.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nestlearn.memory import AssociativeMemory, State
from nestlearn.memory.architectures import Linear
from nestlearn.memory.types import Weights
from nestlearn.nn.cms.level import Level, level_memory
from nestlearn.nn.cms.network import low_rank_linear
from nestlearn.nn.cms.tape import Tape, fast_linear
from nestlearn.nn.ffn import FFNActivation, feed_forward
from nestlearn.nn.state import detach, index_rows, map_tensors, record, state_bytes

from .edits import Edit, LowRank, joined
from .families import map_shape, squares_by_unit
from .plan import StackPlan

CAST_TOKENS = 16
"""From so many tokens on, casting the weights to bfloat16 costs less than a product in their own dtype."""


@record("stacking.level")
class LevelFast(NamedTuple):
    """One level of one MLP, for all rows: the changes of its maps, and the size of its gradients so far.

    ``energy`` is the moving average of the squared gradient norm of a segment, over ``writes`` segments.
    """

    weights: State
    energy: Float[Tensor, "b"]
    writes: int


@dataclass(frozen=True)
class LevelState:
    """Fast weights of every level of every stacked MLP, for one or more rows. Immutable: reading returns a new state.

    An empty state (``LevelState()``) is the pretrained model. Each row learns from its own text only. A state of one
    row serves a batch of any size.

    Args:
        networks: for the path of each MLP, one entry for each level; None where it has learned nothing.
        tokens: read so far, as the clock counts them: the last segment of a document counts as a whole one.
        edits: of maps, the same for every row (`nestlearn.models.stacking.edits`).

    Example:
        >>> LevelState().rows, LevelState().nbytes
        (0, 0)
    """

    networks: Mapping[str, tuple[LevelFast | None, ...]] = field(default_factory=dict)
    tokens: int = 0
    edits: tuple[Edit, ...] = ()

    @functools.cached_property
    def changes(self) -> dict[str, LowRank]:
        """The changes of maps by all edits, by the path of the map."""
        return joined(self.edits)

    @property
    def rows(self) -> int:
        """Rows held; 0 before the first write."""
        written = (level for levels in self.networks.values() for level in levels if level is not None)
        first = next(written, None)
        return 0 if first is None else first.energy.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return state_bytes([dict(self.networks), self.edits])

    def index_rows(self, rows: Iterable[int]) -> LevelState:
        """Row i of the result is row ``rows[i]``."""
        index = torch.tensor(list(rows), dtype=torch.long)
        return replace(self, networks=index_rows(dict(self.networks), index))

    def forget(self, levels: Iterable[int] | None = None) -> LevelState:
        """The state with some levels (by number, 0 the fastest) back at their initial weights; None drops all, edits
        too."""
        return LevelState() if levels is None else self.with_levels(levels, LevelState())

    def with_levels(self, levels: Iterable[int], other: LevelState) -> LevelState:
        """The state with some levels as they are in another state."""
        chosen, networks = set(levels), {}
        for path in [*self.networks, *(path for path in other.networks if path not in self.networks)]:
            mine, theirs = self.networks.get(path), other.networks.get(path)
            nothing = (None,) * len(mine or theirs or ())
            pairs = enumerate(zip(mine or nothing, theirs or nothing, strict=True))
            networks[path] = tuple(b if i in chosen else a for i, (a, b) in pairs)
        return replace(self, networks=networks)

    def map_levels(self, change: Callable[[int, LevelFast], LevelFast]) -> LevelState:
        """The state with ``change(number, level)`` in place of every level that has learned something."""
        networks = {
            path: tuple(None if held is None else change(i, held) for i, held in enumerate(levels))
            for path, levels in self.networks.items()
        }
        return replace(self, networks=networks)

    def detach(self) -> LevelState:
        """The state cut from the autograd graph."""
        return replace(self, networks=detach(dict(self.networks)))

    def to(self, device: torch.device | str) -> LevelState:
        """The state on another device."""
        networks, edits = map_tensors(lambda x: x.to(device), (dict(self.networks), self.edits))
        return replace(self, networks=networks, edits=edits)

    def check(self, plan: StackPlan) -> None:
        """Raise ValueError unless the state can be one of a model with this plan."""
        unknown = sorted(set(self.networks) - set(plan.paths))
        lengths = {len(levels) for levels in self.networks.values()} - {len(plan.levels)}
        if unknown or lengths:
            raise ValueError(
                f"the level state is of another model: it has MLPs {unknown} that this model does not stack, or "
                f"{sorted(lengths)} levels where it has {len(plan.levels)}. Use it with the model that learned it."
            )


class ActiveLevels(NamedTuple):
    """What a forward pass of the model with this plan reads and records."""

    plan: StackPlan
    state: LevelState | None
    tape: Tape | None
    protect: float | None = None


# Local to the thread or task, so that many can use one model at once, each with its own state.
_ACTIVE: ContextVar[tuple[ActiveLevels, ...]] = ContextVar("active_levels", default=())


def active_levels(plan: StackPlan) -> ActiveLevels:
    """The innermost `reading` of the model with this plan; nothing outside of any."""
    found = (active for active in reversed(_ACTIVE.get()) if active.plan is plan)
    return next(found, ActiveLevels(plan, None, None))


@contextmanager
def reading(
    plan: StackPlan, state: LevelState | None, tape: Tape | None = None, protect: float | None = None
) -> Iterator[None]:
    """Forward passes inside read this state, and record errors on the tape.

    ``protect`` is the ``c_0`` of `nestlearn.models.stacking.general`.

    Raises:
        ValueError: a state of another model.
    """
    if state is not None:
        state.check(plan)
    token = _ACTIVE.set((*_ACTIVE.get(), ActiveLevels(plan, state, tape, protect)))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


class StackedLevel(nn.Module):
    """One level of a stacked MLP: what it adds to the maps of the network.

        W = W_0 + O + D,    D a whole matrix, or ``B A`` of low rank; D = 0 at first

    ``W_0`` is the pretrained map (none in mode ``add``), O a parameter in modes ``add`` and ``copy``, A a parameter.
    A call returns the parameters, so that hooks run (which bring offloaded parameters to the device, for example).

    Args:
        level: its `nestlearn.nn.Level`.
        units: hidden units.
        width: of input and output.
        gated: whether the network has a gate.
        own: whether the level has O.
        like: a tensor with the dtype and device of the parameters.
    """

    general_up: Float[Tensor, "r in"] | None
    general_down: Float[Tensor, "r in"] | None

    def __init__(self, level: Level, units: int, width: int, gated: bool, own: bool, like: Tensor) -> None:
        super().__init__()
        # It gives the number of maps; the function is the model's own.
        activation: FFNActivation = "swiglu" if gated else "gelu"
        architecture = level.architecture(units, activation)
        self.level, self.width, self.units = level, width, units
        self.memory = None if level.period is None else level_memory(level, architecture)
        self.architecture = architecture
        self.shapes = architecture.shapes(width, width)
        maps = Level(hidden=units).shapes(width, activation) if own else {}
        if level.rank is not None:
            maps |= {name: shape for name, shape in self.shapes.items() if name.endswith("_A")}
        for name, shape in maps.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device)))
        # Directions of the general inputs of gate and up, and of down (`nestlearn.models.stacking.general`).
        self.register_buffer("general_up", None)
        self.register_buffer("general_down", None)

    def forward(self) -> Weights:
        """The parameters by name."""
        return dict(self.named_parameters())

    def memory_of(self, level: Level) -> AssociativeMemory:
        """The memory of this level with other settings."""
        known = self.memory is not None and level.rule == self.level.rule
        return cast(AssociativeMemory, self.memory) if known else level_memory(level, self.architecture)

    def initial(self, like: Tensor, protect: float | None = None) -> Weights:
        """``{map: [out, in]}`` of the weights that learn, before the first write: zero for D or B, and A.

        With a memory of general inputs it is ``A P``, each row with its former norm: else P would slow learning down.
        """
        own, zero = self(), like.new_zeros(())
        return {
            name: self._opened_start(name, own[name], protect) if name.endswith("_A") else zero.expand(shape)
            for name, shape in self.shapes.items()
        }

    def _opened_start(self, name: str, a: Float[Tensor, "r in"], protect: float | None) -> Float[Tensor, "r in"]:
        opened = self.open_part(name, a, protect)
        if opened is a:
            return a
        norm = opened.norm(dim=1, keepdim=True)
        return opened * (a.norm(dim=1, keepdim=True) / norm.clamp(min=torch.finfo(norm.dtype).tiny))

    def remember(self, name: str, directions: Float[Tensor, "r in"]) -> None:
        """Keep the directions of the general inputs of a map, ``up`` or ``down``."""
        setattr(self, f"general_{name}", directions)

    def open_part(self, name: str, x: Float[Tensor, "*b in"], protect: float | None) -> Float[Tensor, "*b in"]:
        """``x P`` of rows x that are inputs of a map (of A, in a low-rank map)."""
        kept = self.general_down if name.startswith("down") else self.general_up
        return x if kept is None or protect is None or name.endswith("_B") else times_open(x, kept.to(x), protect)

    def change(
        self, held: LevelFast | None, tape: Tape | None, key: tuple[str, int], x: Tensor, protect: float | None
    ) -> Linear | None:
        """``linear(name, u) = (O + D) u`` of each map at the weights of the end of the last period; None if it is 0."""
        own, recorded = self(), tape if self.memory is not None else None
        own = {name: w for name, w in own.items() if not name.endswith("_A")}
        if held is None and recorded is None:
            return (lambda name, u: u @ own[name].to(u.dtype).mT) if own else None
        fast = self.initial(x, protect) if held is None else held.weights.anchor
        if held is not None:
            fast = {name: for_rows(w, x.shape[0]).to(x.device) for name, w in fast.items()}
        dtype = next(iter(fast.values())).dtype
        if x.dtype == torch.bfloat16 and x.shape[-2] >= CAST_TOKENS:
            dtype = x.dtype
        learned = fast_linear({name: w.to(dtype) for name, w in fast.items()}, recorded, key)
        learned = learned if self.level.rank is None else low_rank_linear(learned)

        def linear(name: str, u: Tensor) -> Tensor:
            z = learned(name, u.to(dtype))
            return z + u @ own[name].to(u.dtype).mT if name in own else z

        return linear

    def learned(self, held: LevelFast | None) -> Weights:
        """``{map: D}`` with everything that was written, an unfinished period included."""
        maps = dict.fromkeys(name.partition("_")[0] for name in self.shapes)
        if held is None:
            return dict.fromkeys(maps, torch.zeros(()))
        fast: Weights = held.weights.params
        return fast if self.level.rank is None else {n: fast[f"{n}_B"] @ fast[f"{n}_A"] for n in maps}


class StackedMLP(nn.Module):
    r"""What `stack_levels` adds to the class of an MLP. The parameters of the MLP keep their names.

    M is the pretrained network, M_l the network of level l at its weights of the end of the last period (NL Eq. 71):

    - ``add``:   ``y = M(x) + sum_l M_l(x)``; the down map of every M_l starts at zero;
    - ``split``: ``y = sum_l M_l(x)``; M_l has the hidden units of level l, and hidden units of no level are constant;
    - ``copy``:  ``y = mean_l M_l(x)``; every M_l starts as M.

    Biases belong to M and do not change. The context `nestlearn.models.stacking.reading` around a call says which fast
    weights are read and whether errors are recorded. Without it, levels are at their initial weights.
    """

    unstacked_class: ClassVar[type[nn.Module]]
    stack_plan: StackPlan
    stack_path: str
    levels: nn.ModuleList

    def install(self, plan: StackPlan, path: str) -> None:
        """Add the levels, with uninitialized parameters."""
        self.stack_plan, self.stack_path = plan, path
        self._squares: dict[str, tuple[Any, Tensor]] = {}
        width, gated = self._shape("up")[1], plan.names.gate is not None
        if plan.mode == "add":
            sizes = [level.units(width, "swiglu" if gated else "gelu") for level in plan.levels]
        else:
            sizes = [units.stop - units.start for units in self._units()]
        like = self._like()
        first = {"add": 0, "copy": 1, "split": len(sizes)}[plan.mode]  # the first level with parameters O
        self.levels = nn.ModuleList(
            StackedLevel(level, size, width, gated, i >= first, like)
            for i, (level, size) in enumerate(zip(plan.levels, sizes, strict=True))
        )

    def remove(self) -> None:
        """Undo `install`."""
        del self.levels, self.stack_plan, self.stack_path, self._squares

    def reserve_general(self, directions: int) -> None:
        """Room for the memory of general inputs that a file holds, of at most so many directions per map."""
        for level in (self.level(i) for i in self.stack_plan.learning()):
            for name, width in (("up", level.width), ("down", level.units)):
                level.remember(name, self._like().new_zeros(min(directions, width), width))

    def remember(self, index: int, name: str, directions: Float[Tensor, "r in"]) -> None:
        """Keep the directions of the general inputs of a map of a level, in the dtype of the model."""
        self.level(index).remember(name, directions.to(self._like()))

    def _like(self) -> Tensor:
        """A tensor with the dtype and device of the pretrained maps."""
        found = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        return torch.empty(0, dtype=found.dtype, device=found.device)  # a plain one, also where maps are quantized

    def level(self, index: int) -> StackedLevel:
        """The level with this number."""
        return cast(StackedLevel, self.levels[index])

    @torch.no_grad()
    def start_levels(self) -> None:
        """Initial values of the levels' parameters. Parameters that `from_pretrained` has loaded are kept."""
        for name, parameter in self.levels.named_parameters():
            name = name.partition(".")[2]
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if name.endswith("_A"):
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif self.stack_plan.mode == "copy" or name == "down":
                parameter.zero_()
            else:
                squares = self._squares_of(name, parameter.device)
                parameter.normal_(0, float(squares.sum() / math.prod(self._shape(name))) ** 0.5)

    # -- the pretrained maps ------------------------------------------------------------------------------------

    def _map(self, name: str) -> nn.Module:
        return getattr(self, self.stack_plan.names.maps()[name])

    def _shape(self, name: str) -> tuple[int, int]:
        return map_shape(self._map(name), f"{self.stack_path}.{self.stack_plan.names.maps()[name]}")

    def _units(self) -> list[slice]:
        """Hidden units of each level in modes ``split`` and ``copy``."""
        hidden, plan = self._shape("up")[0], self.stack_plan
        found = plan.units(hidden) if plan.mode == "split" else [range(hidden)] * len(plan.levels)
        return [slice(units.start, units.stop) for units in found]

    def _squares_of(self, name: str, device: torch.device) -> Float[Tensor, "hidden"]:
        """Sum of squares of a pretrained map for each hidden unit, computed again only after its parameters changed."""
        part = self._map(name)
        now = [(id(p), 0 if p.is_inference() else p._version) for p in part.parameters()]
        if name not in self._squares or self._squares[name][0] != now:
            self._squares[name] = now, squares_by_unit(part, self._shape(name), name == "down", device)
        return self._squares[name][1].to(device)

    @torch.no_grad()
    def size(self, index: int, device: torch.device) -> Float[Tensor, ""]:
        """Frobenius norm of the initial network of a level. A map that starts at zero counts as its pretrained twin."""
        maps, total = self.stack_plan.names.maps(), torch.zeros((), dtype=torch.float64, device=device)
        if self.stack_plan.mode != "add":
            units = self._units()[index]
            return sum((self._squares_of(name, device)[units].sum() for name in maps), total).sqrt()
        own = self.level(index)()
        for name in maps:
            if name == "down":
                total = total + self._squares_of(name, device).sum() / math.prod(self._shape(name)) * own[name].numel()
            else:
                total = total + own[name].double().square().sum()
        return total.sqrt()

    # -- reading ------------------------------------------------------------------------------------------------

    def forward(self, x: Float[Tensor, "b t d"], *args: Any, **kwargs: Any) -> Float[Tensor, "b t d"]:
        """The class's own forward, with levels."""
        plan, state, tape, protect = active_levels(self.stack_plan)
        held = (None if state is None else state.networks.get(self.stack_path)) or (None,) * len(plan.levels)
        changes = [self.level(i).change(fast, tape, (self.stack_path, i), x, protect) for i, fast in enumerate(held)]
        act, gated = getattr(self, plan.names.act), plan.names.gate is not None
        if plan.mode == "add":
            added = [feed_forward(change, act, x, gated) for change in changes if change is not None]
            y = super().forward(x, *args, **kwargs)
            return y + sum(added[1:], added[0]).to(y.dtype)
        if all(change is None for change in changes):
            return super().forward(x, *args, **kwargs)
        parts = list(zip(self._units(), changes, strict=True))
        passes = [parts] if plan.mode == "split" else [[part] for part in parts]
        outputs = [feed_forward(self._linear(chosen, x.dtype), act, x, gated) for chosen in passes]
        y = (sum(outputs[1:], outputs[0]) / len(outputs)).to(x.dtype)
        for child in self.children():
            y = child(y) if isinstance(child, nn.Dropout) else y
        return y

    def _linear(self, parts: list[tuple[slice, Linear | None]], dtype: torch.dtype) -> Linear:
        """The pretrained maps with the changes of levels, each on its own hidden units."""

        def linear(name: str, u: Tensor) -> Tensor:
            z = self._map(name)(u.to(dtype))
            if name == "down":
                return functools.reduce(
                    torch.add, [z, *(f(name, u[..., units]) for units, f in parts if f is not None)]
                )
            pieces = [z[..., units] if f is None else z[..., units] + f(name, u) for units, f in parts]
            rest = z[..., parts[-1][0].stop :]  # hidden units of no level
            return torch.cat([*pieces, rest] if rest.shape[-1] else pieces, -1)

        return linear


def times_open(x: Float[Tensor, "*b in"], kept: Float[Tensor, "r in"], protect: float) -> Float[Tensor, "*b in"]:
    """``x P`` by the leading directions of C; see equation 2 of `nestlearn.models.stacking.general`."""
    squares = kept.square().sum(1)
    rest = (1 - squares.sum() / kept.shape[1]).clamp(min=0)
    return protect / (protect + rest) * (x - (x @ kept.mT) / (protect + rest + squares) @ kept)


def for_rows(w: Float[Tensor, "r out in"], batch: int) -> Float[Tensor, "*b out in"]:
    """Weights of ``r`` rows for a batch: one row serves all, and each of several serves as many beams or samples.

    Those of one row have no row dimension: a product with one matrix is faster than one with a batch of them.

    Raises:
        ValueError: the batch is no multiple of the rows.
    """
    rows = w.shape[0]
    if rows == 1:
        return w[0]
    if rows == batch:
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
