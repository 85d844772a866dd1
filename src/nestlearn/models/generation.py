"""Which columns of a batch that `generate` fills are padding."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import StoppingCriteriaList


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember where each row ended.

    After its end a row gets pad tokens until all rows have ended, but `generate` marks them as real in its attention
    mask. A memory would learn from them; `hide` returns the mask without them.

    Args:
        criteria: the criteria of `generate`. The library pads rows only where one of them knows an end token.

    Example:
        >>> from transformers.generation import EosTokenCriteria
        >>> rows = EndedRows([EosTokenCriteria(2)])
        >>> ids = torch.tensor([[5, 2], [5, 6]])
        >>> rows(ids, None).tolist()
        [True, False]
        >>> rows.hide(None, torch.tensor([[5, 2, 0], [5, 6, 7]])).tolist()
        [[1, 1, 0], [1, 1, 1]]
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self._pads = any(hasattr(one, "eos_token_id") for one in criteria)
        self._ends: Int[Tensor, "b"] | None = None

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Any, **kwargs: Any) -> Bool[Tensor, "b"]:  # type: ignore[override]
        """True for rows that end with the newest column."""
        done = super().__call__(cast(Any, input_ids), scores, **kwargs)
        # One row alone is never padded. Otherwise the loop of the library looks at these values in every step, too.
        if self._pads and len(done) > 1 and bool(done.any()):
            length = torch.full_like(done, input_ids.shape[1], dtype=torch.long)
            known = torch.full_like(length, torch.iinfo(torch.long).max) if self._ends is None else self._ends
            self._ends = torch.where(done, torch.minimum(known, length), known)
        return done

    def hide(self, attention_mask: Tensor | None, input_ids: Int[Tensor, "b t"]) -> Tensor | None:
        """The attention mask with 0 in the columns that came after the end of their row.

        Args:
            attention_mask: as `generate` keeps it; its last columns are those of ``input_ids``. None: all are real.
            input_ids: all columns so far.
        """
        if self._ends is None:
            return attention_mask
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        real = (columns < self._ends.to(input_ids.device)[:, None]).long()
        if attention_mask is None:
            return real
        real = real.to(attention_mask)
        return torch.cat([attention_mask[:, : -real.shape[1]], attention_mask[:, -real.shape[1] :] * real], 1)
