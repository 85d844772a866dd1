"""Working memory: a few slots that tokens compete to enter."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nestlearn.nn.common import full_precision, wide_dtype
from nestlearn.nn.cross_attention import CrossAttention, InitialSlots, check_sets


def check_competition(slots: int, topk: int) -> None:
    """Raise ValueError unless at most as many tokens win as there are slots."""
    if slots < 1 or topk < 1:
        raise ValueError(f"{slots=} and {topk=} must be at least 1.")
    if topk > slots:
        raise ValueError(
            f"{topk=} is larger than {slots=}: a slot would take in more tokens than the memory has slots, and tokens "
            "would no longer compete. Use a smaller topk or more slots."
        )


class WorkingMemory(nn.Module):
    r"""N slots, written by attention with competition and read by attention (PMI, arXiv 2310.09297).

        A = softmax over the k best tokens of (M W_q)(X W_k)ᵀ / √e  times  X W_v        slots ask, tokens answer
        (i, f) = W_g [A; tanh(M)] + b,        M ← σ(f + 1) ⊙ M + σ(i) ⊙ tanh(A)         gated update
        U_w = softmax((H W_q')(M W_k')ᵀ / √e) M W_v'                                    tokens ask, slots answer

    per head of width e, for tokens X and slots M. The state is the tensor M ``[b, slots, d]``, float32 or wider: the
    caller keeps it. A row without tokens keeps its slots as they are.

    Args:
        d_model: width of tokens and slots.
        slots: N.
        num_heads: heads of both attentions; must divide ``d_model``.
        topk: k, the tokens per slot and head that win the competition; at most ``slots``.

    Raises:
        ValueError: k larger than the slots, heads that do not divide the width, or inputs of unequal length.

    Example:
        >>> memory = WorkingMemory(16, slots=4, num_heads=2, topk=2)
        >>> x = torch.randn(3, 10, 16)
        >>> state = memory.write(memory.start(3), x)
        >>> state.shape, memory.read(state, x).shape
        (torch.Size([3, 4, 16]), torch.Size([3, 10, 16]))
    """

    def __init__(self, d_model: int, slots: int = 8, num_heads: int = 4, topk: int = 5) -> None:
        super().__init__()
        check_competition(slots, topk)
        self.d_model, self.slots = d_model, slots
        self.initial = InitialSlots(slots, d_model)
        self.take_in = CrossAttention(d_model, num_heads, topk)
        self.gates = nn.Linear(2 * d_model, 2 * d_model)
        self.recall = CrossAttention(d_model, num_heads)

    def start(self, rows: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "b n d"]:
        """The learned slots before the first token."""
        return self.initial(rows, dtype)

    def write(
        self, state: Float[Tensor, "b n d"], tokens: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """The slots after reading the tokens together; ``mask`` is False at tokens that are left out."""
        check_sets(self.d_model, state=state, tokens=tokens)
        if mask is not None and mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"mask has the shape {tuple(mask.shape)}, the tokens have {tuple(tokens.shape[:2])}; give one flag per "
                "token, and pad rows of unequal length to one length."
            )
        # A row without tokens attends to all of them, which is discarded: attention to nothing would be NaN.
        some = None if mask is None else mask.any(1)
        allowed = None if mask is None or some is None else (mask | ~some.unsqueeze(1)).unsqueeze(1)
        slots = state.to(tokens.dtype)
        answers = self.take_in(slots, tokens, allowed)
        gates = self.gates(torch.cat([answers, slots.tanh()], -1))
        with full_precision(tokens):
            let_in, keep = gates.to(wide_dtype(tokens)).chunk(2, -1)
            new = (keep + 1).sigmoid() * state + let_in.sigmoid() * answers.to(state.dtype).tanh()
        return new if some is None else torch.where(some.view(-1, 1, 1), new, state)

    def read(self, state: Float[Tensor, "b n d"], tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """What the slots answer to every token."""
        return self.recall(tokens, state.to(tokens.dtype))

    def flops(self, tokens: int) -> int:
        """Forward FLOPs of a read and a write of so many tokens for one row, a multiply-add counting 2."""
        gates = 2 * self.slots * self.gates.weight.numel()
        return self.take_in.flops(self.slots, tokens) + gates + self.recall.flops(tokens, self.slots)

    def reset_parameters(self) -> None:
        """Random slots and maps; gates keep 73 % and let half in."""
        for module in (self.initial, self.take_in, self.recall):
            module.reset_parameters()
        self.gates.reset_parameters()
        nn.init.zeros_(self.gates.bias)
