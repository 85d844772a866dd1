"""The output that a map should give at the last token of a subject, so that the model says the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nestlearn.models.stacking import LevelState
from nestlearn.models.stacking.taps import Tap
from nestlearn.nn.cms.tape import gradients, usable
from nestlearn.nn.common import wide_dtype

from .facts import Row, batched
from .measure import row_losses, run

STEPS = 25
"""Gradient steps of a target, at most."""

RATE = 0.1
"""Step of one coordinate, relative to the root mean square of the hidden state."""

LARGEST = 0.75
"""Norm of a change, relative to that of the hidden state, at most."""

NEUTRAL = 0.0625
"""Weight of what the model says about the subject otherwise."""

ENOUGH = 0.05
"""Loss of the target, in nats per token, at which its search ends."""


def find_targets(
    model: Any,
    state: LevelState,
    path: str,
    hidden: Float[Tensor, "n d"],
    rows: Sequence[Row],
    neutral: Sequence[Row],
    progress: Callable[[int], None] = lambda _: None,
) -> Float[Tensor, "n d"]:
    """Changes of the hidden state at the last token of each subject that make the targets likely.

        delta = argmin  mean_contexts -ln p(target | prompt) / tokens + 0.0625 KL(p_0 || p),    |delta| <= 0.75 |h|

    by Adam (MEMIT, arXiv 2210.07229, section 4.3; ROME Eq. 4). p_0 and p are the distributions of the next token after
    ``SUBJECT is a``, before and after. The step with the least loss is taken.

    Args:
        model: a stacked model.
        state: what it has learned.
        path: of the module to whose output delta is added.
        hidden: h, hidden states behind the layer of the module.
        rows: of all facts, in all contexts.
        neutral: ``SUBJECT is a``, of each fact.
        progress: called with the number of each step.

    Raises:
        ValueError: nothing behind the module attends to a subject.
    """
    with gradients():
        hidden, networks = usable((hidden, dict(state.networks)))
        state = replace(state, networks=networks)
        scale = hidden.norm(dim=1, keepdim=True) / hidden.shape[1] ** 0.5
        free = torch.zeros_like(hidden, requires_grad=True)
        optimizer = torch.optim.Adam([free], lr=RATE)
        with torch.no_grad():
            before = _neutral_logs(model, state, path, torch.zeros_like(hidden), neutral)
        best, least = torch.zeros_like(hidden), hidden.new_full((len(hidden),), torch.inf)
        active = set(range(len(hidden)))
        for step in range(STEPS):
            progress(step)
            delta = _bounded(free) * scale
            now = [row for row in rows if row.fact in active]
            loss, nats = _losses(model, state, path, delta, now, [n for n in neutral if n.fact in active], before)
            with torch.no_grad():
                better = loss < least
                best, least = torch.where(better[:, None], delta, best), torch.where(better, loss, least)
            active -= {fact for fact in active if nats[fact] < ENOUGH}
            if not active:
                break
            optimizer.zero_grad()
            free.grad = torch.autograd.grad(loss[loss.isfinite()].sum(), free)[0]
            check_reach(free.grad[sorted(active)], path)
            optimizer.step()
    return best.detach()


def check_reach(gradient: Float[Tensor, "n d"], path: str) -> None:
    """Raise ValueError where a change has no effect on the target."""
    if bool((gradient == 0).all(1).any()):
        raise ValueError(
            f"a change behind {path} at the subject does not reach the target: no later layer attends to it. Edit "
            "earlier layers, or end the prompt with its subject."
        )


def _bounded(free: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows with a root mean square of `LARGEST` at most."""
    size = free.square().mean(1, keepdim=True).clamp(min=1e-30).sqrt()
    return free * (LARGEST / size).clamp(max=1)


def _added(path: str, delta: Tensor, rows: Sequence[Row]) -> dict[str, Tap]:
    """A tap that adds the change of each row's fact at the last token of its subject."""

    def add(x: Tensor, y: Tensor) -> Tensor:
        del x
        owner, at = (torch.tensor(numbers) for numbers in zip(*((r.fact, r.subject[1]) for r in rows), strict=True))
        moved = torch.zeros_like(y)
        return y + moved.index_put((torch.arange(len(rows)), at), delta[owner].to(y))

    return {path: add}


def _losses(
    model: Any,
    state: LevelState,
    path: str,
    delta: Float[Tensor, "n d"],
    rows: Sequence[Row],
    neutral: Sequence[Row],
    before: dict[int, Tensor],
) -> tuple[Float[Tensor, "n"], dict[int, float]]:
    """The loss of each fact (infinite for those without rows), and its part from the target."""
    parts: dict[int, list[Tensor]] = {}
    for _, chosen, ids in batched(rows):
        logits = run(model, state, ids, _added(path, delta, chosen))
        for row, loss in zip(chosen, row_losses(logits, ids, chosen), strict=True):
            parts.setdefault(row.fact, []).append(loss)
    means = {fact: torch.stack(losses).mean() for fact, losses in parts.items()}
    after = _neutral_logs(model, state, path, delta, neutral)
    total = delta.new_full((len(delta),), torch.inf)
    for fact, mean in means.items():
        drift = F.kl_div(after[fact], before[fact], reduction="sum", log_target=True)
        total = total.index_put((torch.tensor(fact),), mean.to(delta) + NEUTRAL * drift.to(delta))
    return total, {fact: float(mean.detach()) for fact, mean in means.items()}


def _neutral_logs(
    model: Any, state: LevelState, path: str, delta: Tensor, neutral: Sequence[Row]
) -> dict[int, Float[Tensor, "v"]]:
    """Log probabilities of the next token after the neutral prompt of each fact."""
    found = {}
    for _, chosen, ids in batched(neutral):
        logits = run(model, state, ids, _added(path, delta, chosen))
        for number, row in enumerate(chosen):
            last = logits[number, len(row.ids) - 1]
            found[row.fact] = F.log_softmax(last.to(wide_dtype(last)), -1)
    return found
