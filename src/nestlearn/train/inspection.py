"""Size and cost of a model, computed without memory for its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from nestlearn.models import HopeConfig, HopeForCausalLM, flops
from nestlearn.models.flops import meta_model, row_bytes
from nestlearn.models.modeling import next_token_loss
from nestlearn.models.stacking.model import StackedModel
from nestlearn.nn import MixerConfig

# Float32 weights, gradients and the two moments of AdamW.
BYTES_PER_TRAINED_PARAMETER = 16


class Facts(Protocol):
    """What `nestlearn info` prints of a model."""

    def as_dict(self) -> dict[str, Any]: ...
    def rows(self) -> list[tuple[str, str]]: ...


@dataclass(frozen=True)
class ModelFacts:
    """What `nestlearn info` prints; sizes in bytes, FLOPs of one token with a multiply-add counting 2."""

    mixers: list[str]
    parameters: int
    parameters_without_embeddings: int
    context_length: int
    forward_flops_per_token: int
    training_flops_per_token: int
    state_bytes_per_row: int
    level_bytes_per_row: int
    weight_bytes: int
    training_bytes_without_activations: int
    batch_size: int
    activation_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """All facts, JSON-able."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each fact, for a table."""
        names = ", ".join(f"{self.mixers.count(name)} × {name}" for name in dict.fromkeys(self.mixers))
        at = f"at {self.context_length:,} tokens"
        return [
            ("layers", names),
            ("parameters", f"{self.parameters:,}"),
            ("  without embeddings", f"{self.parameters_without_embeddings:,}"),
            (f"FLOPs per token, forward, {at}", f"{self.forward_flops_per_token:,}"),
            ("FLOPs per token, training", f"{self.training_flops_per_token:,}"),
            (f"state per row {at}", _size(self.state_bytes_per_row)),
            ("  of it levels of the continuum memory", _size(self.level_bytes_per_row)),
            ("weights, float32", _size(self.weight_bytes)),
            ("training: weights, gradients, AdamW", _size(self.training_bytes_without_activations)),
            (f"training: activations, batch {self.batch_size}, {at}", _size(self.activation_bytes)),
        ]


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


@dataclass(frozen=True)
class PretrainedFacts:
    """Facts of any causal language model of transformers; sizes in bytes, FLOPs with a multiply-add counting 2.

    Attributes:
        positions: the longest text; None if there is no limit.
        context_length: tokens at which ``forward_flops_per_token`` and ``state_bytes_per_row`` (keys and values) are
            counted.
        level_parameters: parameters that stacking has added; 0 for a model without levels.
        levels: periods in tokens of the levels, as text; None for a model without levels.
    """

    model_type: str
    layers: int
    hidden_size: int
    vocabulary: int
    positions: int | None
    parameters: int
    parameters_without_embeddings: int
    context_length: int
    forward_flops_per_token: int
    state_bytes_per_row: int
    dtype: str
    weight_bytes: int
    level_parameters: int = 0
    levels: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """All facts, JSON-able."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each fact, for a table."""
        at = f"at {self.context_length:,} tokens"
        rows = [
            ("family", self.model_type),
            ("layers, width, vocabulary", f"{self.layers}, {self.hidden_size:,}, {self.vocabulary:,}"),
            ("longest text", "no limit" if self.positions is None else f"{self.positions:,} tokens"),
            ("parameters", f"{self.parameters:,}"),
            ("  without embeddings", f"{self.parameters_without_embeddings:,}"),
            (f"FLOPs per token, forward, {at}", f"{self.forward_flops_per_token:,}"),
            (f"keys and values per row {at}", _size(self.state_bytes_per_row)),
            (f"weights, {self.dtype}", _size(self.weight_bytes)),
        ]
        if self.levels is not None:
            rows.append(("levels", self.levels))
            rows.append(("  parameters of their own", f"{self.level_parameters:,}"))
        return rows


