"""Levels that the model's own loss teaches: what a segment records, its factors, and the write (NL Eq. 71).

While a segment is read, every fast map keeps its input x and adds to its output z a *probe* that is zero. The errors of
all maps of all levels are then one gradient, ``E = d loss / d probe``, and ``E^T X`` is the gradient of a map summed
over the segment, for each row its own. It is never formed: `write` hands the factors to the core, whose rules (descent,
momentum, delta, orthogonalized) and retention do the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nestlearn.memory import AssociativeMemory, Factor, Gates, State, absorb
from nestlearn.memory.architectures import Linear
from nestlearn.memory.clock import span_length
from nestlearn.memory.kernels.products import product
from nestlearn.memory.types import Weights
from nestlearn.nn.state import Tree, map_tensors

Factors = dict[str, Factor]
"""Factors of the maps of one level."""


@contextmanager
def gradients() -> Iterator[None]:
    """Gradients on, whatever the caller's mode: a level learns under ``inference_mode`` and ``no_grad`` too."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def usable(tree: Tree) -> Tree:
    """The tree with tensors that autograd may save: those made in inference mode are copied."""
    return map_tensors(lambda x: x.clone() if x.is_inference() else x, tree)


class Record(NamedTuple):
    """Input and probe of one map over a segment."""

    input: Float[Tensor, "b t in"]
    probe: Float[Tensor, "b t out"]


class Tape:
    """What the fast maps of one segment saw, by level and map; a new tape for every segment.

    Args:
        second_order: whether factors will be differentiated again, so that layers must run kernels that can be.

    Example:
        >>> import torch
        >>> tape = Tape()
        >>> x, w = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
        >>> z = tape.record("level 0", "up", x, x @ w.mT)
        >>> factors = segment_factors(z.square().sum() / 2, tape)["level 0"]["up"]
        >>> torch.equal(factors.error, z.detach())
        True
    """

    def __init__(self, second_order: bool = False) -> None:
        self.second_order = second_order
        self.records: dict[Hashable, dict[str, Record]] = {}
        # Checkpointed layers run again in a backward pass, when the segment has been recorded.
        self.closed = False

    def record(
        self, key: Hashable, name: str, x: Float[Tensor, "b t in"], z: Float[Tensor, "b t out"]
    ) -> Float[Tensor, "b t out"]:
        """Remember a map's input and return its output ``z`` plus a zero that errors can be taken at.

        Args:
            key: which level of which layer.
            name: which map of it.

        Raises:
            ValueError: the map was recorded before, or gradients are off.
        """
        if self.closed:
            return z + torch.zeros_like(z)
        if not torch.is_grad_enabled():
            raise ValueError(
                "a tape needs gradients: run the segment under torch.inference_mode(False), enable_grad()."
            )
        maps = self.records.setdefault(key, {})
        if name in maps:
            raise ValueError(
                f"map {name!r} of level {key!r} ran twice in one segment, but a tape holds one run of each map. Use a "
                "new Tape for every segment, and one key per layer and level."
            )
        probe = torch.zeros_like(z, requires_grad=True)
        maps[name] = Record(x, probe)
        return z + probe


def read(
    network: Callable[[Linear, Tensor], Tensor],
    weights: Weights,
    x: Float[Tensor, "b t d"],
    tape: Tape | None = None,
    key: Hashable = None,
) -> Float[Tensor, "b t d_out"]:
    """Run a network on weights of its rows, ``[B, out, in]`` (or shared, ``[out, in]``), recording on a tape.

    Args:
        network: ``network(linear, x)``, any function that applies its fast maps by ``linear(name, u)``; biases,
            activations and whatever else it does are its own.
        weights: of the maps by name.
        tape: None records nothing.
        key: of the level on the tape.

    Example:
        >>> import torch
        >>> w = {"W": torch.eye(3).expand(2, 3, 3)}
        >>> torch.equal(read(lambda linear, x: linear("W", x), w, x := torch.randn(2, 5, 3)), x)
        True
    """

    def linear(name: str, u: Tensor) -> Tensor:
        z = product(u, weights[name].mT)
        return z if tape is None else tape.record(key, name, u, z)

    return network(linear, x)


