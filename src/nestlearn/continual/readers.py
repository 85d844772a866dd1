"""What can read texts one after the other and is asked about them later: the interface, and two baselines.

`MemorySession` is a reader too; evaluations of reading (`nestlearn.evals.knowledge`, `nestlearn.evals.translation`)
take any.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.continual.methods import FineTuning, Method, OptimizerFactory
from nestlearn.continual.session_generation import cut_at, generation_arguments


class Reader(Protocol):
    """A model with a memory of what it has read."""

    def read(self, text: str, /) -> Any:
        """Learn from a text."""
        ...

    def generate(self, prompt: str, /, *, max_new_tokens: int, stop: str) -> str:
        """What follows the prompt, the most likely token each time, up to the word ``stop`` or the end of the text."""
        ...

    def fork(self) -> Reader:
        """An independent copy."""
        ...


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int, stop: str) -> str:
    """The most likely continuation of ``ids`` up to ``stop`` or the end-of-text token."""
    words = [stop] if stop else []
    inputs = torch.tensor([ids], device=model.device)
    arguments = generation_arguments(tokenizer, model, len(ids), max_new_tokens, 0.0, 1.0, words)
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), **arguments)
    return cut_at(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True), words)


def start_ids(tokenizer: Any) -> list[int]:
    """The tokens a document begins with."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without special ones."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class InContextReader:
    """In-context learning: the last tokens read are put before every prompt, and no weight changes.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        context_length: tokens of context, prompt and answer together; older ones are forgotten.

    Raises:
        ValueError: a context too short to hold anything.
    """

    def __init__(self, model: Any, tokenizer: Any, context_length: int = 1024) -> None:
        if context_length < 2:
            raise ValueError(f"context_length={context_length} must be at least 2 tokens.")
        self.model, self.tokenizer, self.context_length = model, tokenizer, context_length
        self._read: list[int] = []

    def read(self, text: str) -> int:
        """Remember the text's tokens as far as the context reaches; returns how many are held."""
        self._read = (self._read + token_ids(self.tokenizer, text))[-self.context_length :]
        return len(self._read)

    def generate(self, prompt: str, *, max_new_tokens: int = 64, stop: str = "\n") -> str:
        """See `Reader.generate`.

        Raises:
            ValueError: prompt and answer do not fit into the context.
        """
        start, asked = start_ids(self.tokenizer), token_ids(self.tokenizer, prompt)
        room = self.context_length - len(start) - len(asked) - max_new_tokens
        if room < 0:
            raise ValueError(
                f"a prompt of {len(asked)} tokens and an answer of {max_new_tokens} do not fit into "
                f"context_length={self.context_length}; raise it."
            )
        ids = start + self._read[len(self._read) - min(room, len(self._read)) :] + asked
        return complete(self.model, self.tokenizer, ids, max_new_tokens, stop)

    def fork(self) -> InContextReader:
        """An independent copy over the same model."""
        other = InContextReader(self.model, self.tokenizer, self.context_length)
        other._read = list(self._read)
        return other


class FineTuningReader:
    """Trains the weights on each text when it is read: plain fine-tuning, or a method that makes its own optimizer.

    Args:
        model: a causal language model; it is copied, never changed.
        tokenizer: its tokenizer.
        optimizer: makes the optimizer from the parameters, e.g. ``partial(torch.optim.AdamW, lr=1e-4)``.
        context_length: tokens of a training sequence.
        passes: times each text is gone through.
        method: makes the optimizer from the model, e.g. `CMS`; plain fine-tuning, which guards nothing, by default.

    Example:
        >>> reader = FineTuningReader(model, tokenizer, partial(torch.optim.SGD, lr=0.1))     # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        optimizer: OptimizerFactory,
        context_length: int = 1024,
        passes: int = 1,
        method: Method | None = None,
    ) -> None:
        if context_length < 2 or passes < 1:
            raise ValueError(f"{context_length=} must be at least 2 tokens and {passes=} at least 1.")
        self.model: Any = copy.deepcopy(model)
        self.tokenizer, self.context_length, self.passes = tokenizer, context_length, passes
        self._factory, self.method = optimizer, method or FineTuning()
        self._optimizer = self.method.make_optimizer(self.model, optimizer)

    def read(self, text: str) -> list[float]:
        """Train on the text; returns the mean loss of every step, in nats per token."""
        was_training, losses = self.model.training, []
        # What the optimizer does not step keeps the gradients of all steps so far, which are no part of this one.
        trained = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        self.model.train()
        for _ in range(self.passes):
            for ids in self._sequences(text):
                self._optimizer.zero_grad(set_to_none=True)
                logits = self.model(ids[:, :-1]).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                self._optimizer.step()
                losses.append(loss.item())
        self.model.train(was_training)
        return losses

    def _sequences(self, text: str) -> Iterator[Tensor]:
        ids = start_ids(self.tokenizer) + token_ids(self.tokenizer, text)
        for first in range(0, len(ids) - 1, self.context_length):
            yield torch.tensor([ids[first : first + self.context_length + 1]], device=self.model.device)

    def generate(self, prompt: str, *, max_new_tokens: int = 64, stop: str = "\n") -> str:
        """See `Reader.generate`; the prompt stands alone, what was read is in the weights."""
        ids = start_ids(self.tokenizer) + token_ids(self.tokenizer, prompt)
        was_training = self.model.training
        self.model.eval()
        try:
            return complete(self.model, self.tokenizer, ids, max_new_tokens, stop)
        finally:
            self.model.train(was_training)

    def fork(self) -> FineTuningReader:
        """An independent copy, optimizer included."""
        other = FineTuningReader(
            self.model, self.tokenizer, self._factory, self.context_length, self.passes, self.method
        )
        other._optimizer.load_state_dict(copy.deepcopy(self._optimizer.state_dict()))
        return other
