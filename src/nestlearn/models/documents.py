"""Documents packed in one batch, taken apart into rows of their own.

Documents of a packed batch do not see each other, so each can be a row of its own. Every row then starts fresh, and the
layers take the path without resets, which is several times faster for memories: no row is in another phase.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Documents(NamedTuple):
    """Where the documents of a batch of ``n = b t`` tokens go: batches of similar length, and the way back.

    ``batches[i]`` holds token numbers ``[documents, length]``; a document shorter than the batch repeats its last
    token, behind all others, where no layer's output for a real token can see it. ``back[j]`` is the place of token j
    in the outputs of all batches one after the other.
    """

    batches: list[Int[Tensor, "_ _"]]
    back: Int[Tensor, "n"]


def find_documents(starts: Bool[Tensor, "b t"]) -> Documents:
    """Cut every row before each True. Documents within a factor of two in length share a batch.

    Looks at the values, so it is meant for the CPU and not for compiled code.

    Example:
        >>> find_documents(torch.tensor([[False, False, False, True]])).batches
        [tensor([[0, 1, 2]]), tensor([[3]])]
    """
    starts = starts.clone()
    starts[:, 0] = True
    begin = starts.flatten().nonzero().squeeze(1)
    length = torch.diff(begin, append=begin.new_tensor([starts.numel()]))
    # 0 for documents longer than half a row, 1 longer than a quarter, 2 for all others.
    kind = (starts.shape[1] // length).log2().floor().clamp(max=2)
    batches, back, offset = [], torch.empty(starts.numel(), dtype=torch.long), 0
    for group in kind.unique().tolist():
        first, size = begin[kind == group, None], length[kind == group, None]
        slot = torch.arange(int(size.max()))
        tokens = first + torch.minimum(slot, size - 1)
        real = slot < size
        back[tokens[real]] = offset + torch.arange(tokens.numel()).view_as(tokens)[real]
        offset += tokens.numel()
        batches.append(tokens)
    return Documents(batches, back)


def take(x: Float[Tensor, "b t d"], documents: Documents) -> list[tuple[Float[Tensor, "_ _ d"], Int[Tensor, "_ _"]]]:
    """The batches of documents, and the token numbers of each."""
    flat = x.flatten(0, 1)
    return [(flat[tokens], tokens) for tokens in documents.batches]


def put_back(parts: list[Float[Tensor, "_ _ d"]], documents: Documents, like: Float[Tensor, "b t d"]) -> Tensor:
    """The outputs of the batches in the order of the packed batch ``like``; inverse of `take`."""
    return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, documents.back).view(like.shape)