def pretrained_facts(
    config: PretrainedConfig, context_length: int, dtype: torch.dtype | None = None
) -> PretrainedFacts:
    """The facts of a model from its configuration.

    The context is cut to the positions of the model.

    Raises:
        ValueError: transformers has no causal language model for the configuration.
    """
    weights = dtype or getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=weights).eval()
    positions = getattr(config, "max_position_embeddings", None)
    length = min(context_length, positions or context_length)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cache = model(torch.zeros(1, length, dtype=torch.long, device="meta"), use_cache=True).past_key_values
    state = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    ends = {id(end.weight): end.weight.numel() for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    parameters = sum(p.numel() for p in model.parameters())
    return PretrainedFacts(
        model_type=config.model_type.removeprefix("stacked_"),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocabulary=config.vocab_size,
        positions=positions,
        parameters=parameters,
        parameters_without_embeddings=parameters - sum(ends.values()),
        context_length=length,
        forward_flops_per_token=counter.get_total_flops() // length,
        state_bytes_per_row=state,
        dtype=str(weights).removeprefix("torch."),
        weight_bytes=sum(p.nbytes for p in model.parameters()),
        **_levels_of(model),
    )


def _levels_of(model: Any) -> dict[str, Any]:
    if not isinstance(model, StackedModel):
        return {}
    plan = model.stack_plan
    periods = ", ".join("frozen" if period is None else f"{period:,}" for period in plan.periods)
    own = sum(p.numel() for module in model.stacked_mlps().values() for p in module.levels.parameters())
    return {"levels": f"{periods} tokens on {len(plan.paths)} MLPs, mode {plan.mode}", "level_parameters": own}


def model_facts(config: HopeConfig, context_length: int, batch_size: int) -> ModelFacts:
    """Count parameters, FLOPs, state and activations of a model on the meta device.

    Activations are those a forward pass keeps for the backward pass of one batch, without gradient
    checkpointing and without an allocator's overhead.
    """
    model = meta_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    # Tied weights are one tensor and count once.
    embeddings = {id(p): p.numel() for p in (model.model.embed_tokens.weight, model.lm_head.weight)}
    forward = int(flops(config, context_length))
    return ModelFacts(
        mixers=[mixer.type for mixer in config.mixers],
        parameters=parameters,
        parameters_without_embeddings=parameters - sum(embeddings.values()),
        context_length=context_length,
        forward_flops_per_token=forward,
        training_flops_per_token=3 * forward,
        state_bytes_per_row=_state_bytes(config, context_length),
        level_bytes_per_row=row_bytes(config).levels,
        weight_bytes=4 * parameters,
        training_bytes_without_activations=BYTES_PER_TRAINED_PARAMETER * parameters,
        batch_size=batch_size,
        activation_bytes=_activation_bytes(config, context_length, batch_size),
    )


def _state_bytes(config: HopeConfig, context_length: int) -> int:
    """State of one row, layer by layer; only attention has to read the context, or its window, to know."""
    total = 0
    for mixer, count, model in _single_layers(config):
        window = mixer.stored_tokens
        length = context_length if window is None else min(context_length, max(1, window))
        tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
        with torch.no_grad():
            cache = model.eval()(tokens, use_cache=True, logits_to_keep=1).past_key_values
        total += count * cache.nbytes()
    return total


def _activation_bytes(config: HopeConfig, context_length: int, batch_size: int) -> int:
    """Bytes kept for backward by every block and by the output layer, times the rows."""
    layers = list(_single_layers(config))
    total = 0
    for mixer, count, model in layers:
        # Per token, every period after the first keeps the same; for attention short texts leave out the square of
        # scores, which fused kernels never store.
        chunk = mixer.work_period
        block = partial(model.train().model.layers[0], return_state=False)
        one, two = (_saved_bytes(model, length, block) for length in (chunk, 2 * chunk))
        total += count * max(0, one + (two - one) * (context_length - chunk) // chunk)
    model = layers[0][2]
    labels = torch.zeros(1, context_length, dtype=torch.long, device="meta")
    total += _saved_bytes(model, context_length, lambda x: next_token_loss(model.lm_head(x), labels))
    return batch_size * total


def _single_layers(config: HopeConfig) -> Iterator[tuple[MixerConfig, int, HopeForCausalLM]]:
    """Every different mixer, its number of layers, and a model of one such layer on the meta device."""
    for mixer, count in config.mixer_counts:
        fields = {**config.to_dict(), "mixer": mixer, "num_hidden_layers": 1, "reset_token_id": None}
        yield mixer, count, meta_model(HopeConfig(**{name: fields[name] for name in HopeConfig.field_names()}))


def _saved_bytes(model: HopeForCausalLM, length: int, run: Callable[[Tensor], Any]) -> int:
    """Bytes of the storages, weights aside, that `run` keeps for backward on hidden states of `length` tokens."""
    # Identity of storages: on the meta device all addresses are 0, and views of one storage must count once.
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage  # held, so that its identity stays its own
        return tensor

    x = torch.zeros(1, length, model.config.hidden_size, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    return sum(storage.nbytes() for storage in saved.values())
