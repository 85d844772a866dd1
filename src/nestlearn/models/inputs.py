"""Checks of a model's inputs, and the two masks the layers take: real tokens and document starts."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from nestlearn.models.cache import HopeCache


def may_look(x: Tensor) -> bool:
    """Whether Python may read values: on the CPU, outside compiled code. Elsewhere the device would have to wait."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless ``input_ids`` is a non-empty integer ``[b, t]`` within the vocabulary."""
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be [batch, tokens] with at least one of each."
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids has dtype {input_ids.dtype}; token ids are torch.long. Pass ids, not embeddings.")
    if may_look(input_ids):
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"input_ids contains {low if low < 0 else high}, but the vocabulary has the ids 0..{vocab_size - 1}. "
                "The tokenizer does not belong to this model; use the one saved with it."
            )


def check_labels(labels: Tensor, vocab_size: int) -> int | None:
    """Number of labels that are not -100; None where values may not be read.

    Raises:
        ValueError: labels that are not integers, or outside the vocabulary.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels has dtype {labels.dtype}; labels are token ids (torch.long), or -100 to be ignored.")
    if not may_look(labels):
        return None
    used = labels[labels != -100]
    if used.numel():
        low, high = int(used.min()), int(used.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"labels contains {low if low < 0 else high}, but the vocabulary has the ids 0..{vocab_size - 1}. Mark "
                "tokens to be ignored with -100; other labels come from the tokenizer saved with the model."
            )
    return used.numel()


def check_embeds(embeds: Tensor, hidden_size: int) -> None:
    """Raise ValueError unless ``embeds`` is a non-empty floating ``[b, t, hidden_size]``."""
    if embeds.dim() != 3 or embeds.numel() == 0 or embeds.shape[-1] != hidden_size:
        raise ValueError(
            f"inputs_embeds has shape {tuple(embeds.shape)}; it must be [batch, tokens, {hidden_size}], not empty."
        )
    if not embeds.is_floating_point():
        raise ValueError(f"inputs_embeds has dtype {embeds.dtype}; embeddings are floating. Pass ids as input_ids.")


def token_mask(
    attention_mask: Tensor | None, batch: int, time: int, device: torch.device
) -> Bool[Tensor, "b t"] | None:
    """True at real tokens; None where all are known to be real.

    The last ``time`` columns of ``attention_mask`` belong to the new tokens; earlier ones to tokens already read.

    Raises:
        ValueError: a mask that is not 2-D, of another batch, or shorter than the input.
    """
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < time:
        raise ValueError(
            f"attention_mask has shape {shape}; it must be [{batch}, {time}] (or longer, its last {time} columns for "
            "the new tokens), 1 for a real token and 0 for padding."
        )
    mask = attention_mask[:, -time:].to(device=device, dtype=torch.bool)
    return None if may_look(mask) and bool(mask.all()) else mask


def _pending(rows: Tensor, mask: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Resets at the first real token of the given rows, and the rows that have none yet."""
    if mask is None:
        first = torch.zeros(shape, dtype=torch.bool, device=rows.device)
        first[:, 0] = True
        return first & rows[:, None], None
    first = mask & (mask.long().cumsum(1) == 1)
    return first & rows[:, None], rows & ~mask.any(1)


def merge_resets(
    reset_token_id: int | None,
    input_ids: Tensor | None,
    reset: Tensor | None,
    position_ids: Tensor | None,
    mask: Tensor | None,
    cache: HopeCache | None,
    shape: tuple[int, int],
) -> tuple[Bool[Tensor, "b t"] | None, Tensor | None]:
    """True at real tokens that start a new document; None where there are known to be none.

    A document starts where any of these says so: an explicit ``reset``, the reset token, a position id of 0, or a row
    that the cache was told to forget. Also returns the rows still to be forgotten, whose new tokens are all padding.

    Raises:
        ValueError: ``reset`` is not Bool[b, t].
    """
    parts: list[Tensor] = []
    if reset is not None:
        if reset.dtype != torch.bool or tuple(reset.shape) != shape:
            raise ValueError(
                f"reset has dtype {reset.dtype} and shape {tuple(reset.shape)}; it must be a bool tensor {list(shape)}."
            )
        parts.append(reset)
    if reset_token_id is not None and input_ids is not None:
        parts.append(input_ids == reset_token_id)
    if position_ids is not None:
        parts.append((position_ids[..., -shape[1] :] == 0).expand(shape))
    rows, remaining = None if cache is None else cache.pending_reset, None
    if rows is not None:
        starts, remaining = _pending(rows, mask, shape)
        parts.append(starts)
    if not parts:
        return None, None
    starts = torch.stack(parts).any(0) if len(parts) > 1 else parts[0]
    starts = starts if mask is None else starts & mask
    fresh = cache is None or not cache.layers
    # At the first token of a fresh state there is nothing to forget.
    seen = starts[:, 1:] if fresh and mask is None else starts
    return (None if may_look(starts) and not bool(seen.any()) else starts), remaining
