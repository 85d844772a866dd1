"""The memory of general inputs: what a level writes leaves the answers to general text alone.

Every linear map of a level remembers the mean ``C = E[x xᵀ]`` of its inputs on general text, and every write is
multiplied by

    P = (I + C / (c_0 c))⁻¹,    c = tr(C) / width                                                           (1)

P is 0 along directions that general inputs use much, and 1 along all others. ``c_0`` is the mean square along a
direction, relative to the mean over all directions, at which half of a write passes.

A write is a sum of products of errors and inputs, ``G = Eᵀ X``. So ``G P = Eᵀ (X P)``: the *keys* that are written are
``X P``. A change of a map then always has the form ``D = D' P``, and for every input ``|D x| <= |D'| |P x|``. In a
low-rank level ``D = B A``, A starts as ``A_0 P`` and its keys are ``X P``, so that ``A = A' P`` and ``D = (B A') P``
at any time.

C is kept by its r leading eigenvectors. Along all other directions it counts as their mean m. So C / c is taken as
``m I + BᵀB`` with the rows ``b_i = sqrt(lambda_i / c - m) v_i``, ``c_0`` is free while reading, and

    X P = c_0 / (c_0 + m) (X - (X Bᵀ) / (c_0 + m + |b|²) B),    m = 1 - |B|² / width                        (2)

It is exact for r = width. It costs ``4 r width`` operations per token and input. A level keeps two matrices B in the
dtype of the model, for the inputs of the MLP (gate and up) and of down: ``r (width + units)`` numbers. With 512
directions that is 2.2 MB per layer of SmolLM2-135M in bfloat16 (65 MB in all), and 5.4 MB with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from nestlearn.models.generation import GumbelNoise
from nestlearn.nn.cms.tape import Tape

from .model import StackedModel, stacked_model
from .network import LevelState, reading

TOKENS = 4_096
"""Tokens of general text, by default."""


class InputSums(Tape):
    """Sums ``XᵀX`` of the inputs of every map of every level, in place of a record for a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[tuple[Any, str], Tensor] = {}

    def record(self, key: Hashable, name: str, x: Tensor, z: Tensor) -> Tensor:
        """Add the inputs of a map to its sum; gate and up have the same inputs, B of a low-rank map has none."""
        name = name.removesuffix("_A")
        if name in ("up", "down"):
            rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
            found = self.sums.get((key, name))
            self.sums[key, name] = rows.mT @ rows if found is None else found.addmm_(rows.mT, rows)
        return z


def leading_directions(products: Float[Tensor, "d d"], rank: int | None = None) -> Float[Tensor, "r d"]:
    """The rows of B (equation 2) for the r largest eigenvalues of C, largest first.

    Args:
        products: C, or any multiple of it.
        rank: r; None keeps all.

    Example:
        >>> leading_directions(torch.diag(torch.tensor([10.0, 1.0, 1.0])), rank=1).square()  # 2.5 - 0.25
        tensor([[2.2500, 0.0000, 0.0000]])
    """
    values, vectors = torch.linalg.eigh(products)
    values = values.clamp(min=0) / values.mean().clamp(min=torch.finfo(values.dtype).tiny)
    rank = len(values) if rank is None else min(rank, len(values))
    left = values[: len(values) - rank]
    rest = left.mean() if len(left) else values.new_zeros(())
    scale = (values[len(values) - rank :] - rest).clamp(min=0).sqrt()
    return (vectors[:, len(values) - rank :] * scale).mT.flip(0)


class _Telling(LogitsProcessor):
    """Tells the length of the rows before each token."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell = tell

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        self.tell(input_ids.shape[1])
        return scores


def own_text(
    model: Any,
    tokenizer: Any,
    tokens: int = TOKENS,
    length: int = 256,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Int[Tensor, "b t"]:
    """Text that the model writes from its start token, in rows of ``length`` tokens; ``progress`` is told each one."""
    rows = max(1, tokens // length)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((rows, 1), int(start), device=model.device)
    noise = LogitsProcessorList([GumbelNoise(seed, model.device), _Telling(progress)])
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": length - 1, "max_new_tokens": length - 1}
    return model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=noise, **options)


DIRECTIONS = 512
"""Directions kept of the inputs of a map, by default."""


@torch.no_grad()
def estimate_general(model: Any, ids: Int[Tensor, "b t"], *, rank: int | None = DIRECTIONS) -> None:
    """Estimate the memory of general inputs of a stacked model, in place (equation 1 of this module).

    Args:
        model: a stacked model in evaluation mode.
        ids: tokens of general text, in rows that are read on their own.
        rank: directions kept of the inputs of a map; None keeps all.

    Raises:
        ValueError: no levels, no tokens, no directions, or inputs of a map that are not finite; nothing changes.
    """
    stacked: StackedModel = stacked_model(model)
    if rank is not None and rank < 1:
        raise ValueError(f"{rank} directions of general inputs cannot be kept; give 1 or more, or None for all.")
    if ids.numel() == 0:
        raise ValueError("the general text holds no tokens; give a text of some thousand tokens, or None.")
    sums = InputSums()
    with reading(stacked.stack_plan, LevelState(), sums):
        for row in ids.split(1):
            # Without the output layer, a fifth of the work in a small model.
            stacked.base_model(input_ids=row.to(stacked.device), use_cache=False)
    for (key, name), products in sums.sums.items():
        if not bool(products.isfinite().all()):
            raise ValueError(f"the inputs of {name} in {key[0]} are not finite; the model cannot read this text.")
    widest = max(len(products) for products in sums.sums.values())
    cast(Any, stacked.config).stacking["general"] = widest if rank is None else rank
    for (key, name), products in sums.sums.items():
        path, index = key
        stacked.stacked_mlps()[path].remember(index, name, leading_directions(products, rank))
