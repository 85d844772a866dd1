"""Hope with a head for classes: one label for a sequence, or one for each token."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput

from nestlearn.models.cache import HopeCache
from nestlearn.models.config import HopeConfig
from nestlearn.models.inputs import may_look, token_mask
from nestlearn.models.modeling import HopeModel, HopePreTrainedModel, mean_nats
from nestlearn.nn.cms import WriteLevels


class _Classifier(HopePreTrainedModel):
    """The blocks, and a linear map ``score`` from hidden states to classes.

    Levels that learn from the next-token loss while they read need the output layer of the language model too. It is
    kept as ``lm_head``, and gets no first-order gradient from the labels.
    """

    # The libraries divide a loss by the steps of gradient accumulation.
    accepts_loss_kwargs = False

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.model = HopeModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=self.score_has_bias)
        self.lm_head = None
        if self.model.segment_length is not None:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self.post_init()

    score_has_bias = False

    def _read(self, kwargs: dict[str, Any]) -> Any:
        return self.model(output_layer=self.lm_head, **kwargs | {"return_dict": True})


class HopeForSequenceClassification(_Classifier):
    """Hope with one label, number or set of labels for a sequence, read off at its last real token.

        logits = W h_T,  T = the last token with attention_mask 1

    Every memory has read the whole sequence there. ``config.problem_type`` sets the loss, as in all models of the
    library: ``"single_label_classification"`` (cross-entropy), ``"multi_label_classification"`` (binary cross-entropy
    of every label) or ``"regression"`` (squared error). If it is None, the labels decide when the first come.

    Args:
        config: with ``num_labels`` (2 by default).

    Example:
        >>> config = HopeConfig(num_hidden_layers=1, num_labels=3)
        >>> model = HopeForSequenceClassification(config).eval()
        >>> ids = torch.tensor([[5, 6, 7, 8], [0, 0, 5, 6]])
        >>> mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
        >>> output = model(ids, attention_mask=mask, labels=torch.tensor([2, 0]))
        >>> output.logits.shape, output.loss.shape
        (torch.Size([2, 3]), torch.Size([]))
    """

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "b t d"] | None = None,
        labels: Tensor | None = None,
        past_key_values: HopeCache | None = None,
        use_cache: bool | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        writes: WriteLevels = True,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Logits of each sequence, and the loss if labels are given.

        Args:
            input_ids: token ids.
            attention_mask: 1 for a real token, 0 for padding on any side, which no memory reads. Without a mask all
                tokens are read, and the label is read off at the last token that is not ``config.pad_token_id``.
            inputs_embeds: instead of ``input_ids``; without a mask all are real.
            labels: ``[b]`` classes (-100 is ignored) or numbers, ``[b, num_labels]`` for several labels or numbers.
            past_key_values, reset, writes, kwargs: as of `HopeForCausalLM.forward`.
            use_cache: whether to return the final state. Default: with a cache given.

        Raises:
            ValueError: a label that is no class, a row without a real token, or see `HopeForCausalLM.forward`.
        """
        output = self._read(
            kwargs
            | {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "inputs_embeds": inputs_embeds,
                "past_key_values": past_key_values,
                "use_cache": past_key_values is not None if use_cache is None else use_cache,
                "reset": reset,
                "writes": writes,
            }
        )
        hidden = output.last_hidden_state
        last = last_tokens(self._real(input_ids, attention_mask, hidden), hidden)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        loss = None if labels is None else self._loss(logits, labels)
        result = SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
        return result if return_dict is not False and self.config.return_dict else result.to_tuple()

    def _real(self, ids: Tensor | None, mask: Tensor | None, hidden: Tensor) -> Bool[Tensor, "b t"] | None:
        """Tokens at one of which the label may be read off; None for all."""
        if mask is None and ids is not None and self.config.pad_token_id is not None:
            return ids != self.config.pad_token_id
        return token_mask(mask, hidden.shape[0], hidden.shape[1], hidden.device)

    def _loss(self, logits: Float[Tensor, "b n"], labels: Tensor) -> Float[Tensor, ""]:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        numbers = self.config.problem_type not in (None, "single_label_classification") or labels.is_floating_point()
        if numbers or self.num_labels == 1:
            labels = labels.to(wide)
        else:
            check_classes(labels, self.num_labels)
        return self.loss_function(logits=wide, labels=labels, pooled_logits=wide, config=self.config)


class HopeForTokenClassification(_Classifier):
    """Hope with a label for each token: ``logits_t = W h_t + b``. A token's label is read off before later tokens are.

    Args:
        config: with ``num_labels`` (2 by default).

    Example:
        >>> model = HopeForTokenClassification(HopeConfig(num_hidden_layers=1, num_labels=5))
        >>> output = model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[4, -100, 0]]))
        >>> output.logits.shape, output.loss.shape
        (torch.Size([1, 3, 5]), torch.Size([]))
    """

    accepts_loss_kwargs = True
    score_has_bias = True

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "b t d"] | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        writes: WriteLevels = True,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits of each token, and the mean loss of those with a label.

        Args:
            labels: classes, not shifted; -100 is ignored. If none is left, the loss and its gradients are 0.
            input_ids, attention_mask, inputs_embeds, reset, writes, kwargs: as of `HopeForCausalLM.forward`.

        Raises:
            ValueError: a label that is no class, labels of another shape, or see `HopeForCausalLM.forward`.
        """
        count = kwargs.pop("num_items_in_batch", None)
        output = self._read(
            {"use_cache": False}
            | kwargs
            | {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "inputs_embeds": inputs_embeds,
                "reset": reset,
                "writes": writes,
            }
        )
        logits = self.score(output.last_hidden_state)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"labels has shape {tuple(labels.shape)}, the tokens {tuple(logits.shape[:2])}; give one class per "
                    "input token, and -100 where there is none (padding, later parts of a word)."
                )
            check_classes(labels, self.num_labels)
            loss = mean_nats(logits, labels, count)
        result = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return result if return_dict is not False and self.config.return_dict else result.to_tuple()


def last_tokens(real: Bool[Tensor, "b t"] | None, hidden: Float[Tensor, "b t d"]) -> Int[Tensor, "b"]:
    """The column of the last real token of every row.

    Raises:
        ValueError: a row without one.

    Example:
        >>> last_tokens(torch.tensor([[True, True, False], [False, True, True]]), torch.zeros(2, 3, 1))
        tensor([1, 2])
    """
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    if real is None:
        return columns[-1].expand(hidden.shape[0])
    if may_look(real) and not bool(real.any(1).all()):
        row = int(real.any(1).logical_not().nonzero()[0])
        raise ValueError(
            f"row {row} has no real token to read a label off: its attention_mask is 0, or all its tokens are "
            "config.pad_token_id. Leave empty texts out, or start every text with a bos token."
        )
    return (columns * real).argmax(1)


def check_classes(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless labels are whole numbers below ``classes``, or -100 (values: on the CPU only)."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels has dtype {labels.dtype}; classes are whole numbers (torch.long), or -100.")
    if may_look(labels):
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
        if wrong.numel():
            raise ValueError(
                f"labels contains {int(wrong[0])}, but the model has the classes 0..{classes - 1}. Make the model with "
                "num_labels=N (and id2label for their names), or mark what is to be ignored with -100."
            )
