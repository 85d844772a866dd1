"""Long-term memory: segments of slots, into which working memory is merged."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.fields import unknown_name
from nestlearn.nn.common import full_precision
from nestlearn.nn.cross_attention import CrossAttention, InitialSlots, check_sets

Merge = Literal["outer", "sum"]
Start = Literal["learned", "random"]


class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input, which may be wider than the weights."""

    def forward(self, input: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:  # noqa: A002 (torch's name)
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class LongTermMemory(nn.Module):
    r"""C segments of N slots, a tensor of order three, merged with working memory M_w (PMI, arXiv 2310.09297).

        outer:  a = softmax over c of ⟨M_l[c], M_w⟩ / √(N d),    M_l ← LN(M_l + a ⊗ M_w)
        sum:    M_l[c, n] ← LN(M_l[c, n] + M_l[c, n] ⊙ Σ_m M_w[m])
        read:   U_l = softmax((H W_q)(M_l W_k)ᵀ / √e) M_l W_v,   over all C N slots

    PMI prints ``LN(M_l + M_l ⊗ M_w)``, whose outer product has order five and fits no M_l. In ``outer`` M_l enters by
    the address a, one weight per segment, so that ``a ⊗ M_w`` has the shape of M_l: a Hebbian write under the key a
    (docs/decisions.md, 91). ``sum`` is what the published code does: it sums over the index of the outer product, which
    leaves none. LN is a layer norm over d.

    The state is M_l ``[b, segments, slots, d]``. It lasts as long as the caller keeps it, over any number of inputs.

    Args:
        d_model: width of a slot.
        slots: N, those of the working memory.
        segments: C.
        num_heads: heads of the read; must divide ``d_model``.
        merge: ``"outer"`` or ``"sum"``.
        initial: M_l before the first input: ``"learned"``, or ``"random"``, one standard normal draw for all rows each
            time that `start` is called, as the published code draws one for each batch.

    Raises:
        ValueError: an unknown name, heads that do not divide the width, or states that do not fit each other.

    Example:
        >>> memory = LongTermMemory(16, slots=4, segments=3, num_heads=2)
        >>> state = memory.write(memory.start(2), torch.randn(2, 4, 16))
        >>> state.shape, memory.read(state, torch.randn(2, 10, 16)).shape
        (torch.Size([2, 3, 4, 16]), torch.Size([2, 10, 16]))
    """

    def __init__(
        self,
        d_model: int,
        slots: int = 8,
        segments: int = 5,
        num_heads: int = 4,
        merge: Merge = "outer",
        initial: Start = "learned",
    ) -> None:
        super().__init__()
        if slots < 1 or segments < 1:
            raise ValueError(f"{slots=} and {segments=} must be at least 1.")
        for name, value, known in (("merge", merge, ("outer", "sum")), ("initial", initial, ("learned", "random"))):
            if value not in known:
                raise unknown_name(name, value, known)
        self.d_model, self.slots, self.segments, self.merge = d_model, slots, segments, merge
        self.initial = InitialSlots(segments, slots, d_model) if initial == "learned" else None
        self.norm = LayerNorm(d_model)
        self.recall = CrossAttention(d_model, num_heads)

    def start(self, rows: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "b c n d"]:
        """The memory before the first input."""
        if self.initial is not None:
            return self.initial(rows, dtype)
        drawn = torch.randn(self.segments, self.slots, self.d_model, dtype=dtype, device=self.norm.weight.device)
        return drawn.expand(rows, -1, -1, -1)

    def address(self, state: Float[Tensor, "b c n d"], working: Float[Tensor, "b n d"]) -> Float[Tensor, "b c"]:
        """a: how much of the working memory each segment takes; the weights of a row sum to 1."""
        match = torch.einsum("bcnd,bnd->bc", state, working) / math.sqrt(self.slots * self.d_model)
        return match.softmax(-1)

    def write(self, state: Float[Tensor, "b c n d"], working: Float[Tensor, "b n d"]) -> Float[Tensor, "b c n d"]:
        """The memory after the working memory was merged into it."""
        wanted = (len(working), self.segments, self.slots, self.d_model)
        if tuple(state.shape) != wanted or working.shape[1:] != (self.slots, self.d_model):
            raise ValueError(
                f"a state of shape {tuple(state.shape)} and a working memory of shape {tuple(working.shape)} do not "
                f"fit a long-term memory of {self.segments} segments of {self.slots} slots of width {self.d_model}; "
                "give both memories the same slots and width, and states of the same batch."
            )
        with full_precision(state):
            working = working.to(state.dtype)
            if self.merge == "outer":
                change = torch.einsum("bc,bnd->bcnd", self.address(state, working), working)
            else:
                change = state * working.sum(1)[:, None, None]
            return self.norm(state + change)

    def read(self, state: Float[Tensor, "b c n d"], tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """What all slots of all segments answer to every token."""
        slots = state.flatten(1, 2).to(tokens.dtype)
        check_sets(self.d_model, state=slots, tokens=tokens)
        return self.recall(tokens, slots)

    def flops(self, tokens: int) -> int:
        """Forward FLOPs of a read of so many tokens and one merge for one row, a multiply-add counting 2."""
        size = self.segments * self.slots
        merge = (4 if self.merge == "outer" else 2) * size * self.d_model
        return self.recall.flops(tokens, size) + merge

    def reset_parameters(self) -> None:
        """Random slots and maps, and a norm that scales nothing."""
        for module in (self.initial, self.norm, self.recall):
            if module is not None:
                module.reset_parameters()
