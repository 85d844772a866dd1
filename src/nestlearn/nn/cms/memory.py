"""The Continuum Memory System: feed-forward networks that learn at different speeds (NL Eq. 70-74)."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nestlearn.memory import State
from nestlearn.memory.clock import known_empty
from nestlearn.nn.common import check_tokens
from nestlearn.nn.ffn import FeedForward, FFNActivation
from nestlearn.nn.state import record

from .level import Level, check_order, check_segments
from .local import LocalLevel
from .loss import LossLevel
from .nested import NestedState, TransferBy
from .tape import Factors, Tape

Variant = Literal["sequential", "nested", "independent"]
Signal = Literal["local", "loss"]
Meta = Literal["first", "second"]
WriteLevels = bool | Sequence[int]
"""Which levels learn from what they read: all (True), none (False), or those with these numbers (0: the fastest)."""


@record("cms")
class ContinuumState(NamedTuple):
    """Fast weights of every level with a period, None for a frozen one; every tensor ``[B, ...]``."""

    levels: tuple[State | NestedState | None, ...]


class Aggregation(nn.Module):
    """A learned weighted sum of the outputs of all levels, with separate weights for every head (NL Eq. 74).

    Args:
        levels: number of outputs.
        heads: parts of the width, each with its own weights.
    """

    def __init__(self, levels: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(levels, heads))
        self.reset_parameters()

    def vector_parameters(self) -> list[nn.Parameter]:
        """Parameters that are vectors, not linear maps: optimizers must not apply a matrix rule to them."""
        return [self.weight]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The plain sum."""
        self.weight.fill_(1)

    def forward(self, outputs: list[Float[Tensor, "b t d"]]) -> Float[Tensor, "b t d"]:
        """The weighted sum."""
        parts = torch.stack(outputs, -2).unflatten(-1, (self.weight.shape[1], -1))
        return torch.einsum("btlhd,lh->bthd", parts, self.weight.to(parts.dtype)).flatten(-2)


