"""The associative memory: four axes and a clock (NL Def. 1; Miras section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .algorithms import Algorithm, Descent, OrthogonalizedMomentum
from .architectures import Architecture, Matrix
from .objectives import DotProduct, Objective, needs_threshold
from .retention import Decay, Oja, Retention, SteepRetention, erases, is_per_channel
from .types import State, Weights

StepSize = Literal["raw", "proximal", "normalized"]
RetainTo = Literal["zero", "initial"]
Read = Literal["token", "chunk"]
Values = Literal["given", "own"]


@dataclass(frozen=True)
class AssociativeMemory:
    """A memory that maps keys to values by optimizing an objective over its context.

    Data, not behaviour: `scan`, `surprise`, `absorb` and `explain` run it. ``dataclasses.replace`` gives a variant.

    Args:
        architecture: the map M: `Matrix()`, `MLP(expansion)` or any `Architecture`.
        objective: what M minimizes over (key, value): `DotProduct()`, `L2()`, `Lp(p)`, `Huber(form)`,
            `ValueShiftRobust()` or any `Objective`.
        retention: how weights are kept: `Decay(per_channel=False)`, `Delta(gated=False)`, `Oja()`, a mirror map (`Lq`,
            `LqDual`, `KL`, `ElasticNet`, `Bregman`) or any `Retention`.
        algorithm: `Descent()`, `Momentum()`, `OrthogonalizedMomentum()` or any `Algorithm`.
        step_size: how the gate ``eta`` becomes the step ``eta'`` of a map with input x:
            ``raw`` ``eta``; ``proximal`` ``eta / (1 + eta ||x||^2)`` (the exact DGD step, NL Eq. 57);
            ``normalized`` ``min(eta, 1 + alpha) / (||x||^2 + 1e-6)`` (eigenvalues down to -1: state tracking).
            Delta and Oja retention take any, also a mapping from map name. Other retentions take ``raw``, or
            ``proximal`` for all maps: then errors follow the weights within a chunk (`nestlearn.memory.proximal`).
        retain_to: what retention pulls toward, ``zero`` or the ``initial`` weights.
        chunk_size: tokens between two refreshes of the anchor at which errors are taken. Part of the function, not
            only of its speed.
        read: ``token`` reads ``M_t`` (after the token's own write), ``chunk`` the weights at the start of the chunk.
        values: what a key is associated with: the ``given`` value v, or the memory's ``own`` answer to it at the start
            of the chunk, ``M(v) / ||M(v)||`` (NL Eq. 87: self-modification). An objective L makes the surprise under it
            the value, ``u = -dL(M(k), v) / dM(k)`` at the start of the chunk: generalized gradient descent (NL Eq.
            58-60), ``W_t = argmin_W objective(M(k), u) + Ret(W, W_{t-1})``. For `DotProduct` u is v.
        window: tokens that are written together, c: every token writes the last c tokens, with the step size of each
            (Omega rule, NL Eq. 68; `nestlearn.memory.windowed`). 1 is the ordinary rule. It needs an algorithm that
            carries nothing, such as `Descent()`, and takes c times the work.
        gradient_limit: largest norm of the outer gradient that passes through the weights from span to span; a larger
            one is scaled down to it. None is exact. Recurrences that can be chaotic need a limit.

    Raises:
        ValueError: for contradictory or unknown settings, with the fix.

    Example:
        >>> from dataclasses import replace
        >>> from nestlearn.memory import AssociativeMemory, Delta, Matrix, MLP
        >>> delta_rule = AssociativeMemory(Matrix(), retention=Delta())
        >>> deep = replace(delta_rule, architecture=MLP(2), step_size="proximal", chunk_size=16)
    """

    architecture: Architecture = field(default_factory=Matrix)
    objective: Objective = field(default_factory=DotProduct)
    retention: Retention = field(default_factory=Decay)
    algorithm: Algorithm = field(default_factory=Descent)
    step_size: StepSize | Mapping[str, StepSize] | tuple[tuple[str, StepSize], ...] = "raw"
    retain_to: RetainTo = "zero"
    chunk_size: int = 64
    read: Read = "token"
    values: Values | Objective = "given"
    gradient_limit: float | None = None
    window: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.chunk_size, bool) or not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive number of tokens, got {self.chunk_size!r}")
        # A class would pass for its instance: it has the same methods.
        if isinstance(self.architecture, type) or not isinstance(self.architecture, Architecture):
            raise ValueError(f"architecture must be Matrix() or MLP(), got {self.architecture!r}")
        if isinstance(self.objective, type) or not isinstance(self.objective, Objective):
            raise ValueError(
                f"objective must be DotProduct() or L2(), got {self.objective!r}; "
                "any object with their methods `loss(prediction, v)` and `error(predict, v)` will do"
            )
        if isinstance(self.retention, type) or not isinstance(self.retention, Retention):
            raise ValueError(
                f"retention must be Decay() or Delta(), got {self.retention!r}; "
                "any instance of a subclass of Retention that defines `weights` will do"
            )
        if isinstance(self.algorithm, type) or not isinstance(self.algorithm, Algorithm):
            raise ValueError(
                f"algorithm must be Descent() or Momentum(), got {self.algorithm!r}; "
                "any instance of a subclass of Algorithm that defines `step` will do"
            )
        self._check_window()
        if isinstance(self.algorithm, OrthogonalizedMomentum) and self.retention != Decay():
            raise ValueError(
                "OrthogonalizedMomentum() writes when a chunk ends and needs retention=Decay(), "
                f"got {self.retention!r}. Use Decay(), or Momentum()."
            )
        _require("retain_to", self.retain_to, get_args(RetainTo))
        _require("read", self.read, get_args(Read))
        if isinstance(self.values, (str, type)) or not isinstance(self.values, Objective):
            _require("values", self.values, get_args(Values))
        elif needs_threshold(self.values):
            raise ValueError(
                f"values={self.values!r} takes its thresholds from the gates, which are those of the objective. "
                "Give it a constant one, such as threshold=1.0."
            )
        if self.gradient_limit is not None and not self.gradient_limit > 0:
            raise ValueError(
                f"gradient_limit must be positive, or None for exact gradients; got {self.gradient_limit!r}"
            )
        names = tuple(self.architecture.shapes(1, 1))
        if not isinstance(self.step_size, str):
            per_map = dict(self.step_size)
            if set(per_map) != set(names):
                raise ValueError(f"step_size names the maps {sorted(per_map)}, but this memory has {sorted(names)}")
            # A tuple keeps the dataclass hashable.
            object.__setattr__(self, "step_size", tuple((name, per_map[name]) for name in names))
        for name in names:
            _require("step_size", self.step_size_of(name), get_args(StepSize))
        if isinstance(self.retention, Oja):
            self._check_oja()
        if not erases(self.retention):
            self._check_step()

    def _check_window(self) -> None:
        """Raise for a window that is no number of tokens, or an algorithm that carries writes on."""
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(
                f"window must be a positive number of tokens, 1 for the ordinary rule; got {self.window!r}"
            )
        if self.window > 1 and (self.algorithm.carries or self.algorithm.has_momentum):
            raise ValueError(
                f"window={self.window} writes a token again with those after it, as momentum does, and "
                f"{self.algorithm!r} carries writes on too. Use Descent(), or window=1."
            )

    def _check_oja(self) -> None:
        """Raise for parts with which the write is not Oja's."""
        parts = (self.architecture, self.objective, self.algorithm)
        if tuple(map(type, parts)) != (Matrix, DotProduct, Descent):
            raise ValueError(
                f"Oja() is a rule for Matrix(), DotProduct() and Descent(), got {', '.join(map(repr, parts))}. "
                "Use those, or Delta()."
            )

    def _check_step(self) -> None:
        """Raise for step sizes that only delta retention has, or that need more than this retention states."""
        kinds = {self.step_size_of(name) for name in self.architecture.shapes(1, 1)}
        if kinds == {"raw"}:
            return
        if kinds != {"proximal"}:
            raise ValueError(
                f"step_size={self.step_size!r} needs retention=Delta(); got {self.retention!r}. "
                "Use step_size='raw', 'proximal' for all maps, or Delta()."
            )
        if is_per_channel(self.retention) or not isinstance(self.retention, SteepRetention):
            raise ValueError(
                "step_size='proximal' needs Delta(), Decay() with one gate a token, or a retention that states its "
                f"steepness(start); got {self.retention!r}. Use step_size='raw'."
            )
        if self.algorithm.writes_at_close:
            raise ValueError(
                f"{self.algorithm!r} writes when a chunk ends, so that no error can follow its writes within the "
                "chunk. Use step_size='raw', or Momentum()."
            )

    @property
    def follows_weights(self) -> bool:
        """Whether errors follow the weights within a chunk: proximal steps of a retention that does not erase."""
        name = self.architecture.query_map
        return not erases(self.retention) and self.step_size_of(name) == "proximal"

    @property
    def has_momentum(self) -> bool:
        """Whether every token needs a momentum gate."""
        return self.algorithm.has_momentum

    def step_size_of(self, name: str) -> StepSize:
        """The step-size mode of one map."""
        if isinstance(self.step_size, str):
            return self.step_size
        return dict(self.step_size)[name]

    def init_state(
        self,
        batch_shape: tuple[int, ...],
        d_key: int,
        d_value: int,
        params: Weights | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> State:
        """A fresh state for rows of shape ``batch_shape``.

        Args:
            batch_shape: leading dimensions ``*b`` (rows, heads, ...); may be empty.
            d_key, d_value: widths of keys and values (equal for an MLP).
            params: initial weights (accumulators, where the retention is a mirror map) ``{name: [*b, out, in]}`` or
                broadcastable to it; gradients reach them. Without them a matrix starts at 0 and an MLP at random.
            generator: randomness of that start (CPU generator).
            dtype: of the fast weights, float32 or float64. Half precision is refused: it rounds 0.9997 to 1.

        Raises:
            ValueError: for wrong names, shapes or dtypes.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"fast weights must be float32 or float64, got {dtype}; inputs may be bfloat16")
        shapes = self.architecture.shapes(d_key, d_value)
        if is_per_channel(self.retention):
            _check_channels(self.architecture.query_map, shapes, d_key)
        if params is None:
            full = {n: self.architecture.init(n, (*batch_shape, *s), generator) for n, s in shapes.items()}
            full = {n: self.retention.start(w) for n, w in full.items()}
        else:
            if set(params) != set(shapes):
                raise ValueError(f"params has maps {sorted(params)}, this memory has {sorted(shapes)}")
            full = {n: _expand(n, params[n], (*batch_shape, *s)) for n, s in shapes.items()}
        initial = {n: w.to(dtype=dtype, device=device) for n, w in full.items()}
        state = self.begin(initial)
        if self.window == 1:
            return state
        # Key, value, step size, threshold and a mark of each of the last tokens.
        width = d_key + d_value + 2 + needs_threshold(self.objective)
        return state._replace(recent=torch.zeros(*batch_shape, self.window - 1, width, dtype=dtype, device=device))

    def begin(self, params: Weights) -> State:
        """A fresh state of these weights ``{map: [*b, out, in]}``; nothing is checked."""
        first = next(iter(params.values()))
        names = [carried for name in params for carried in self.carried_names(name)]
        momentum = {name: torch.zeros_like(params[name.split(".")[0]]) for name in names} or None
        position = torch.zeros(first.shape[:-2], dtype=torch.long, device=first.device)
        pending = first.new_zeros(first.shape[:-2]) if self.algorithm.writes_at_close else None
        return State(params, momentum, dict(params), position, pending, aligned=True)

    def carried_names(self, name: str) -> list[str]:
        """The names in ``State.momentum`` of what the algorithm carries along for one map: the map's own first."""
        return [name, *(f"{name}.{i}" for i in range(1, self.algorithm.carries))][: self.algorithm.carries]

    def full_initial(self, initial: Weights | None, like: Weights, *, needed: bool) -> Weights:
        """The initial weights in the shapes and the dtype of ``like``; the memory's own start where none are given.

        Args:
            initial: ``{map: [*b, out, in]}`` or broadcastable to it.
            like: weights of the rows.
            needed: whether something goes back to them: a reset, or retention to the initial weights.

        Raises:
            ValueError: wrong names or shapes; or none, where they are needed and the memory starts at random.
        """
        if initial is not None:
            if set(initial) != set(like):
                raise ValueError(f"initial has maps {sorted(initial)}, this memory has {sorted(like)}")
            return {n: _expand(n, initial[n], tuple(w.shape)).to(w.dtype) for n, w in like.items()}
        if not needed:
            return like
        if not isinstance(self.architecture, Matrix):
            raise ValueError(
                f"{type(self.architecture).__name__} starts at random weights, and a fresh state, a reset and "
                "retain_to='initial' go back to them: pass initial=, the weights that the state began with "
                "(init_state(...).params)."
            )
        return {n: self.retention.start(torch.zeros_like(w)) for n, w in like.items()}


def _require(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        other = ", or an objective" if name == "values" else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}{other}; got {value!r}")


def _expand(name: str, w: Float[Tensor, "..."], shape: tuple[int, ...]) -> Tensor:
    try:
        return w.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"initial weights {name!r} have shape {tuple(w.shape)}, expected {shape}") from error


def _check_channels(query_map: str, shapes: dict[str, tuple[int, int]], d_key: int) -> None:
    for name, (out, width) in shapes.items():
        if (width if name == query_map else out) != d_key:
            raise ValueError(
                f"Decay(per_channel=True) keeps each of d_key={d_key} channels by a gate of its own, but map {name!r} "
                f"has shape {(out, width)}. Use an architecture whose other maps end in the width of the keys, "
                "or Decay()."
            )
