"""Levels that learn from the loss of the model: what a segment records, its factors, and the write (NL Eq. 71).

While a segment is read, every fast map records its input x and adds a *probe*, a zero tensor, to its output z. One
backward pass gives the errors of all maps of all levels, ``E = d loss / d probe``. The gradient of a map, summed over
the segment, is ``Eᵀ X`` for each row. It is never formed: `write` passes the factors E and X to `nestlearn.memory`,
which applies the rule (descent, momentum, delta, orthogonalized) and the retention.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
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
    """Switch gradients on in any mode of the caller: a level also learns under ``inference_mode`` and ``no_grad``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def usable(tree: Tree) -> Tree:
    """The tree with tensors that autograd can save: those made in inference mode are copied."""
    return map_tensors(lambda x: x.clone() if x.is_inference() else x, tree)


class Tape:
    """Inputs and probes of the fast maps of one segment, by level and map. Every segment needs a new tape.

    Args:
        second_order: whether the factors are differentiated again. Layers then choose kernels that allow it.

    Example:
        >>> tape = Tape()
        >>> x, w = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
        >>> z = tape.record("level 0", "up", x, x @ w.mT)
        >>> factors = segment_factors(z.square().sum() / 2, tape)["level 0"]["up"]
        >>> torch.equal(factors.error, z.detach())
        True
    """

    def __init__(self, second_order: bool = False) -> None:
        self.second_order = second_order
        self.records: dict[Hashable, dict[str, tuple[Tensor, Tensor]]] = {}
        # Checkpointed layers run again in a backward pass, after the segment was recorded.
        self.closed = False

    def record(
        self, key: Hashable, name: str, x: Float[Tensor, "b t in"], z: Float[Tensor, "b t out"]
    ) -> Float[Tensor, "b t out"]:
        """Record a map's input, and return its output ``z`` plus the probe.

        Args:
            key: of the layer and level.
            name: of the map.

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
        maps[name] = (x, probe)
        return z + probe


def fast_linear(weights: Weights, tape: Tape | None = None, key: Hashable = None) -> Linear:
    """``linear(name, u)`` with weights of its rows, ``[B, out, in]`` (or shared, ``[out, in]``).

    Args:
        weights: of the maps by name.
        tape: records the maps; None records nothing.
        key: of the level on the tape.

    Example:
        >>> x = torch.randn(2, 5, 3)
        >>> torch.equal(fast_linear({"W": torch.eye(3).expand(2, 3, 3)})("W", x), x)
        True
    """

    def linear(name: str, u: Tensor) -> Tensor:
        z = product(u, weights[name].mT)
        return z if tape is None else tape.record(key, name, u, z)

    return linear


def segment_factors(loss: Float[Tensor, ""], tape: Tape, *, keep_graph: bool = False) -> dict[Hashable, Factors]:
    """Factors of every map on the tape, by level, from one backward pass.

    They can be differentiated again if the tape is of second order, and are constants otherwise.

    Args:
        loss: the sum of the segment's losses, in nats; rows must not depend on each other.
        tape: that the segment was recorded on.
        keep_graph: whether the graph of the segment is used again (an outer loss on its outputs).

    Raises:
        ValueError: the loss does not depend on the tape's maps.
    """
    records = [(key, name, *record) for key, maps in tape.records.items() for name, record in maps.items()]
    tape.closed = True
    if not records:
        return {}
    if not loss.requires_grad:
        raise ValueError("the loss has no graph: run the segment and its loss with gradients on, with this tape.")
    errors = torch.autograd.grad(
        loss,
        [probe for *_, probe in records],
        create_graph=tape.second_order,
        retain_graph=keep_graph or tape.second_order,
        allow_unused=True,
    )
    found: dict[Hashable, Factors] = {}
    for (key, name, x, probe), error in zip(records, errors, strict=True):
        error = torch.zeros_like(probe) if error is None else error
        found.setdefault(key, {})[name] = Factor(x if tape.second_order else x.detach(), error)
    return found


def squared_norm(factors: Factors) -> Float[Tensor, "b"]:
    """Squared Frobenius norm of the gradient of a segment, all maps of a level together, for each row.

    ``||Eᵀ X||_F² = sum_{s,t} (x_s . x_t) (e_s . e_t)``: two Gram matrices of the tokens, no dense gradient.

    Example:
        >>> x, e = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
        >>> torch.allclose(squared_norm({"W": Factor(x, e)}), (e.mT @ x).square().sum((-2, -1)), rtol=1e-3)
        True
    """
    parts = [((x @ x.mT) * (e @ e.mT)).sum((-2, -1)) for x, e in factors.values()]
    # Rounding may leave a gradient that cancels just below zero.
    return torch.stack(parts).sum(0).clamp(min=0)


def write(
    memory: AssociativeMemory,
    state: State,
    factors: Factors,
    gates: Gates,
    clip: float | None = None,
    initial: Weights | None = None,
) -> State:
    """Write the factors of one segment into a level.

    Args:
        memory: of the level (`nestlearn.nn.cms.level.level_memory`).
        state: of its rows. The segment was read at ``state.anchor``, and does not go beyond the period:
            ``position + t <= period`` in every row.
        factors: of its maps.
        gates: of its tokens (`nestlearn.nn.cms.level.loss_gates`).
        clip: bound of the norm of the gradient (the root of `squared_norm`), per row.
        initial: the weights that retention decays to, as in `nestlearn.memory.absorb`.

    Returns:
        The state after the segment; when a row's period ends, its anchor becomes what was written.

    Example:
        >>> from nestlearn.memory.architectures import Matrix
        >>> from nestlearn.nn.cms.level import Level, level_memory, loss_gates
        >>> level = Level(period=8, lr=0.1)
        >>> memory = level_memory(level, Matrix())
        >>> initial = {"W": torch.eye(3)}
        >>> state = memory.init_state((2,), 3, 3, initial)
        >>> tape, x = Tape(), torch.randn(2, 4, 3)
        >>> y = fast_linear(state.anchor, tape, key=0)("W", x)
        >>> factors = segment_factors(y.square().sum(), tape)[0]
        >>> state = write(memory, state, factors, loss_gates(level, torch.ones(2, 4)), clip=1.0, initial=initial)
        >>> state.position.tolist()
        [4, 4]
    """
    dtype = next(iter(state.params.values())).dtype
    # In the order of the state's maps, not of their use.
    factors = {name: Factor(*(x.to(dtype) for x in factors[name])) for name in state.params if name in factors}
    gates = gates.map(lambda gate: gate.to(dtype))
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
        gates_here = gates.map(lambda gate, part=part: gate[:, part])
        state = absorb(memory, state, here, gates_here, initial=initial)
    return state
