"""Spans of mirror maps: accumulators in closed form, weights a function of them.

Inside a span ``A_t = A[t] A_0 + sum_s A[t, s] S_s`` as for every decay. A token reads ``weights(A_t)``. For `Lq` that
is a multiple of A_t, known at the start of the chunk, so the read stays a matrix product. For every other map A_t is
computed for a block of tokens, as large as a budget of entries allows.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..associative import AssociativeMemory
from ..retention import Lq, Retention
from .base import Entering, Kernels, Opened, Running, Update, Writes, decay_kernels, open_scalar, read_map, write_kept
from .proximal import following

DENSE_ENTRIES = 2**21
"""Entries of weights that are held for one block of tokens."""


def open_mirror(memory: AssociativeMemory, run: Running, update: Update) -> Opened:
    """A span whose accumulators follow scalar kernels."""
    retention = memory.retention
    if memory.follows_weights:
        kernels, written = following(memory, run, update)
        writes = {name: written(name, run.entering(name, update.reset)) for name in update.factors}
    else:
        kernels = decay_kernels(run, update)
        writes = {name: write_kept(kernels, *factor, update.gates.lr) for name, factor in update.factors.items()}
    after = None if update.reset is None else update.reset.cummax(-1).values

    def read(name: str, x: Tensor) -> Tensor:
        start = run.entering(name, update.reset)
        if not isinstance(retention, Lq):
            back = None if after is None else run.initial[name]
            return read_dense(retention, kernels, writes[name], start, x, (run.anchor[name], back, after))
        scale = retention.scale(run.anchor[name])
        if after is not None:
            scale = torch.where(after.unsqueeze(-1), retention.scale(run.initial[name]), scale)
        return scale * read_map(kernels, writes[name], start, x)

    return Opened(read, open_scalar(run, update, kernels, lambda name, _: writes[name]).advance)


def read_dense(
    retention: Retention,
    kernels: Kernels,
    writes: Writes,
    start: Entering,
    x: Float[Tensor, "b c in"],
    anchors: tuple[Tensor, Tensor | None, Tensor | None],
) -> Float[Tensor, "b c out"]:
    """``weights(A_t) x_t`` for every token of the span, block by block.

    ``anchors``: the accumulator at the start of the chunk; that after a reset, and the tokens that see it.
    """
    anchor, back, after = anchors
    rows, tokens, _ = x.shape
    out, width = anchor.shape[-2:]
    block = max(1, DENSE_ENTRIES // max(1, rows * out * width))
    answers = []
    for first in range(0, tokens, block):
        last = min(first + block, tokens)
        accumulators = dense_accumulators(kernels, writes, start, first, last)
        seen = anchor.unsqueeze(1)
        if back is not None and after is not None:
            seen = torch.where(after[:, first:last, None, None], back.unsqueeze(1), seen)
        weights = retention.weights(accumulators, seen.expand_as(accumulators))
        answers.append((weights @ x[:, first:last].unsqueeze(-1)).squeeze(-1))
    return answers[0] if len(answers) == 1 else torch.cat(answers, 1)


def dense_accumulators(
    kernels: Kernels, writes: Writes, start: Entering, first: int, last: int
) -> Float[Tensor, "b t out in"]:
    """Accumulators after the tokens ``first .. last - 1`` of a span."""
    total = None if start.base is None else start.base.unsqueeze(1)
    entries = ((kernels.entry, start.weights), (kernels.restart, start.back), (kernels.impulse_entry, start.momentum))
    for coefficient, weights in entries:
        if coefficient is not None and weights is not None:
            part = coefficient[:, first:last, None, None] * weights.unsqueeze(1)
            total = part if total is None else total + part
    # Tokens write into what later ones read, so the columns end where the rows do.
    inputs, gain = writes.inputs[:, :last].unsqueeze(1), writes.gain[:, None, :last]
    for kernel, change in ((kernels.decay, writes.change), (kernels.impulse, writes.impulse)):
        if kernel is not None and change is not None:
            scaled = (kernel[:, first:last, :last] * gain).unsqueeze(-2)
            part = (change[:, :last].mT.unsqueeze(1) * scaled) @ inputs
            total = part if total is None else total + part
    assert total is not None
    return total
