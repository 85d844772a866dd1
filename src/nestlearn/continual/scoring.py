"""Loss and score of a model on examples, for classes and for tokens alike."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nestlearn.data.continual import Examples
from nestlearn.data.synthetic import IGNORE

ScoreKind = Literal["accuracy", "bits"]
_EVAL_BATCH = 256


def logits_of(model: nn.Module, inputs: Tensor) -> Float[Tensor, "b ... c"]:
    """The model's logits, or those of the object that it returns, as Hugging Face models do."""
    output: Any = model(inputs)
    return output if isinstance(output, Tensor) else output.logits


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters."""
    return next(model.parameters()).device


def loss_of(model: nn.Module, examples: Examples) -> Float[Tensor, ""]:
    """Mean cross-entropy over the targets, in nats."""
    logits = logits_of(model, examples.inputs)
    return nn.functional.cross_entropy(logits.flatten(0, -2), examples.targets.flatten(), ignore_index=IGNORE)


@torch.no_grad()
def score_examples(model: nn.Module, examples: Examples, score: ScoreKind) -> float:
    """The share of targets that the model predicts, or minus the mean bits per target; in evaluation mode.

    Raises:
        ValueError: all targets are to be ignored, or the score is not finite.
    """
    training = model.training
    model.eval()
    total = count = 0.0
    for chosen in torch.arange(len(examples)).split(_EVAL_BATCH):
        batch = examples[chosen].to(device_of(model))
        logits, targets = logits_of(model, batch.inputs).flatten(0, -2), batch.targets.flatten()
        asked = targets != IGNORE
        if bool(logits[asked].isnan().any()):
            # argmax would return the first NaN, as if it were a prediction.
            total = math.nan
        if score == "accuracy":
            total += float((logits.argmax(-1) == targets)[asked].sum())
        else:
            loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
            total -= float(loss) / math.log(2)
        count += float(asked.sum())
    model.train(training)
    if not count:
        raise ValueError(
            f"All {examples.targets.numel()} targets of {len(examples)} examples are {IGNORE}, which is padding: "
            "nothing to score. Give a test with at least one target."
        )
    if not math.isfinite(total):
        raise ValueError(
            f"The model's {score} on {len(examples)} examples is {total / count}: its outputs or its loss are not "
            "finite, which is no score. Check its weights and the inputs for values that are not finite; a model that "
            "was trained needs a lower learning rate."
        )
    return total / count
