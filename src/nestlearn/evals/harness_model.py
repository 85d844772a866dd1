"""A model in the form of the lm-evaluation-harness. Imports that package, the extra `eval`."""

from __future__ import annotations

from typing import Any

import lm_eval.models.huggingface
import torch
from torch import Tensor

from nestlearn.evals.long_context.answers import require_end_of_text

# Decorators hide its type.
_HFLM: Any = lm_eval.models.huggingface.HFLM

ROLLING_WINDOW = 2048
"""Tokens per window of whole-document perplexity without a maximum length: the harness's own default."""
_NO_LIMIT = 1 << 30  # a model with fixed-size memories reads a text of any length


class DocumentLM(_HFLM):
    """Every request is one document: it starts with `<s>` and fresh state, and padding is masked.

    The harness pads prompts on the left; the mask keeps padding out of every memory. Texts to be scored are padded on
    the right, after all scored tokens. Contexts are cut from the left only if ``max_length`` is given; ``cut_requests``
    counts them.

    Args:
        model: a causal language model of transformers, used unchanged.
        tokenizer: the tokenizer that it was trained with; it must have an end-of-text token.
        batch_size: requests per forward pass.
        max_length: the most tokens of a request with its answer; None for no limit. Whole-document perplexity then
            reads windows of 2,048 tokens.

    Raises:
        ValueError: the tokenizer has no end-of-text token.

    Example:
        >>> model = HopeForCausalLM(HopeConfig(mixer="attention", num_hidden_layers=1))
        >>> DocumentLM(model, byte_tokenizer()).tok_batch_encode(["a", "abc"])[0].tolist()
        [[258, 258, 256, 97], [256, 97, 98, 99]]
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8, max_length: int | None = None) -> None:
        require_end_of_text(tokenizer)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        start = tokenizer.bos_token_id
        adds_it = tokenizer("a").input_ids[:1] == [start]
        self._start: list[int] = [] if start is None or adds_it else [start]
        self.cut_requests = 0

    @property
    def max_length(self) -> int:
        """The given limit, or a number above all lengths."""
        return self._max_length or _NO_LIMIT

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context, with the start of the document, and of the continuation to score."""
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        return self._start + context_ids, continuation_ids

    def tok_batch_encode(
        self,
        strings: Any,
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and mask [batch, t] of prompts, each with the start of a document."""
        del truncation  # `left_truncate_len` cuts from the left
        rows = [self._start + self.tok_encode(string) for string in strings]
        if left_truncate_len is not None:
            self.cut_requests += sum(len(row) > left_truncate_len for row in rows)
            rows = [row[-left_truncate_len:] for row in rows]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(longest - len(row), None) if padding_side == "left" else slice(len(row))
            ids[number, place], mask[number, place] = torch.tensor(row), 1
        return ids, mask

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole documents, in windows with fresh state; the first one starts with `<s>`."""
        given, self._max_length = self._max_length, self._max_length or ROLLING_WINDOW
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._max_length = given

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        longest = self.max_length + 1
        self.cut_requests += sum(len(context) + len(continuation) > longest for _, context, continuation in requests)
        # The harness shares a forward pass between requests that differ only in their last token. If their
        # continuations have different lengths, it (0.4.13) scores wrong positions, so the cache is then off.
        scored: dict[tuple[int, ...], set[int]] = {}
        for _, context, continuation in requests:
            scored.setdefault((*context, *continuation[:-1]), set()).add(len(continuation))
        self.logits_cache = all(len(lengths) == 1 for lengths in scored.values())
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [batch, t, vocabulary] from a fresh state, which is not kept."""
        del attn_mask, labels  # of encoder-decoder models
        with torch.inference_mode():
            return self.model(inps, use_cache=False).logits
