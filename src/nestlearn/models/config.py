"""The configuration of every model of this package: a mixer per layer, and the levels of its feed-forward network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from transformers import PreTrainedConfig

from nestlearn.fields import LARGEST, Between, Positive, Size, check_fields, from_mapping, unknown_name
from nestlearn.models.remote import NotCopied, auto_map, write_loader
from nestlearn.nn.cms import Meta, Signal, Variant
from nestlearn.nn.cms.level import Level
from nestlearn.nn.cms.nested import TransferBy
from nestlearn.nn.config import MixerConfig, mixer_config
from nestlearn.nn.ffn import FFNActivation

TokenId = Annotated[int, Between(0, LARGEST)]

# Keys that the Hugging Face libraries themselves write into a saved configuration or pass when loading one.
_LIBRARY_FIELDS = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "base_model_pp_plan",
        "base_model_tp_plan",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_weights",
    }
)


class HopeConfig(NotCopied, PreTrainedConfig):
    """Configuration of `HopeForCausalLM`.

    Args:
        vocab_size: number of token ids; the default is the byte vocabulary (256 bytes, bos, eos, pad).
        hidden_size: width of the residual stream.
        num_hidden_layers: blocks; each is ``x + mixer(norm(x))`` then ``x + cms(norm(x))``.
        num_attention_heads: heads of every mixer; must divide ``hidden_size``.
        mixer: the sequence layer of every block: a `nestlearn.nn.MixerConfig`, a mapping of its ``type`` and fields
            such as ``{"type": "attention", "window": 256}``, or the name of a type, whose defaults are meant; one for
            all layers, or a list with one per layer. The field holds mappings with every option filled in.
        cms: levels of the feed-forward network, fastest first, as mappings of the fields of `nestlearn.nn.Level`;
            ``{"period": None, "expansion": 4}`` alone is an ordinary frozen FFN. Without ``lr`` a level takes steps of
            1, or of 0.01 if it learns from the loss.
        cms_variant: how levels are connected: ``"sequential"``, ``"nested"`` or ``"independent"``.
        cms_signal: what levels learn from: ``"local"``, their own objective; ``"loss"``, the next-token loss of the
            tokens just read, in segments of the smallest period.
        cms_meta: ``"first"`` order outer gradients take what a loss writes as a constant, ``"second"`` order ones go
            through it.
        cms_transfer: rho of the nested variant: the part of what a level learned that its initial weights keep.
        cms_transfer_by: whether they move by what was learned, the ``"difference"``, or by the exact meta-
            ``"gradient"``.
        ffn_activation: ``"swiglu"`` or ``"gelu"``.
        rms_norm_eps: epsilon of the norms of blocks and levels; mixers have a ``norm_eps`` of their own.
        initializer_range: standard deviation of the initial linear and embedding weights.
        tie_word_embeddings: whether the output layer shares the embedding's weights.
        reset_token_id: token that starts a new document: all fast state returns to its initial value before it.
        use_cache: whether evaluation returns a `HopeCache`.

    Raises:
        ValueError: an unknown field, mixer type or field of a mixer or level (with the closest known names), or sizes
            that do not fit.

    Example:
        >>> config = HopeConfig(mixer=["attention", {"type": "titans_mac", "segment_length": 64}], num_hidden_layers=2)
        >>> [mixer.type for mixer in config.mixers], config.mixers[1].segment_length
        (['attention', 'titans_mac'], 64)
    """

    model_type = "hope"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: Size = 259
    hidden_size: Size = 128
    num_hidden_layers: Size = 3
    num_attention_heads: Size = 4
    # Given in any form that `mixer_config` takes; held as JSON values.
    mixer: Any = field(default_factory=lambda: {"type": "self_modifying", "architecture": "matrix"})
    cms: list[dict[str, Any]] = field(default_factory=lambda: [{"period": None, "expansion": 4}])
    cms_variant: Variant = "sequential"
    cms_signal: Signal = "local"
    cms_meta: Meta = "first"
    cms_transfer: Annotated[float, Between(0, 1, open="low")] = 0.5
    cms_transfer_by: TransferBy = "difference"
    ffn_activation: FFNActivation = "swiglu"
    rms_norm_eps: Positive = 1e-6
    initializer_range: Annotated[float, Between(0, 100)] = 0.02
    tie_word_embeddings: bool = False
    reset_token_id: TokenId | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in _LIBRARY_FIELDS:
                raise unknown_name("HopeConfig field", name, self.field_names())
        super().__post_init__(**kwargs)
        self.mixer = self._written_out(self.mixer)
        self.check()

    @staticmethod
    def _written_out(mixer: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """The field ``mixer`` from all its forms, as JSON values with every option.

        Raises:
            ValueError: a mixer that does not exist or has options that do not fit.
        """
        several = isinstance(mixer, (list, tuple))
        found = []
        for layer, value in enumerate(mixer if several else [mixer]):
            try:
                found.append(mixer_config(value).to_dict())
            except ValueError as error:
                raise ValueError(f"mixer[{layer}]: {error}" if several else f"mixer: {error}") from None
        return found if several else found[0]

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of the fields listed above."""
        return [f.name for f in fields(cls) if f.name in cls.__annotations__]

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> HopeConfig:
        """The configuration of a named preset, with some fields changed.

        A mapping ``mixer`` without a ``type`` changes single options of the preset's mixer.

        Raises:
            ValueError: unknown preset or field; `nestlearn.presets` lists the presets.

        Example:
            >>> HopeConfig.from_preset("hope-tiny", mixer={"chunk_size": 32}).mixers[0].chunk_size
            32
        """
        from nestlearn.models.presets import preset

        fields = preset(name)
        mixer = overrides.get("mixer")
        if isinstance(mixer, Mapping) and "type" not in mixer:
            overrides["mixer"] = {**fields["mixer"], **mixer}
        return cls(**(fields | overrides))

    @property
    def mixers(self) -> list[MixerConfig]:
        """The mixer of every layer."""
        several = isinstance(self.mixer, list)
        found = [mixer_config(value) for value in (self.mixer if several else [self.mixer])]
        return found if several else found * self.num_hidden_layers

    @property
    def mixer_counts(self) -> list[tuple[MixerConfig, int]]:
        """Every different mixer, in the order of the layers, and how many layers have it."""
        mixers = self.mixers
        return [(mixer, mixers.count(mixer)) for i, mixer in enumerate(mixers) if mixer not in mixers[:i]]

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the configuration, and the file by which a process that has not imported this package loads it."""
        self.auto_map = auto_map()
        if not Path(save_directory).is_file():  # the library's own error says what is wrong there
            write_loader(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def check(self) -> None:
        """Raise ValueError unless the fields fit each other."""
        check_fields(self, HopeConfig)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; "
                "choose a number of heads that divides it."
            )
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(
                f"mixer lists {len(self.mixers)} layers, but num_hidden_layers={self.num_hidden_layers}; "
                "give one mixer per layer, or one for all."
            )
        for mixer, _ in self.mixer_counts:
            try:
                mixer.check_sizes(self.hidden_size, self.num_attention_heads)
            except ValueError as error:
                raise ValueError(
                    f"hidden_size={self.hidden_size} and num_attention_heads={self.num_attention_heads} do not fit the "
                    f"mixer {mixer.type!r}: {error}"
                ) from None
        self._check_token_ids()
        self._check_levels()

    def _check_token_ids(self) -> None:
        """Raise ValueError for a special token that the vocabulary does not have."""
        for name in ("reset_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, (list, tuple)) else [value]:
                if token is not None and token >= self.vocab_size:
                    raise ValueError(
                        f"{name}={value!r} is not an id of a vocabulary of vocab_size={self.vocab_size}; use the "
                        "tokenizer's own ids and size, or None."
                    )

    def _check_levels(self) -> None:
        """Raise ValueError for a level that does not exist."""
        if not self.cms:
            raise ValueError(f"cms={self.cms!r} must be a list of at least one mapping, such as {{'expansion': 4}}.")
        for number, level in enumerate(self.cms):
            try:
                from_mapping(Level, level, "field of a cms level")
            except ValueError as error:
                raise ValueError(f"cms[{number}]: {error}") from None

    def state_signature(self) -> dict[str, Any]:
        """The fields that determine the shape and the meaning of a `HopeCache` of this model, as JSON values."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "cms", "ffn_activation", "cms_variant",
                 "cms_signal", "cms_transfer_by")  # fmt: skip
        found = {name: getattr(self, name) for name in names}
        mixers = [mixer.to_dict() for mixer in self.mixers]
        found["mixer"] = mixers if any(mixer != mixers[0] for mixer in mixers) else mixers[0]
        if self.cms_variant == "nested":
            found["cms_transfer"] = self.cms_transfer
        return json.loads(json.dumps(found))
