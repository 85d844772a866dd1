"""What can read texts one after the other and is asked about them later: the interface, and two baselines.

`MemorySession` is a reader too; evaluations of reading (`nestlearn.evals.knowledge`, `nestlearn.evals.translation`)
take any.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import nn

from nestlearn.continual.methods import Boundaries, FineTuning, Method, OptimizerFactory
from nestlearn.continual.session_generation import cut_at, generation_arguments
from nestlearn.continual.step import training_step
from nestlearn.data.continual import Examples
from nestlearn.data.synthetic import IGNORE


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


def windows(tokenizer: Any, text: str, length: int) -> Examples:
    """A document as windows of next-token targets; the last one is padded, and its padding not asked for.

    Raises:
        ValueError: the text has no token to predict.
    """
    ids = torch.tensor(start_ids(tokenizer) + token_ids(tokenizer, text))
    if len(ids) < 2:
        raise ValueError(f"a document of {len(text)} characters has nothing to predict; leave it out.")
    length = min(length, len(ids) - 1)
    rows = -(-(len(ids) - 1) // length)
    padded = torch.full((rows * length + 1,), IGNORE)
    padded[: len(ids)] = ids
    return Examples(padded[:-1].clamp_min(0).view(rows, length), padded[1:].view(rows, length))


class FineTuningReader:
    """Trains the weights on each text when it is read: plain fine-tuning, or any method of `ContinualLearner`.

    A text is to the method what a task is there; its windows are learned in order, one a step.

    Args:
        model: a causal language model; it is copied, never changed.
        tokenizer: its tokenizer.
        optimizer: makes the optimizer from the parameters, e.g. ``partial(torch.optim.AdamW, lr=1e-4)``.
        context_length: tokens of a training sequence.
        passes: times each text is gone through.
        method: against forgetting, e.g. `CMS` or `EWC`; it is copied. Plain fine-tuning, which guards
            nothing, by default.
        boundaries: "known" tells the method where a text ends, "unknown" does not: it sees one long stream.
        seed: of the method's random choices.

    Raises:
        ValueError: sizes that are too small, or a method that needs boundaries where they are unknown.

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
        boundaries: Boundaries = "known",
        seed: int = 0,
    ) -> None:
        if context_length < 2 or passes < 1:
            raise ValueError(f"{context_length=} must be at least 2 tokens and {passes=} at least 1.")
        self._given = method or FineTuning()
        self._given.check_boundaries(boundaries)
        self.tokenizer, self.context_length, self.passes = tokenizer, context_length, passes
        self._factory, self.boundaries, self._texts = optimizer, boundaries, 0
        self._generator = torch.Generator().manual_seed(seed)
        self.method = copy.deepcopy(self._given)
        self.model: Any = self.method.prepare(copy.deepcopy(model))
        self._optimizer = self.method.make_optimizer(self.model, optimizer)

    def read(self, text: str) -> list[float]:
        """Train on the text; returns the mean loss of every step, in nats per token.

        Raises:
            ValueError: the text has no token to predict, or a loss or gradient is not finite. After the second, the
                weights are those of the step before.
        """
        was_training = self.model.training
        examples = windows(self.tokenizer, text, self.context_length)
        self.model.train()
        try:
            losses = self._train(examples)
            if self.boundaries == "known":
                self.method.end_task(self.model, examples, self._generator)
                self._replace_model()
        finally:
            self.model.train(was_training)
        self._texts += 1
        return losses

    def _train(self, examples: Examples) -> list[float]:
        losses: list[float] = []
        for epoch in range(self.passes):
            self.method.begin_epoch(epoch, self.passes, self.boundaries == "known")
            for row in range(len(examples)):
                loss, _ = training_step(
                    self.model, self._optimizer, self.method, examples[torch.tensor([row])], self._generator,
                    number=len(losses) + 1, first_pass=epoch == 0, max_grad_norm=1.0,
                )  # fmt: skip
                losses.append(loss)
        return losses

    def _replace_model(self) -> None:
        """Adapters in place of training in full have parameters of their own, and these an optimizer."""
        changed = self.method.replace_model(self.model, self._texts)
        if changed is not None:
            self.model = changed
            self._optimizer = self.method.make_optimizer(changed, self._factory)

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
        """An independent copy, optimizer and method included."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        other.method = copy.deepcopy(self._given)
        other._optimizer = other.method.make_optimizer(other.model, self._factory)
        other._optimizer.load_state_dict(copy.deepcopy(self._optimizer.state_dict()))
        other.method.load_state_dict(copy.deepcopy(self.method.state_dict()), other.model)
        other._generator = torch.Generator()
        other._generator.set_state(self._generator.get_state())
        return other