def segment_factors(
    loss: Float[Tensor, ""], tape: Tape, *, second_order: bool | None = None, keep_graph: bool = False
) -> dict[Hashable, Factors]:
    """Factors of every map on the tape, by level: one backward pass for all of them.

    Args:
        loss: the sum of the segment's losses, in nats; rows must not depend on each other.
        tape: that the segment was recorded on.
        second_order: whether the factors can be differentiated again. Otherwise they count as constants. The tape's by
            default.
        keep_graph: whether the graph of the segment is used again (an outer loss on its outputs).

    Raises:
        ValueError: the loss does not depend on the tape's maps.
    """
    records = [(key, name, record) for key, maps in tape.records.items() for name, record in maps.items()]
    tape.closed = True
    second_order = tape.second_order if second_order is None else second_order
    if not records:
        return {}
    if not loss.requires_grad:
        raise ValueError("the loss has no graph: run the segment and its loss with gradients on, with this tape.")
    errors = torch.autograd.grad(
        loss,
        [record.probe for _, _, record in records],
        create_graph=second_order,
        retain_graph=keep_graph or second_order,
        allow_unused=True,
    )
    found: dict[Hashable, Factors] = {}
    for (key, name, record), error in zip(records, errors, strict=True):
        error = torch.zeros_like(record.probe) if error is None else error
        x = record.input if second_order else record.input.detach()
        found.setdefault(key, {})[name] = Factor(x, error)
    return found


def squared_norm(factors: Factors) -> Float[Tensor, "b"]:
    """``||G||_F^2`` of the summed gradient of all maps of a level, for each row; see `gradient_norm`."""
    parts = [((x @ x.mT) * (e @ e.mT)).sum((-2, -1)) for x, e in factors.values()]
    # Rounding may leave a gradient that cancels just below zero.
    return torch.stack(parts).sum(0).clamp(min=0)


def gradient_norm(factors: Factors) -> Float[Tensor, "b"]:
    """Frobenius norm of the gradient of a segment, all maps of a level together, for each row.

    ``||E^T X||_F^2 = sum_{s,t} (x_s . x_t) (e_s . e_t)``: two Gram matrices of the tokens, no dense gradient.

    Example:
        >>> import torch
        >>> x, e = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
        >>> norm = gradient_norm({"W": Factor(x, e)})
        >>> torch.allclose(norm, (e.mT @ x).norm(dim=(-2, -1)), atol=1e-5)
        True
    """
    return squared_norm(factors).sqrt()


def write(
    memory: AssociativeMemory,
    state: State,
    factors: Factors,
    gates: Gates,
    clip: float | None = None,
    valid: Bool[Tensor, "b t"] | None = None,
    initial: Weights | None = None,
) -> State:
    """Write the factors of one segment into a level.

    Args:
        memory: of the level (`nestlearn.nn.cms.level.level_memory`).
        state: of its rows. The segment was read at ``state.anchor``, and does not go beyond the period:
            ``position + t <= period`` in every row.
        factors: of its maps.
        gates: of its tokens (`nestlearn.nn.cms.level.loss_gates`).
        clip: bound of `gradient_norm`, per row.
        valid: False at tokens that change nothing.
        initial: the weights that the level keeps toward, as in `nestlearn.memory.absorb`.

    Returns:
        The state after the segment; when a row's period ends, its anchor becomes what was written.

    Example:
        >>> import torch
        >>> from nestlearn.nn.cms.level import Level, MapShapes, level_memory, loss_gates
        >>> level = Level(period=8, lr=0.1)
        >>> memory = level_memory(level, MapShapes.of({"W": (3, 3)}))
        >>> initial = {"W": torch.eye(3)}
        >>> state = memory.init_state((2,), 3, 3, initial)
        >>> tape, x = Tape(), torch.randn(2, 4, 3)
        >>> y = read(lambda linear, x: linear("W", x), state.anchor, x, tape, key=0)
        >>> factors = segment_factors(y.square().sum(), tape)[0]
        >>> state = write(memory, state, factors, loss_gates(level, torch.ones(2, 4)), clip=1.0, initial=initial)
        >>> state.position.tolist()
        [4, 4]
    """
    dtype = next(iter(state.params.values())).dtype
    # In the order of the state's maps, not of their use.
    factors = {name: Factor(*(x.to(dtype) for x in factors[name])) for name in state.params if name in factors}
    gates = gates.map(lambda gate: gate.to(dtype))
    if valid is not None:
        keep = valid.unsqueeze(-1)
        factors = {name: Factor(torch.where(keep, x, 0), torch.where(keep, e, 0)) for name, (x, e) in factors.items()}
    if clip is not None:
        # A function of the square: the root has no derivative where there is no gradient.
        scale = clip * squared_norm(factors).clamp(min=clip**2).rsqrt()[:, None, None]
        factors = {name: Factor(x, scale * e) for name, (x, e) in factors.items()}
    tokens = gates.lr.shape[-1]
    # The kernels of a span grow with the square of its length.
    span = span_length(memory.chunk_size, tokens)
    for first in range(0, tokens, span):
        part = slice(first, min(first + span, tokens))
        here = {name: Factor(x[:, part], e[:, part]) for name, (x, e) in factors.items()}
        mask = None if valid is None else valid[:, part]
        gates_here = gates.map(lambda gate, part=part: gate[:, part])
        state = absorb(memory, state, here, gates_here, initial=initial, mask=mask)
    return state
