"""Multi-scale Momentum Muon: a fast and a slow momentum, both orthogonalized (NL Algorithm 1, Eq. 75)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nestlearn.memory.kernels.newton_schulz import Coefficients
from nestlearn.optim.checks import fractions, not_negative, numbers, one_of, whole_number
from nestlearn.optim.matrices import Matrices, Stack, take_step
from nestlearn.optim.matrix_optimizer import MatrixOptimizer, zeros
from nestlearn.optim.orthogonal import (
    AdjustLr,
    Named,
    average,
    check_orthogonal,
    coefficients,
    lr_factor,
    orthogonalize,
)

Accumulate = Literal["ema", "paper"]
Mix = Literal["after", "before"]


class M3(MatrixOptimizer):
    """Steps along the orthogonalized momenta of two timescales (NL Algorithm 1).

    With gradients g, slow period f and NS the Newton-Schulz iteration, at step t:

        M1 += β1 g        V += β2 g²        O1 = NS(M1)
        M2 += β3 Σ g of the last f steps,   O2 = NS(M2)          before steps f+1, 2f+1, ...; O2 = 0 until then
        W  -= lr (O1 + α O2) / (√V + ε)

    This is ``accumulate="paper"``: no gradient is ever forgotten. The default ``"ema"`` averages instead:
    ``M1 ← β1 M1 + (1 - β1) g``, V in the same way with a correction for its start at zero, and
    ``M2 ← β3 M2 + (1 - β3) mean(g of the last f steps)``.

    ``second_moment=False`` leaves out the division; with α = 0 too, the EMA form is Muon. √V has the size of the
    gradient, so dividing by it alone would make the step as large as 1/|g|. Unless ``adjust_lr=None``, the divisor is
    therefore ``√V + δ rms(√V) + ε``, rms over the matrix, and each update is scaled back to the norm of O1 + α O2.
    Without δ, an element without any gradient so far, as behind a dead ReLU, would be divided by ε alone and take
    nearly all of that norm. Algorithm 1 to the letter is ``accumulate="paper", nesterov=False, adjust_lr=None,
    weight_decay=0.0``.

    ``mix="before"`` is not in the paper. It mixes averages of the gradients themselves, and orthogonalizes once:

        A_k ← A_k + (g - A_k) / τ_k          for each timescale τ_k
        W  -= lr NS(M1 + α mean_k A_k) / (√V + ε)

    The mean over k starts at zero and has its full size after about τ_k steps; `slow_from` can delay it further.

    Cost per matrix and step: one Newton-Schulz, and with ``mix="after"`` another one every f steps. State in bytes per
    parameter (float32): 4 for M1, 4 for V, and with α > 0 4 for M2 and 4 for O2, or 4 for each A_k.

    Args:
        params: parameters, (name, parameter) pairs, or groups (`MatrixOptimizer`).
        lr: learning rate, also AdamW's of parameters that are no matrices.
        betas: (β1, β2, β3).
        alpha: α, the weight of the slow direction, or of the slow averages.
        slow_period: f, in steps; only for ``mix="after"``, as β3.
        mix: ``"after"`` adds two orthogonalized directions, as printed. ``"before"`` adds averages and orthogonalizes
            their sum; it needs ``accumulate="ema"``.
        timescales: τ_k, in steps, at least 1 each; only for ``mix="before"``.
        slow_from: the first step on which the slow part acts. It learns from step 1 on.
        second_moment: divide by √V.
        accumulate: ``"ema"``, or ``"paper"`` for the sums as printed.
        nesterov: orthogonalize ``β1 M1 + (1 - β1) g`` (EMA form), ``M1 + β1 g`` (paper form) in place of M1.
        ns_steps: Newton-Schulz iterations.
        ns_coefficients: ``"quintic"`` (Muon's), ``"polar_express"``, or triples (a, b, c), one per iteration.
        adjust_lr: how the step depends on the matrix's shape (`lr_factor`).
        eps: ε.
        damping: δ; without effect where ``adjust_lr=None``.
        weight_decay: decoupled: ``W ← (1 - lr · weight_decay) W`` before the step.
        adamw: settings of AdamW (`MatrixOptimizer`).

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> optimizer = M3(layer.parameters(), lr=0.05, slow_period=5, weight_decay=0.0)
        >>> x = torch.eye(4)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = (layer(x) - x.flip(0)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> loss.item() < 0.05
        True
    """

    optional_prefix = "slow_"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float, float] = (0.95, 0.95, 0.9),
        alpha: float = 0.1,
        slow_period: int = 10,
        mix: Mix = "after",
        timescales: Sequence[float] = (100.0,),
        slow_from: int = 1,
        second_moment: bool = True,
        accumulate: Accumulate = "ema",
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: Named | Sequence[Coefficients] = "quintic",
        adjust_lr: AdjustLr | None = "match_rms_adamw",
        eps: float = 1e-8,
        damping: float = 0.1,
        weight_decay: float = 0.1,
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "alpha": alpha, "slow_period": slow_period, "mix": mix, "timescales": timescales,
            "slow_from": slow_from, "second_moment": second_moment, "accumulate": accumulate, "nesterov": nesterov,
            "ns_steps": ns_steps, "ns_coefficients": ns_coefficients, "adjust_lr": adjust_lr, "eps": eps,
            "damping": damping, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, adamw)

    def check_group(self, group: Mapping[str, Any]) -> None:
        one_of("accumulate", group["accumulate"], Accumulate)
        fractions("betas", group["betas"], 3)
        not_negative("alpha", group["alpha"], "the weight of the slow direction")
        not_negative("eps", group["eps"], "added to the root of the second moment")
        not_negative("damping", group["damping"], "added to the root of the second moment, relative to its size")
        whole_number("slow_period", group["slow_period"], "steps between two slow directions")
        one_of("mix", group["mix"], Mix)
        numbers("timescales", group["timescales"], 1.0, "steps over which each slow average goes")
        whole_number("slow_from", group["slow_from"], "the first step on which the slow part acts")
        if group["mix"] == "before" and group["accumulate"] != "ema":
            raise ValueError(
                f'mix is "before" and accumulate is {group["accumulate"]!r}: sums that never decay do not '
                'differ between timescales. Use accumulate="ema", or mix="after".'
            )
        check_orthogonal(group)

    def new_state(self, group: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
        names = ["fast_momentum", *(["second_moment"] if group["second_moment"] else [])]
        return {name: zeros(like) for name in names}

    def needed_states(self, group: Mapping[str, Any]) -> Iterable[str]:
        if group["alpha"] == 0:
            return ()
        return _averages(group) if group["mix"] == "before" else ("slow_momentum", "slow_direction")

    def update(self, group: Mapping[str, Any], matrices: Matrices) -> None:
        triples, slow, after = coefficients(group["ns_coefficients"]), group["alpha"] > 0, group["mix"] == "after"
        momenta = _fast_momenta(group, matrices)
        if slow and not after:
            momenta = _mixed(group, matrices, momenta)
        directions = orthogonalize(matrices, momenta, group["ns_steps"], triples)
        directions = [direction.to(weight) for direction, weight in zip(directions, matrices.weights, strict=True)]
        if slow and after:
            slow_directions = _slow_directions(group, matrices, triples)
            if matrices.step >= group["slow_from"]:
                torch._foreach_add_(directions, slow_directions, alpha=group["alpha"])
        scales = _divide(group, matrices, directions) if group["second_moment"] else None
        take_step(matrices.weights, directions, group, lr_factor(group["adjust_lr"], matrices.shape), scales)


def _fast_momenta(group: Mapping[str, Any], matrices: Matrices) -> list[Stack]:
    """M1 or Nesterov's step from it, after the gradients were added to M1; do not change it."""
    beta, momenta = group["betas"][0], matrices.state("fast_momentum")
    if group["accumulate"] == "ema":
        return average(momenta, matrices.gradients, beta, group["nesterov"])
    torch._foreach_add_(momenta, matrices.gradients, alpha=beta)
    return list(torch._foreach_add(momenta, matrices.gradients, alpha=beta)) if group["nesterov"] else momenta


def _averages(group: Mapping[str, Any]) -> list[str]:
    """The names of the states A_k."""
    return [f"slow_average_{k}" for k in range(len(group["timescales"]))]


def _mixed(group: Mapping[str, Any], matrices: Matrices, momenta: list[Stack]) -> list[Stack]:
    """``M1 + α mean_k A_k``, after the gradients were added to every A_k; M1 alone before the step `slow_from`."""
    acts, weight = matrices.step >= group["slow_from"], group["alpha"] / len(group["timescales"])
    for name, timescale in zip(_averages(group), group["timescales"], strict=True):
        averages = matrices.state(name)
        torch._foreach_lerp_(averages, matrices.gradients, 1 / timescale)
        if acts:
            momenta = list(torch._foreach_add(momenta, averages, alpha=weight))
    return momenta


def _slow_directions(group: Mapping[str, Any], matrices: Matrices, triples: Sequence[Coefficients]) -> list[Stack]:
    """``O2``, computed again where a slow period begins; then adds the gradients to M2."""
    beta, period = group["betas"][2], group["slow_period"]
    momenta, directions = matrices.state("slow_momentum"), matrices.state("slow_direction")
    begins = (matrices.step - 1) % period == 0
    if begins and matrices.step > 1 and matrices.step + period > group["slow_from"]:
        # Kept for a period, so Newton-Schulz of the slow momentum runs once in f steps.
        torch._foreach_copy_(directions, orthogonalize(matrices, momenta, group["ns_steps"], triples))
    # M2 takes each gradient at once: at the end of a period it equals M2 with their sum added then.
    if group["accumulate"] == "ema":
        if begins:
            torch._foreach_mul_(momenta, beta)
        torch._foreach_add_(momenta, matrices.gradients, alpha=(1 - beta) / period)
    else:
        torch._foreach_add_(momenta, matrices.gradients, alpha=beta)
    return directions


def _divide(group: Mapping[str, Any], matrices: Matrices, directions: list[Stack]) -> list[Stack] | None:
    """``O / (√V + ε)`` in place, after the squared gradients were added to V.

    Returns:
        The scales that restore the norm of O; None with ``adjust_lr=None``.
    """
    beta, moments, eps = group["betas"][1], matrices.state("second_moment"), group["eps"]
    norms = matrices.norms(directions) if group["adjust_lr"] is not None else None
    correction = 1.0
    if group["accumulate"] == "ema":
        correction = (1 - beta**matrices.step) ** 0.5
        torch._foreach_mul_(moments, beta)
        torch._foreach_addcmul_(moments, matrices.gradients, matrices.gradients, value=1 - beta)
    else:
        torch._foreach_addcmul_(moments, matrices.gradients, matrices.gradients, value=beta)
    # √V / c + ε = (√V + c ε) / c with the correction c for the average's start: the scales cancel the division by c.
    roots = torch._foreach_sqrt(moments)
    if norms is not None and group["damping"] > 0:
        rows, columns = matrices.shape
        sums = matrices.total([v.sum((-2, -1), keepdim=True) for v in moments])
        torch._foreach_add_(roots, [(x / (rows * columns)).sqrt_().mul_(group["damping"]) for x in sums])
    torch._foreach_add_(roots, correction * eps)
    torch._foreach_div_(directions, roots)
    if norms is None:
        torch._foreach_mul_(directions, correction)
        return None
    tiny = torch.finfo(norms[0].dtype).tiny
    return list(torch._foreach_div(norms, torch._foreach_clamp_min(matrices.norms(directions), tiny)))
