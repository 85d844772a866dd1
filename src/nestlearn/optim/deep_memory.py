"""A network as momentum: a two-layer perceptron trained on the rows of gradients (after NL Eq. 50)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nestlearn.memory import L2, MLP, AssociativeMemory, DotProduct, surprise
from nestlearn.optim.checks import fractions, one_of, positive, whole_number
from nestlearn.optim.matrices import CPU_ELEMENTS, ELEMENTS, wide

Kind = Literal["dot", "l2"]
MAPS = ("in", "out")


@dataclass(frozen=True)
class DeepMemory:
    """``M(x) = x + W_out gelu(W_in x)``, trained online on all rows of all parameters of one shape.

    After NL Eq. 50, with two changes: rows are normalized, and a step is in closed form.

    The network reads a row g of a gradient at root mean square 1, ``x = g / r``, and the update is ``r M(x)``. So the
    size of gradients scales the steps, as in SGD, but not what is learned. ``W_in`` starts at random and ``W_out`` at
    zero: before the memory has learned anything the update is the gradient.

    Per optimizer step each map takes one step of delta gradient descent (NL Eq. 57, exact for a batch) on its inputs x
    and errors e, all computed before the step. With D the distance to the map's start:

        D ← (α D - η E[e xᵀ]) (I + η E[x xᵀ])⁻¹  =  argmin  η/2 E‖D' x + e‖² + 1/2 ‖D' - α D‖²

    It cannot overshoot, whatever η. The objective of a row is ``-⟨M(x), γ x⟩`` or ``1/2 ‖M(x) - (1 + γ) x‖²``: in both
    the network learns to add γ times a row that it has seen. Directions that many rows share are learned first and
    amplified most; a new direction passes unchanged. The memory does not average over time: signs that alternate from
    step to step do not cancel. For that give the optimizer a ``momentum`` too, whose rows the network then reads.

    Cost for n columns and two n hidden units: about 34 n operations per element (Newton-Schulz in five steps: 30 n on a
    square matrix), and 15 n³ per shape for the two solves. State: 24 n² bytes per *shape*, kept with the first
    parameter of that shape in its group. Where parameters are distributed, every process computes on complete
    gradients, as in Muon.

    Args:
        expansion: hidden units per column.
        objective: ``"dot"`` or ``"l2"``.
        step: η. Rows have mean square 1 per column: 1 learns directions of average weight half-way in one step.
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
        one_of("objective", self.objective, Kind)
        positive("step", self.step, "the memory's own learning rate")
        fractions("retention", (self.retention,), 1)
        positive("gain", self.gain, "what is added to a row that was seen")

    @property
    def memory(self) -> AssociativeMemory:
        """The network and objective as a memory of `nestlearn.memory`, whose closed-form errors it uses."""
        return AssociativeMemory(MLP(self.expansion), L2() if self.objective == "l2" else DotProduct())

    def new_state(self, like: Tensor, columns: int) -> dict[str, Tensor]:
        """The two maps, and the start of the first one; equal on every process."""
        architecture = self.memory.architecture
        shapes = architecture.shapes(columns, columns)
        start = architecture.init("in", shapes["in"], torch.Generator().manual_seed(self.seed))
        start = start.to(like.device, wide(like.dtype))
        return {"memory_in": start, "memory_out": start.new_zeros(shapes["out"]), "memory_start": start.clone()}

    def apply(self, state: dict[str, Tensor], rows: Float[Tensor, "t n"]) -> Float[Tensor, "t n"]:
        """Learns the rows, in place on the state, and returns the answers to them."""
        limit = CPU_ELEMENTS if rows.device.type == "cpu" else ELEMENTS
        count = max(1, limit // (self.expansion * rows.shape[1]))  # hidden activations are the largest tensors
        pieces = [(piece, *unit_rows(piece)) for piece in rows.split(count)]
        _learn(self, state, [(x, valid) for _, x, _, valid in pieces])
        maps = {name: state[f"memory_{name}"] for name in MAPS}
        architecture = self.memory.architecture
        answers = [
            # A row that is not finite spoils its own parameter, as in torch; a zero row stays zero.
            torch.where(valid, size * architecture(lambda name, y: y @ maps[name].mT, x), piece)
            for piece, x, size, valid in pieces
        ]
        return torch.cat(answers)


def unit_rows(
    rows: Float[Tensor, "t n"],
) -> tuple[Float[Tensor, "t n"], Float[Tensor, "t 1"], Bool[Tensor, "t 1"]]:
    """Rows at root mean square 1, their root mean squares, and which rows have a direction: finite and not all zero.

    The others become zeros, which add nothing to objectives and means.
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
    wanted = spec.gain + (spec.objective == "l2")
    grams: dict[str, Tensor] = {}
    writes: dict[str, Tensor] = {}
    for x, _ in pieces:
        for name, (inputs, errors) in surprise(spec.memory, maps, x, wanted * x).items():
            grams[name] = grams.get(name, 0) + inputs.mT @ inputs
            writes[name] = writes.get(name, 0) + errors.mT @ inputs
    count = torch.stack([valid.sum(dtype=x.dtype) for x, valid in pieces]).sum().clamp(min=1)
    share = spec.step / count
    for name, weights in maps.items():
        start = state["memory_start"] if name == "in" else torch.zeros_like(weights)
        kept = spec.retention * (weights - start) - share * writes[name]
        identity = torch.eye(len(grams[name]), dtype=weights.dtype, device=weights.device)
        # Positive definite by construction, so no error is read back from the device.
        factor, _ = torch.linalg.cholesky_ex(identity + share * grams[name])
        weights.copy_(start + torch.cholesky_solve(kept.mT, factor).mT)
