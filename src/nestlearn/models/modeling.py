"""Hope as a Hugging Face causal language model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from nestlearn.models.cache import HopeCache, LayerState, Segment
from nestlearn.models.config import HopeConfig
from nestlearn.models.documents import find_documents, put_back, take
from nestlearn.models.files import refuse_pickled_weights
from nestlearn.models.generation import EndedRows
from nestlearn.models.inputs import check_embeds, check_ids, check_labels, may_look, merge_resets, token_mask
from nestlearn.models.layers import HopeBlock, check_checkpointing
from nestlearn.models.remote import NotCopied
from nestlearn.models.segments import SegmentReader
from nestlearn.nn.cms import WriteLevels
from nestlearn.nn.cms.tape import Tape


class HopePreTrainedModel(NotCopied, PreTrainedModel):
    """Base class of the models: initial values of weights, and what the library is told about them."""

    config: HopeConfig
    config_class = HopeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HopeBlock"]  # noqa: RUF012 - the library reads class attributes of these types
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    # Fast weights cannot be returned to an earlier token, so `generate` refuses assisted decoding.
    _is_stateful = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """A saved model, as `transformers.PreTrainedModel.from_pretrained` loads it, from safetensors only.

        Raises:
            ValueError: the weights are a pickle.
        """
        if pretrained_model_name_or_path is not None:  # None: the weights come as a state_dict
            refuse_pickled_weights(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
            kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of one module; children come before their parents, and loaded weights are kept.

        Linear layers and embeddings start normal, norms at 1; a module with parameters of its own (the initial
        weights of a memory, gate biases, convolutions) sets them itself.
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            _fill(module.weight, lambda w: w.normal_(0, self.config.initializer_range))
            if isinstance(module, nn.Linear) and module.bias is not None:
                _fill(module.bias, torch.Tensor.zero_)
        elif isinstance(module, nn.RMSNorm):
            _fill(cast(Tensor, module.weight), lambda w: w.fill_(1))
        elif hasattr(module, "reset_parameters") and next(module.parameters(recurse=False), None) is not None:
            _reset_but_keep_loaded(module)


def _fill(weight: Tensor, fill: Any) -> None:
    """Set a weight unless `from_pretrained` has loaded it."""
    if not getattr(weight, "_is_hf_initialized", False):
        fill(weight)


def _reset_but_keep_loaded(module: nn.Module) -> None:
    """``module.reset_parameters()`` for the parameters that `from_pretrained` did not load."""
    loaded = [(p, p.clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
    cast(Any, module).reset_parameters()
    for parameter, value in loaded:
        parameter.copy_(value)


class HopeModel(HopePreTrainedModel):
    """Embedding, blocks and the final norm.

    Example:
        >>> model = HopeModel(HopeConfig(mixer="attention", num_hidden_layers=1))
        >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 128])
    """

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        config.check()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([HopeBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self._signature = config.state_signature()
        first: Any = self.layers[0]
        # Tokens of a segment; None where no level learns from the loss.
        self.segment_length: int | None = first.cms.segment_length
        forgets = all(level.get("reset", True) for level in config.cms)
        self._forgets_documents = forgets and not any(mixer.outlasts_documents for mixer in config.mixers)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "b t d"] | None = None,
        past_key_values: HopeCache | None = None,
        use_cache: bool | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        writes: WriteLevels = True,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_layer: nn.Module | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the blocks; see `HopeForCausalLM.forward` for the arguments.

        Levels that learn from the loss need the ``output_layer``, from hidden states to logits, and ids.
        """
        self._refuse_attentions(kwargs.get("output_attentions"))
        x, ids = self._embed(input_ids, inputs_embeds)
        batch, time = x.shape[:2]
        cache, keep = self._cache(past_key_values, use_cache, batch)
        mask = token_mask(attention_mask, batch, time, x.device)
        position_ids = kwargs.get("position_ids")
        reset, pending = merge_resets(self.config.reset_token_id, ids, reset, position_ids, mask, cache, (batch, time))
        wanted = output_hidden_states or self.config.output_hidden_states
        visited: list[Tensor] | None = [x] if wanted else None
        segments: list[Segment] = []
        reader = self._reader(output_layer, ids)
        check_checkpointing(self, keep, reader is not None)
        apart = mask is None and cache is None and not wanted and self._forgets_documents
        # Blocks divided by FSDP2 must be called equally often by all processes.
        apart = apart and not hasattr(self.layers[0], "unshard")
        if apart and reset is not None and may_look(reset):
            documents = find_documents(reset)
            parts = [self._document(reader, part, ids, tokens, writes) for part, tokens in take(x, documents)]
            x, after = put_back(parts, documents, x), []
        elif reader is not None and ids is not None:
            before = (cache.layers, cache.segments) if cache else ([], [])
            x, after, segments, visited = reader.read(x, ids, *before, mask, reset, writes, keep, bool(wanted))
        else:
            x, after = self.run_blocks(x, cache.layers if cache else [], mask, reset, writes, keep, visited)
        x = self.norm(x)
        if visited is not None:
            visited[-1] = x
        if keep and cache is not None:
            cache.update(after, time, self._signature, segments)
            cache.pending_reset = pending
        output = BaseModelOutputWithPast(
            last_hidden_state=cast(Any, x),
            past_key_values=cast(Any, cache),
            hidden_states=cast(Any, None if visited is None else tuple(visited)),
        )
        return output if return_dict is not False and self.config.return_dict else output.to_tuple()

    def _refuse_attentions(self, wanted: bool | None) -> None:
        """Raise ValueError where attention weights are wanted: no mixer has them."""
        if wanted or (wanted is None and self.config.output_attentions):
            types = ", ".join(dict.fromkeys(mixer.type for mixer in self.config.mixers))
            raise ValueError(
                f"output_attentions=True: the mixers of this model ({types}) "
                "return no attention weights. Memories have none, and attention runs in fused kernels that never store "
                "them. Leave it out; output_hidden_states=True gives the output of every layer."
            )

    def _reader(self, output_layer: nn.Module | None, ids: Tensor | None) -> SegmentReader | None:
        """The reader of segments, if levels learn from the loss."""
        if self.segment_length is None:
            return None
        if output_layer is None or ids is None:
            lacking = "input_ids (inputs_embeds hold no targets)" if ids is None else "an output layer"
            raise ValueError(
                f"the levels of this model learn from the next-token loss (cms_signal='loss'), which needs {lacking}."
                " Run HopeForCausalLM with input_ids."
            )
        return SegmentReader(self, output_layer, self.segment_length)

    def _document(
        self, reader: SegmentReader | None, x: Tensor, ids: Tensor | None, tokens: Tensor, writes: WriteLevels
    ) -> Tensor:
        """The output for documents that have a row each."""
        if reader is None or ids is None:
            return self.run_blocks(x, [], None, None, writes, False)[0]
        return reader.read(x, ids.flatten()[tokens], [], [], None, None, writes, False)[0]

    def run_blocks(
        self,
        x: Tensor,
        before: list[LayerState],
        mask: Tensor | None,
        reset: Tensor | None,
        writes: WriteLevels,
        keep: bool,
        visited: list[Tensor] | None = None,
        tape: Tape | None = None,
    ) -> tuple[Tensor, list[LayerState]]:
        """The output of the last block and the states of all (of none without ``keep``)."""
        states: list[LayerState | None] = [*before] or [None] * len(self.layers)
        after: list[LayerState] = []
        for i, (block, state) in enumerate(zip(self.layers, states, strict=True)):
            x, state = block(x, state, mask, reset, writes, keep, tape, i)
            if state is not None:
                after.append(state)
            if visited is not None:
                visited.append(x)
        return x, after

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The first hidden states, and the ids where they were given."""
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"give exactly one of input_ids and inputs_embeds, received {given}.")
        if input_ids is not None:
            check_ids(input_ids, self.config.vocab_size)
            return self.embed_tokens(input_ids), input_ids
        embeds = cast(Tensor, inputs_embeds)
        check_embeds(embeds, self.config.hidden_size)
        return embeds, None

    def _cache(self, cache: HopeCache | None, use_cache: bool | None, batch: int) -> tuple[HopeCache | None, bool]:
        """The cache to read (None for a fresh state) and whether to store the final state in it."""
        if cache is not None and not isinstance(cache, HopeCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; this model keeps its state in a nestlearn.HopeCache "
                "(leave it out to start fresh)."
            )
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        if cache is None:
            return (HopeCache() if use_cache else None), use_cache
        cache.check(self._signature, batch)
        return cache, use_cache


class HopeForCausalLM(HopePreTrainedModel, GenerationMixin):
    """A language model whose layers go on learning while they read.

    Example:
        >>> model = HopeForCausalLM(HopeConfig(mixer="attention", num_hidden_layers=1))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model(ids, labels=ids).logits.shape
        torch.Size([1, 3, 259])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - the library's type

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.model = HopeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "b t d"] | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        past_key_values: HopeCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        reset: Bool[Tensor, "b t"] | None = None,
        writes: WriteLevels = True,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token, and the loss if labels are given.

        Args:
            input_ids: token ids.
            attention_mask: 1 for a real token, 0 for padding (anywhere); of at least T columns, the last T count.
            inputs_embeds: instead of ``input_ids``.
            labels: targets, shifted inside; -100 is ignored.
            past_key_values: the state to go on from, updated in place unless ``use_cache=False``.
            use_cache: whether to return the final state. Default: in evaluation without labels, or with a cache given.
            logits_to_keep: number of last positions to compute logits for (or their indices); 0 for all.
            reset: True at a token that starts a new document; joined with ``input_ids == config.reset_token_id`` and
                with ``position_ids == 0`` where position ids are given.
            writes: False: every memory is read and learns nothing (inner step 0). Numbers: of the continuum memories
                only these levels learn (0 is the fastest); the mixers learn as well.
            kwargs: ``num_items_in_batch`` (divides the summed loss), ``output_hidden_states``, ``position_ids``.

        Raises:
            ValueError: an empty input, a wrong dtype or shape, an id or label outside the vocabulary, a cache that does
                not fit, ``output_attentions=True`` (no mixer returns attention weights).
        """
        if use_cache is None and labels is not None and past_key_values is None:
            use_cache = False
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            reset=reset,
            writes=writes,
            output_layer=self.lm_head,
            **kwargs | {"return_dict": True},
        )
        hidden = output.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = next_token_loss(logits, labels, kwargs.get("num_items_in_batch"))
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
        return result if return_dict is not False and self.config.return_dict else result.to_tuple()

    # -- generation ---------------------------------------------------------------------------------------------

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` must not make a KV cache; see `_prepare_cache_for_generation`."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Put an empty `HopeCache` where the caller gave none."""
        generation = cast(Any, super())
        prepared = generation._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HopeCache()
        return prepared

    # The library's own parameters pass through.
    def _sample(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, *, stopping_criteria: Any, **kwargs: Any
    ) -> Any:
        """The library's loop, in which rows that have ended no longer learn."""
        ended = EndedRows(stopping_criteria)
        return cast(Any, super())._sample(input_ids, stopping_criteria=ended, ended_rows=ended, **kwargs)

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: HopeCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The library's inputs of one step.

        The state has already used the mask of the prompt. Later, only the tokens after the end of a row are padding.
        """
        if next_sequence_length is not None and next_sequence_length < 1:
            given = input_ids if inputs_embeds is None else inputs_embeds
            raise ValueError(
                f"the prompt has {given.shape[1]} columns, but the cache has already read "
                f"{0 if past_key_values is None else past_key_values.seen}. Give the whole sequence, the part already "
                "read included, or only the new tokens with an attention_mask of (read + new) columns."
            )
        if past_key_values is not None and not is_first_iteration:
            attention_mask = None
        ended: EndedRows | None = kwargs.pop("ended_rows", None)
        if ended is not None:
            attention_mask = ended.hide(attention_mask, input_ids)
        return cast(Any, super()).prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )


def next_token_loss(
    logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"], num_items: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """Mean of ``-ln p(label_{t+1} | tokens up to t)`` in nats, in fp32 or wider.

    Labels of -100 are left out. With ``num_items`` the sum is divided by it instead (gradient accumulation over unequal
    batches). If no label is left, the loss and its gradients are 0, and there is a warning: the mean would be NaN, and
    destroy the weights of a run. With ``num_items`` such a part of a batch is usual, so there is no warning.

    Values of labels are checked on the CPU, outside compiled code. On other devices a label out of range fails inside
    the device's own kernel.

    Raises:
        ValueError: labels of another shape or dtype, outside the vocabulary, or with logits of only a part of the
            sequence.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, the logits {tuple(logits.shape[:2])}; give one label per input "
            "token and leave logits_to_keep at 0 when training."
        )
    target = labels[:, 1:]
    if check_labels(target, logits.shape[-1]) == 0 and num_items is None:
        warnings.warn(
            "every label that could be predicted is -100, so the loss and its gradients are 0; check what masks the "
            "labels (a prompt as long as the text, a text of one token).",
            stacklevel=2,
        )
    return mean_nats(logits[:, :-1], target, num_items)


def mean_nats(
    logits: Float[Tensor, "b t n"], target: Int[Tensor, "b t"], num_items: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """Mean of ``-ln p(target)`` in nats over targets that are not -100, in fp32 or wider; 0 if there are none.

    Args:
        logits: of every token.
        target: of every token.
        num_items: divides the sum instead of the number of targets.

    Example:
        >>> mean_nats(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
        tensor(1.3863)
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = target.to(logits.device, torch.long).flatten()
    total = F.cross_entropy(wide.flatten(0, 1), target, ignore_index=-100, reduction="sum")
    count = torch.as_tensor((target != -100).sum() if num_items is None else num_items, device=total.device)
    return total / count.clamp(min=1)
