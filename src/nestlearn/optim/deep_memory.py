"""A momentum that is a network: a two-layer perceptron trained on the rows of gradients (after NL Eq. 50)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nestlearn.memory import L2, MLP, AssociativeMemory, DotProduct, surprise
from nestlearn.optim.matrices import CPU_ELEMENTS, ELEMENTS, wide
from nestlearn.optim.matrix_optimizer import fractions
from nestlearn.optim.wrapper import whole_number

Kind = Literal["dot", "l2"]
MAPS = ("in", "out")


@dataclass(frozen=True)
class DeepMemory:
    """``M(x) = x + W_out gelu(W_in x)``, trained online on all rows of all parameters of one shape.

    After NL Eq. 50, with two changes: rows are normalized, and a step is in closed form.

    A row g of a gradient is given to the network at root mean square 1, ``x = g / r``, and its answer gets the size
    back: the update is ``r M(x)``. So the size of gradients decides over steps as it does in SGD, and not over what is
    learned. ``W_in`` starts at random, ``W_out`` at zero: before it has learned anything the update is the gradient.

    One step of delta gradient descent (NL Eq. 57, exact for a batch) per optimizer step, each map on its own inputs
    x and errors e, all taken before the step, with D the distance to the map's start:

        D ← (α D - η E[e xᵀ]) (I + η E[x xᵀ])⁻¹  =  argmin  η/2 E‖D' x + e‖² + 1/2 ‖D' - α D‖²

    It cannot overshoot, whatever η. The objective of a row is ``-⟨M(x), γ x⟩`` or ``1/2 ‖M(x) - (1 + γ) x‖²``: either
    way the network is asked to add γ times the row to a row that it has seen. Directions that many rows share are
    learned first and amplified most; a direction seen for the first time passes as it is. It does not average over
    time: signs that alternate from step to step are not cancelled. For that give the optimizer a ``momentum`` too,
    whose rows are then what the network reads.

    Cost for n columns and two n hidden units: about 34 n operations per element (Newton-Schulz in five steps: 30 n on a
    square matrix), and 15 n³ per shape for the two solves. State: 24 n² bytes per *shape*, none per parameter. Kept in
    the state of the first parameter of the shape in its group. Where parameters are distributed every process computes
    on complete gradients, as Muon does.

    Args:
        expansion: hidden units per column.
        objective: ``"dot"`` or ``"l2"``.
        step: η. Rows have mean square 1 per column, so 1 learns directions of average weight half-way in one step.
        retention: α, the part of D kept at a step.
        gain: γ.
        seed: of the random start.

    Raises:
        ValueError: a setting out of range.
    """

    expansion: int = 2
    objective: Kind = "dot"
    step: float = 1.0
    retention: float = 0.9
    gain: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("expansion", self.expansion, "hidden units per column")
        if self.objective not in get_args(Kind):
            raise ValueError(f"objective is {self.objective!r}; it must be one of {', '.join(get_args(Kind))}.")
        if not self.step > 0:
            raise ValueError(f"step is {self.step}; it must be positive: the memory's own learning rate.")
        fractions("retention", (self.retention,), 1)
        if not self.gain > 0:
            raise ValueError(f"gain is {self.gain}; it must be positive: what is added to a row that was seen.")

    @property
    def memory(self) -> AssociativeMemory:
        """The same as a memory of `nestlearn.memory`, whose closed-form errors it learns by."""
        return AssociativeMemory(MLP(self.expansion), L2() if self.objective == "l2" else DotProduct())

    def new_state(self, like: Tensor, columns: int) -> dict[str, Tensor]:
        """The two maps, and where the first one started; the same on every process."""
        architecture = self.memory.architecture
        shapes = architecture.shapes(columns, columns)
        start = architecture.init("in", shapes["in"], torch.Generator().manual_seed(self.seed))
        start = start.to(like.device, wide(like.dtype))
        return {"memory_in": start, "memory_out": start.new_zeros(shapes["out"]), "memory_start": start.clone()}

    def apply(self, state: dict[str, Tensor], rows: Float[Tensor, "t n"]) -> Float[Tensor, "t n"]:
        """Learns the rows, in place on the state, and answers to them."""
        limit = CPU_ELEMENTS if rows.device.type == "cpu" else ELEMENTS
        count = max(1, limit // (self.expansion * rows.shape[1]))  # hidden activations are the largest tensors
        pieces = [(piece, *unit_rows(piece)) for piece in rows.split(count)]
        _learn(self, state, [(x, valid) for _, x, _, valid in pieces])
        maps = {name: state[f"memory_{name}"] for name in MAPS}
        architecture = self.memory.architecture
        answers = [
            # A row that is not finite spoils its own parameter, as in torch; one of zeros has nothing to be asked.
            torch.where(valid, size * architecture(lambda name, y: y @ maps[name].mT, x), piece)
            for piece, x, size, valid in pieces
        ]
        return torch.cat(answers)


def unit_rows(
    rows: Float[Tensor, "t n"],
) -> tuple[Float[Tensor, "t n"], Float[Tensor, "t 1"], Bool[Tensor, "t 1"]]:
    """Rows at root mean square 1, their root mean squares, and which rows have a direction: finite and not all zero.

    The others are zeros, which no objective and no mean sees.
    """
    peak = rows.abs().amax(-1, keepdim=True)  # squares of large or small elements would leave the range
    valid = peak.isfinite() & (peak > 0)
    peak = torch.where(valid, peak, 1.0)
    scaled = torch.where(valid, rows / peak, 0.0)
    size = torch.where(valid, scaled.square().mean(-1, keepdim=True).sqrt(), 1.0)
    return scaled / size, peak * size, valid


def _learn(spec: DeepMemory, state: dict[str, Tensor], pieces: list[tuple[Tensor, Tensor]]) -> None:
    """One step of delta gradient descent on all rows, in place on the maps."""
    maps = {name: state[f"memory_{name}"] for name in MAPS}
    asked = spec.gain + (spec.objective == "l2")
    grams: dict[str, Tensor] = {}
    writes: dict[str, Tensor] = {}
    for x, _ in pieces:
        for name, (inputs, errors) in surprise(spec.memory, maps, x, asked * x).items():
            grams[name] = grams.get(name, 0) + inputs.mT @ inputs
            writes[name] = writes.get(name, 0) + errors.mT @ inputs
    count = torch.stack([valid.sum(dtype=x.dtype) for x, valid in pieces]).sum().clamp(min=1)
    share = spec.step / count
    for name, weights in maps.items():
        start = state["memory_start"] if name == "in" else torch.zeros_like(weights)
        kept = spec.retention * (weights - start) - share * writes[name]
        identity = torch.eye(len(grams[name]), dtype=weights.dtype, device=weights.device)
        # Positive definite by construction: the variant that does not ask the device for an error.
        factor, _ = torch.linalg.cholesky_ex(identity + share * grams[name])
        weights.copy_(start + torch.cholesky_solve(kept.mT, factor).mT)