class ContinuumMemory(nn.Module):
    r"""Feed-forward levels, fastest first. Each level changes its weights after every ``period`` tokens.

    Connection of the levels (``variant``):

    - ``sequential``: ``z^0 = x,  z^l = z^{l-1} + M^l(norm(z^{l-1})),  y = z^k - z^0``           (NL Eq. 70, 73)
    - ``nested``: the same chain, in which the initial weights of a level belong to the next slower one: every
      ``C_{l+1}`` tokens ``theta_0 <- theta_0 + rho (theta - theta_0)``, then ``theta <- theta_0``   (NL Eq. 72); or
      theta_0 takes a step of the exact meta-gradient (``transfer_by="gradient"``, `nestlearn.nn.cms.nested`)
    - ``independent``: ``y = sum_l w_l M^l(norm_l(x))`` with learned weights w, one per level and head    (NL Eq. 74)

    Source of the error (``signal``): ``local``, an associative objective of each level inside the layer (`LocalLevel`);
    ``loss``, the next-token loss of the segment just read, backpropagated to the level (`LossLevel`).

    A frozen first level has no norm of its own (a block has normalized x), so one level with period None is exactly a
    Transformer's `FeedForward`. Every other level has its own RMSNorm. Training and evaluation compute the same
    function. Each batch row has its own fast weights. Padding never writes. A reset sets the levels of a row back to
    their initial weights, except those with ``reset=False``.

    **Signal loss.** A call only reads. The caller reads a segment of ``segment_length`` tokens with a
    `nestlearn.nn.cms.tape.Tape`, takes `nestlearn.nn.cms.tape.segment_factors` of the summed loss and calls `absorb`,
    as `nestlearn.HopeForCausalLM` does. A segment never crosses a reset. A reset can only come with the first token of
    a call.

    Args:
        d_model: width of input and output.
        levels: `Level` of each network, with strictly increasing periods. A frozen level (period None) comes last.
        activation: ``"swiglu"`` or ``"gelu"``.
        variant: ``"sequential"``, ``"nested"`` or ``"independent"``.
        signal: ``"local"`` or ``"loss"``.
        meta: whether outer gradients treat the factors of a loss as constants (``"first"`` order) or go through them
            (``"second"``). The caller of `absorb` reads it.
        transfer: rho of the nested variant.
        transfer_by: how the nested variant moves initial weights: by what was learned (``"difference"``), or by the
            ``"gradient"`` of the window's objective through all its writes. ``"gradient"`` reads every window once
            more, forward and backward, and keeps its tokens in the state. It needs signal ``"local"``.
        heads: parts of the width that have separate weights in the independent variant.
        norm_eps: epsilon of the levels' norms.

    Raises:
        ValueError: levels out of order, periods that do not fit each other, or an unknown variant, signal or meta.

    Example:
        >>> import torch
        >>> from nestlearn.nn import ContinuumMemory, Level
        >>> cms = ContinuumMemory(16, [Level(period=8, expansion=2), Level(period=None)])
        >>> y, state = cms(torch.randn(2, 20, 16))
        >>> cms.levels_that_never_write(sequence_length=8)
        [0]
    """

    def __init__(
        self,
        d_model: int,
        levels: Sequence[Level] = (Level(),),
        activation: FFNActivation = "swiglu",
        variant: Variant = "sequential",
        signal: Signal = "local",
        meta: Meta = "first",
        transfer: float = 0.5,
        heads: int = 1,
        norm_eps: float = 1e-6,
        transfer_by: TransferBy = "difference",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("variant", variant, Variant),
            ("signal", signal, Signal),
            ("meta", meta, Meta),
            ("transfer_by", transfer_by, TransferBy),
        ):
            if value not in get_args(known):
                raise ValueError(f"{name}={value!r} does not exist; use {' or '.join(map(repr, get_args(known)))}.")
        if d_model < 1 or heads < 1 or d_model % heads:
            raise ValueError(f"d_model={d_model!r} must be positive and divisible by heads={heads!r}.")
        if not 0 < transfer <= 1:
            raise ValueError(f"transfer={transfer!r} must be above 0 and at most 1.")
        if transfer_by == "gradient" and (variant != "nested" or signal != "local"):
            raise ValueError(
                f"transfer_by='gradient' with {variant=}, {signal=}: only nested levels have initial weights that "
                "move, and a meta-gradient through the writes of a loss would need the graph of the whole model over a "
                "period of the slower level. Use variant='nested' with signal='local', or transfer_by='difference'."
            )
        check_order(levels)
        if variant == "nested":
            _check_nested(levels)
        if signal == "loss":
            check_segments(levels)
        self.d_model, self.variant, self.signal, self.meta = d_model, variant, signal, meta
        self.periods = tuple(level.period for level in levels)
        slower = [*self.periods[1:], None] if variant == "nested" else [None] * len(levels)

        def network(level: Level, outer: int | None) -> nn.Module:
            if level.period is None:
                return FeedForward(d_model, level.expansion, activation, level.hidden)
            if signal == "loss":
                return LossLevel(d_model, level, activation, None, outer, transfer)
            return LocalLevel(d_model, level, activation, outer, transfer, transfer_by)

        self.networks = nn.ModuleList(network(level, outer) for level, outer in zip(levels, slower, strict=True))
        self.norms = nn.ModuleList(
            nn.Identity() if i == 0 and level.period is None else nn.RMSNorm(d_model, eps=norm_eps)
            for i, level in enumerate(levels)
        )
        self.aggregation = Aggregation(len(levels), heads) if variant == "independent" else None

    @property
    def segment_length(self) -> int | None:
        """Tokens of a segment, the smallest period; None where no level learns from a loss."""
        periods = [period for period in self.periods if period is not None]
        return min(periods) if self.signal == "loss" and periods else None

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: ContinuumState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        *,
        writes: WriteLevels = True,
        return_state: bool = True,
        tape: Tape | None = None,
        key: Hashable = None,
    ) -> tuple[Float[Tensor, "b t d"], ContinuumState | None]:
        """The output of the levels, to be added to the residual stream; arguments as in every layer of `nestlearn.nn`.

        Args:
            writes: see `WriteLevels`. A level that does not write has step 0; its clock goes on.
            tape: records the maps of levels with signal "loss", level i under ``(key, i)``.
            key: of this layer on the tape.

        Returns:
            Outputs (with signal "local" 0 at masked tokens), and the state after the last token (None without
            ``return_state``).
        """
        check_tokens(x, self.d_model)
        if self.signal == "loss" and reset is not None and not known_empty(reset[:, 1:]):
            raise ValueError(
                "levels with signal='loss' take a reset with the first token of a call only. Cut the call there."
            )
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, 0)
        total: Tensor | None = None
        outputs: list[Tensor] = []
        after: list[State | NestedState | None] = []
        before = (None,) * len(self.networks) if state is None else state.levels
        for i, (network, norm, fast) in enumerate(zip(self.networks, self.norms, before, strict=True)):
            here = norm(x if total is None or self.aggregation is not None else x + total)
            if isinstance(network, LocalLevel):
                y, end = network(here, fast, mask, reset, _writes(writes, i), return_state)
            elif isinstance(network, LossLevel):
                y, end = network(here, fast, reset, return_state, tape, (key, i))
            else:
                (y, _), end = network(here), None
            total = y if total is None else total + y
            outputs.append(y)
            after.append(end)
        if self.aggregation is not None:
            total = self.aggregation(outputs)
        assert total is not None
        return total, ContinuumState(tuple(after)) if return_state else None

    def absorb(
        self,
        state: ContinuumState,
        factors: Mapping[Hashable, Factors],
        key: Hashable = None,
        learns: Bool[Tensor, "b t"] | None = None,
        idle: Collection[int] = (),
        writes: WriteLevels = True,
    ) -> ContinuumState:
        """The state after the factors of a segment are written (signal "loss").

        Args:
            state: after reading the segment.
            factors: by ``(key, level)``, as `nestlearn.nn.cms.tape.segment_factors` returns them.
            learns: tokens whose step is not 0; None for all.
            idle: periods of levels that are skipped, because their writes will not be read.
            writes: see `WriteLevels`. A level that does not write has step 0.

        Raises:
            ValueError: factors of another tape or key, or of more tokens than a segment has.

        Example:
            >>> from nestlearn.nn.cms.tape import Tape, segment_factors
            >>> cms = ContinuumMemory(8, [Level(period=4, lr=0.1), Level()], signal="loss")
            >>> tape = Tape()
            >>> y, state = cms(torch.randn(2, 4, 8), tape=tape)
            >>> state = cms.absorb(state, segment_factors(y.square().sum(), tape))
            >>> state.levels[0].anchor["up"].shape
            torch.Size([2, 21, 8])
        """
        self._check_factors(state, factors, key, idle)
        after: list[State | NestedState | None] = []
        for i, (network, fast) in enumerate(zip(self.networks, state.levels, strict=True)):
            if isinstance(network, LossLevel) and fast is not None and network.period not in idle:
                here = factors[key, i]
                fast = network.absorb(fast, here, learns if _writes(writes, i) else _none_of(here))
            after.append(fast)
        return ContinuumState(tuple(after))

    def _check_factors(
        self, state: ContinuumState, factors: Mapping[Hashable, Factors], key: Hashable, idle: Collection[int]
    ) -> None:
        """Raise ValueError unless every level that learns has factors of at most one segment."""
        for i, (period, fast) in enumerate(zip(self.periods, state.levels, strict=True)):
            if period is None or fast is None or period in idle:
                continue
            found = factors.get((key, i))
            if found is None:
                raise ValueError(
                    f"no factors for level {i} under the key {key!r}; the tape has {sorted(map(str, factors))}. Read "
                    "the segment with tape= and the same key, and take segment_factors of a loss that depends on it."
                )
            tokens = next(iter(found.values())).input.shape[-2]
            if self.segment_length is not None and tokens > self.segment_length:
                raise ValueError(
                    f"a segment of {tokens} tokens goes beyond the smallest period, {self.segment_length}: read, take "
                    f"factors and absorb every {self.segment_length} tokens."
                )

    def advance_clock(self, state: ContinuumState, tokens: int) -> ContinuumState:
        """The state after a segment with step 0: nothing is learned, and the clock goes on."""
        after = [
            network.advance_clock(fast, tokens) if isinstance(network, LossLevel) and fast is not None else fast
            for network, fast in zip(self.networks, state.levels, strict=True)
        ]
        return ContinuumState(tuple(after))

    def levels_that_never_write(self, sequence_length: int) -> list[int]:
        """Indices of levels whose period is not shorter than a sequence: their writes are never read within it.

        So their writes get no gradient in training on such sequences, unless a state is carried to the next one.
        """
        return [i for i, period in enumerate(self.periods) if period is not None and period >= sequence_length]

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token (multiply-add = 2), writes included."""
        return sum(
            network.flops_per_token(context_length)
            for network in self.networks
            if isinstance(network, LocalLevel | LossLevel | FeedForward)
        )

    def reset_parameters(self) -> None:
        """Initial values of plain feed-forward networks; levels with signal "local" write nothing at first."""
        for module in (*self.networks, *self.norms, self.aggregation):
            if isinstance(module, LocalLevel | LossLevel | FeedForward | nn.RMSNorm | Aggregation):
                module.reset_parameters()


def _writes(writes: WriteLevels, level: int) -> bool:
    return writes if isinstance(writes, bool) else level in writes


def _none_of(factors: Factors) -> Bool[Tensor, "b t"]:
    """False for every token of a segment."""
    x = next(iter(factors.values())).input
    return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)


def _check_nested(levels: Sequence[Level]) -> None:
    """Raise ValueError unless each period divides the next."""
    periods = [level.period for level in levels if level.period is not None]
    for fast, slow in itertools.pairwise(periods):
        if slow % fast:
            raise ValueError(
                f"periods {periods}: in the nested variant each period must divide the next, because a level restarts "
                f"when the slower one changes. Use a multiple of {fast} such as {slow // fast * fast}, or 'sequential'."
            )
