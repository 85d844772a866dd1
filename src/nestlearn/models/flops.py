"""The cost of a model, from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from nestlearn.models.cache import HopeCache
from nestlearn.models.config import HopeConfig
from nestlearn.models.modeling import HopeForCausalLM
from nestlearn.nn import MixerConfig
from nestlearn.nn.state import state_bytes


def meta_model(config: HopeConfig) -> HopeForCausalLM:
    """The model without memory for its weights (on the meta device): for counting."""
    with torch.device("meta"):
        return HopeForCausalLM(config)


def _by_mixer(config: HopeConfig) -> Iterator[tuple[MixerConfig, int, HopeForCausalLM]]:
    """Each different mixer, the number of its layers, and a model of one such layer on the meta device."""
    fields = {name: getattr(config, name) for name in config.field_names()}
    for mixer, count in config.mixer_counts:
        yield mixer, count, meta_model(HopeConfig(**fields | {"mixer": mixer, "num_hidden_layers": 1})).eval()


def flops(config: HopeConfig, context_length: int = 2048) -> int:
    """Forward FLOPs per token at a context of that many tokens; training costs about three times as much.

    Sums what each layer's mixer and continuum memory count for themselves, and the output layer; a multiply-add is 2.
    Norms, activations and the embedding look-up are left out. If levels learn from the loss, a forward pass contains a
    backward pass of every segment.

    Raises:
        ValueError: a context below one token.

    Example:
        >>> flops(HopeConfig(mixer="attention", num_hidden_layers=1), context_length=1)
        462080
    """
    if context_length < 1:
        raise ValueError(f"{context_length=} must be at least 1 token.")
    total, segment = 2 * config.hidden_size * config.vocab_size, None
    for _, count, model in _by_mixer(config):
        total += count * model.model.layers[0].flops_per_token(context_length)  # pyright: ignore[reportCallIssue]
        segment = model.model.segment_length
    if segment is None:
        return total
    learning = (context_length - 1) // segment * segment
    # The backward pass of a segment goes to the inputs of layers and not to slow weights: once the forward pass.
    return total + total * learning // context_length


class RowBytes(NamedTuple):
    """Bytes of fast state of one row: of the levels of all continuum memories, of all mixers, and what mixers add
    for every further token (full attention only)."""

    levels: int
    mixers: int
    per_token: int


def row_bytes(config: HopeConfig) -> RowBytes:
    """Fast state of one row in the middle of a chunk and a period, when it is largest.

    A level with a period holds its weights and those of the period's start (``anchor``), and a momentum if its rule has
    one: of a network with n weights 8 n or 12 n bytes. `Level.hidden` and `Level.rank` bound n. Windows are counted
    with two tokens in them.

    Example:
        >>> row_bytes(HopeConfig(mixer="attention", num_hidden_layers=1))
        RowBytes(levels=0, mixers=2075, per_token=1033)
    """
    total = RowBytes(0, 0, 0)
    for mixer, count, model in _by_mixer(config):
        sizes = []
        for tokens in (2, 3):
            cache = HopeCache()
            ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
            with torch.no_grad():
                model(ids, past_key_values=cache, writes=False)
            layer = cache.layers[0]
            sizes.append((state_bytes(layer.cms), state_bytes(layer.mixer)))
        (levels, small), (_, larger) = sizes
        more = larger - small if mixer.stored_tokens is None else 0
        total = RowBytes(*(a + count * b for a, b in zip(total, (levels, small, more), strict=True)))
    return total
