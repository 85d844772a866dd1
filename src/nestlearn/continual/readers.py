"""Readers: models that read texts one after the other and answer prompts later; the interface and two baselines.

`MemorySession` is a reader too. Evaluations of reading (`nestlearn.evals.knowledge`, `nestlearn.evals.translation`)
take any reader.
"""

from __future__ import annotations

import copy
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import nn

from nestlearn.continual.learner import ContinualLearner
from nestlearn.continual.methods import Boundaries, Method, OptimizerFactory
from nestlearn.data.continual import Examples
from nestlearn.data.synthetic import IGNORE
from nestlearn.data.tokenizers import encode
from nestlearn.models.generation import generate_texts
from nestlearn.optim.checks import whole_number


class Reader(Protocol):
    """A model with a memory of what it has read."""

    def read(self, text: str, /) -> Any:
        """Learn from a text."""
        ...

    def generate(self, prompt: str, /, *, max_new_tokens: int, stop: str) -> str:
        """The most likely continuation of the prompt, up to the word ``stop`` or the end of the text."""
        ...

    def fork(self) -> Reader:
        """An independent copy."""
        ...


def start_ids(tokenizer: Any) -> list[int]:
    """The tokens a document begins with."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without special ones. Control tokens spelled out in the text are letters."""
    return encode(tokenizer, [text])[0].tolist()


def _check_context(length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, Integral) or length < 2:
        raise ValueError(f"context_length={length!r} must be a whole number of at least 2 tokens.")


class InContextReader:
    """In-context learning: every prompt follows the last tokens that were read, and no weight changes.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        context_length: tokens of context, prompt and answer together; older ones are forgotten.

    Raises:
        ValueError: a context too short to hold anything.
    """

    def __init__(self, model: Any, tokenizer: Any, context_length: int = 1024) -> None:
        _check_context(context_length)
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
        return generate_texts(self.model, self.tokenizer, [ids], max_new_tokens=max_new_tokens, stop=stop)[0]

    def fork(self) -> InContextReader:
        """An independent copy over the same model."""
        other = InContextReader(self.model, self.tokenizer, self.context_length)
        other._read = list(self._read)
        return other


def windows(tokenizer: Any, text: str, length: int) -> Examples:
    """A document as windows of next-token targets. The last one is padded; the loss ignores its padding.

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
    """Trains the weights on each text when it is read, by plain fine-tuning or another method of `ContinualLearner`.

    Each text is one task. Its windows are learned in order, one per step.

    Args:
        model: a causal language model; it is copied, never changed.
        tokenizer: its tokenizer.
        optimizer: makes the optimizer from the parameters, e.g. ``partial(torch.optim.AdamW, lr=1e-4)``.
        context_length: tokens of a training sequence.
        passes: times each text is read.
        method: against forgetting, e.g. `CMS` or `EWC`; it is copied. Plain fine-tuning by default.
        boundaries: "known" tells the method where a text ends. With "unknown" it sees one long stream.
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
        whole_number("passes", passes, "times each text is read")
        _check_context(context_length)
        self.tokenizer, self.context_length, self._texts = tokenizer, context_length, 0
        self.learner = ContinualLearner(
            copy.deepcopy(model), optimizer, method=copy.deepcopy(method), epochs=passes, batch_size=1,
            boundaries=boundaries, score="bits", max_grad_norm=1.0, seed=seed, shuffle=False,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    @property
    def model(self) -> Any:
        """The copy of the model that learns."""
        return self.learner.model

    def read(self, text: str) -> list[float]:
        """Train on the text; returns the mean loss of every step, in nats per token.

        Raises:
            ValueError: the text has no token to predict, or a loss or gradient is not finite. In the latter case the
                weights are those of the step before.
        """
        examples = windows(self.tokenizer, text, self.context_length)
        losses = self.learner.learn(examples, self._texts)
        self.learner.end_task(examples, self._texts)
        self._texts += 1
        return losses

    def generate(self, prompt: str, *, max_new_tokens: int = 64, stop: str = "\n") -> str:
        """See `Reader.generate`. The model sees the prompt alone: what was read is in its weights."""
        ids = start_ids(self.tokenizer) + token_ids(self.tokenizer, prompt)
        was_training = self.model.training
        self.model.eval()
        try:
            return generate_texts(self.model, self.tokenizer, [ids], max_new_tokens=max_new_tokens, stop=stop)[0]
        finally:
            self.model.train(was_training)

    def fork(self) -> FineTuningReader:
        """An independent copy, optimizer and method included."""
        other = copy.copy(self)
        other.learner = self.learner.fork()
        return other
