"""What every associative memory must keep to, whoever wrote its objective and its retention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .associative import AssociativeMemory
from .engine import scan
from .objectives import needs_threshold
from .retention import is_per_channel
from .types import Gates, State, Weights


def check_contract(
    memory: AssociativeMemory, tokens: int = 11, width: int = 4, seed: int = 0, tolerance: float = 1e-9
) -> None:
    """Check a memory, with random inputs in float64, on everything that `scan` promises.

    Both engines agree in outputs, final state and outer gradients; a sequence in two calls equals one call at every
    split; no output depends on a later token or on another row; a masked token changes nothing. Chunks of 4 tokens.

    Args:
        memory: any memory; its objective and retention may be classes of your own.
        tokens, width, seed: of the random inputs.
        tolerance: largest error of a tensor, relative to its norm.

    Raises:
        AssertionError: a promise is broken; the message says which.

    Example:
        >>> from nestlearn.memory import Bregman, MLP, AssociativeMemory, Huber
        >>> check_contract(AssociativeMemory(MLP(2), Huber("norm"), Bregman()))
    """
    memory = replace(memory, chunk_size=4)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (0.5 * torch.randn(2, tokens, width, generator=generator, dtype=torch.float64) for _ in range(3))
    gates = _gates(memory, tokens, width, generator)
    start = memory.init_state((2,), width, width, generator=generator, dtype=torch.float64).params
    wide = {name: w + 0.1 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in start.items()}
    case = (memory, wide, (q, k, v, gates))
    _same("the engines differ in", _gradients(case, "chunked"), _gradients(case, "reference"), tolerance)
    with torch.no_grad():
        whole = _run(case, "chunked")
        for split in range(1, tokens):
            _same(f"split at {split}, the calls differ from one in", _run(case, "chunked", (split,)), whole, tolerance)
        _check_independence(case, whole, tokens // 2)


def _gates(memory: AssociativeMemory, tokens: int, width: int, generator: torch.Generator) -> Gates:
    """Random gates, a zero and a one among the retentions."""

    def draw(low: float, high: float, *channels: int) -> Tensor:
        return low + (high - low) * torch.rand(2, tokens, *channels, generator=generator, dtype=torch.float64)

    retain = draw(0.7, 1, *([width] if is_per_channel(memory.retention) else []))
    retain[0, tokens // 3], retain[1, tokens // 3] = 0.0, 1.0
    momentum = draw(0, 0.8) if memory.has_momentum else None
    return Gates(draw(0, 0.1), retain, momentum, draw(0.2, 1) if needs_threshold(memory.objective) else None)


Case = tuple[AssociativeMemory, Weights, tuple[Tensor, Tensor, Tensor, Gates]]


def _run(case: Case, engine: Any, splits: tuple[int, ...] = (), mask: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs and the final state, by name."""
    memory, start, (q, k, v, gates) = case
    rows, tokens, width = k.shape
    state: State = memory.init_state((rows,), width, v.shape[-1], params=start, dtype=torch.float64)
    outputs, ends = [], (*splits, tokens)
    for first, last in zip((0, *splits), ends, strict=True):
        here = gates.map(lambda g, a=first, b=last: g[:, a:b])
        given = None if mask is None else mask[:, first:last]
        now = slice(first, last)
        tokens_now = q[:, now], k[:, now], v[:, now]
        y, state = scan(memory, state, *tokens_now, here, initial=start, mask=given, engine=engine)
        outputs.append(y)
    groups = {"params": state.params, "anchor": state.anchor, "momentum": state.momentum or {}}
    named = {f"{group} {name}": w for group, weights in groups.items() for name, w in weights.items()}
    if state.pending is not None:
        named["pending"] = state.pending
    return {"the outputs": torch.cat(outputs, 1), **named}


def _gradients(case: Case, engine: Any) -> dict[str, Tensor]:
    """Outputs, final state and the gradients of a random function of them."""
    memory, start, (q, k, v, gates) = case
    leaves = {"q": q, "k": k, "v": v, **{f"initial {name}": w for name, w in start.items()}}
    leaves |= {name: gate for name, gate in gates._asdict().items() if gate is not None}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    fresh = {name: leaves[f"initial {name}"] for name in start}
    found = Gates(**{name: leaves.get(name) for name in Gates._fields})  # type: ignore[arg-type]
    named = _run((memory, fresh, (leaves["q"], leaves["k"], leaves["v"], found)), engine)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for x in named.values():
        loss = loss + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
        named[f"the gradient of {name}"] = torch.zeros_like(leaf) if slope is None else slope
    return {name: x.detach() for name, x in named.items()}


def _same(what: str, got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, want in expected.items():
        if not bool(torch.isfinite(want).all()):
            raise AssertionError(f"{name} is not finite for small random inputs")
        error, scale = float((got[name] - want).norm()), max(float(want.norm()), 1e-3)
        if not error <= tolerance * scale:
            raise AssertionError(f"{what} {name} by {error / scale:.2g}, allowed {tolerance:.2g}")


def _check_independence(case: Case, whole: dict[str, Tensor], at: int) -> None:
    """Other tokens from ``at`` on in row 1 change no earlier output and nothing of row 0; masked, nothing at all."""
    memory, start, (q, k, v, gates) = case

    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x[1, at:] = x[1, at:].flip(0) * 0.5 + 0.1
        return x

    other: Case = (memory, start, (changed(q), changed(k), changed(v), gates.map(changed)))
    after = _run(other, "chunked")
    past = torch.equal(after["the outputs"][1, :at], whole["the outputs"][1, :at])
    if not past:
        raise AssertionError(f"outputs before token {at} depend on tokens from {at} on")
    if not all(torch.equal(after[name][0], x[0]) for name, x in whole.items()):
        raise AssertionError("a row depends on another row")
    mask = torch.ones(q.shape[:2], dtype=torch.bool)
    mask[1, at:] = False
    kept, hidden = _run(case, "chunked", mask=mask), _run(other, "chunked", mask=mask)
    if not all(torch.equal(kept[name], x) for name, x in hidden.items()):
        raise AssertionError("a masked token changes the result")
