"""The Omega rule: every token writes the last c tokens together (NL Eq. 68; ATLAS, arXiv 2505.23735).

    W_t = retention(W_{t-1}) - sum_{i = t-c+1 .. t} eta_i dL(M(k_i), v_i) / dW

With errors taken at the start of a chunk a sum of gradients is a row of writes. So a token becomes c writes of an
engine: those of the c - 1 tokens before it and its own. Retention acts at the first of them, and the query reads after
the last. Tokens that are not there yet are writes of step 0, so that chunks keep their length.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .associative import AssociativeMemory
from .clock import compaction
from .types import Gates, State, Tokens


def expand(memory: AssociativeMemory, state: State, tokens: Tokens) -> tuple[AssociativeMemory, State, Tokens, Tensor]:
    """What an engine runs in place of ``tokens``, and ``State.recent`` after them.

    Tokens ``[*b, t]`` become ``[*b, t c]``; the memory's chunks and the state's position grow by c.
    """
    c, (q, k, v, gates, mask, reset) = memory.window, tokens
    batch, count = k.shape[:-2], k.shape[-2]
    valid = torch.ones_like(k[..., 0], dtype=torch.bool) if mask is None else mask
    columns = [gate for gate in (gates.lr, gates.threshold) if gate is not None]
    here = torch.cat([k, v, torch.stack([*columns, torch.ones_like(gates.lr)], -1)], -1)
    here = torch.where(valid.unsqueeze(-1), here, 0)
    past = here.new_zeros(*batch, c - 1, here.shape[-1]) if state.recent is None else state.recent
    line = torch.cat([past, here], -2).flatten(0, -3) if batch else torch.cat([past, here], -2).unsqueeze(0)
    document = torch.zeros_like(line[..., 0], dtype=torch.long)
    if reset is not None:
        document[:, c - 1 :] = (reset & valid).reshape(-1, count).long().cumsum(1)
    present = line[..., -1].detach() > 0
    order, total = compaction(present)
    rank = present.cumsum(1)[:, c - 1 :]
    written = _last(line, order, rank, document, document[:, c - 1 :], c).reshape(*batch, count, c, -1)
    recent = _last(line, order, total.unsqueeze(1), document, document[:, -1:], c - 1).reshape(*batch, c - 1, -1)

    keys, values, steps = written.split([k.shape[-1], v.shape[-1], len(columns) + 1], -1)
    rest = torch.ones_like(gates.retain.unsqueeze(len(batch) + 1)).expand(
        *batch, count, c - 1, *gates.retain.shape[len(batch) + 1 :]
    )
    retain = torch.cat([gates.retain.unsqueeze(len(batch) + 1), rest], len(batch) + 1)
    first = torch.arange(c, device=k.device) == 0

    def joined(x: Tensor) -> Tensor:
        return x.flatten(len(batch), len(batch) + 1)

    made = Tokens(
        q.repeat_interleave(c, -2),
        joined(keys),
        joined(values),
        Gates(joined(steps[..., 0]), joined(retain), None, None if gates.threshold is None else joined(steps[..., 1])),
        None if mask is None else mask.repeat_interleave(c, -1),
        None if reset is None else joined(reset.unsqueeze(-1) & first),
    )
    inside = replace(memory, window=1, chunk_size=c * memory.chunk_size)
    return inside, state._replace(position=c * state.position, recent=None), made, recent


def collapse(memory: AssociativeMemory, y: Tensor, end: State, recent: Tensor) -> tuple[Tensor, State]:
    """Outputs of the tokens, and the state after them, from those of their writes."""
    y = y.unflatten(-2, (-1, memory.window))[..., -1, :]
    return y, end._replace(position=end.position // memory.window, recent=recent)


def _last(
    line: Float[Tensor, "n s w"],
    order: Int[Tensor, "n s"],
    rank: Int[Tensor, "n t"],
    document: Int[Tensor, "n s"],
    wanted: Int[Tensor, "n t"],
    count: int,
) -> Float[Tensor, "n t count w"]:
    """The last ``count`` tokens up to the one of each rank, those of other documents and missing ones as zeros.

    ``order`` has the places of tokens that count, the rank of a token is how many there are up to it.
    """
    back = torch.arange(count - 1, -1, -1, device=line.device)
    ranks = rank.unsqueeze(-1) - 1 - back
    there: Bool[Tensor, "n t count"] = ranks >= 0
    place = order.gather(1, ranks.clamp(min=0).flatten(1))
    there = there & (document.gather(1, place).view_as(ranks) == wanted.unsqueeze(-1))
    row = torch.arange(len(line), device=line.device)[:, None]
    return torch.where(there.unsqueeze(-1), line[row, place].unflatten(1, ranks.shape[1:]), 0)
