"""LoRA fine-tuning: low-rank adapters next to frozen weights, by the `peft` library."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nestlearn.continual.methods import Method
from nestlearn.optim.checks import whole_number


class LoRA(Method):
    """Trains low-rank adapters of linear maps (Hu et al. 2021, arXiv 2106.09685), and chosen modules in full.

    Args:
        rank: of each adapter.
        scale: the adapter's output is multiplied by ``scale / rank``; twice the rank by default.
        targets: names of the linear maps that get adapters, as `peft` reads them: full names, or their last parts.
            None: all linear maps except those in `trained` and a language model's output layer.
        trained: names of modules that are trained in full, such as a new head.
        after_task: the number of the task after which adapters replace training in full; -1: from the start, for
            pretrained models. 0 makes the first task the pre-training.

    Raises:
        ImportError: peft is not installed.
        ValueError: rank below 1, or a model without a linear map that could get an adapter.
    """

    name = "LoRA"
    makes_optimizer = True

    def __init__(
        self,
        rank: int = 8,
        *,
        scale: float | None = None,
        targets: Sequence[str] | None = None,
        trained: Sequence[str] = (),
        after_task: int = -1,
    ) -> None:
        self.rank = whole_number("rank", rank, "of each adapter")
        self.scale, self.after_task = 2.0 * rank if scale is None else scale, after_task
        self.targets = None if targets is None else list(targets)
        self.trained = list(trained)
        self.needs_boundaries = after_task >= 0
        self.without_boundaries = "Give after_task=-1, which needs none, for a pretrained model."
        _peft()

    def config(self) -> dict[str, Any]:
        """Rank, scale, targets, modules trained in full, and the task."""
        return {name: getattr(self, name) for name in ("rank", "scale", "targets", "trained", "after_task")}

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model, with adapters if they start at once."""
        return self._adapted(model) if self.after_task < 0 else model

    def replace_model(self, model: nn.Module, place: int) -> nn.Module | None:
        """The model with adapters, after the task `after_task`."""
        return self._adapted(model) if place == self.after_task else None

    def _adapted(self, model: nn.Module) -> nn.Module:
        peft = _peft()
        # The output layer of a language model is often its embedding too.
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        targets: str | list[str] | None = self.targets
        if targets is None:
            names = [
                name
                for name, module in model.named_modules()
                if name
                and isinstance(module, nn.Linear | Conv1D)
                and module is not output
                and not any(_within(name, trained) for trained in self.trained)
            ]
            # peft matches a name in a list with the end of names ("0" matches "1.0"), but a string with whole names.
            targets = "|".join(map(re.escape, names))
        if not targets:
            raise ValueError(
                f"A {type(model).__name__} has no linear map for adapters: targets is {self.targets}, trained in full "
                f"are {self.trained}. Name linear maps in `targets`, or fewer modules in `trained`; a model that is "
                "one nn.Linear belongs into an nn.Sequential."
            )
        config = peft.LoraConfig(
            r=self.rank, lora_alpha=self.scale, target_modules=targets, modules_to_save=self.trained or None
        )
        with warnings.catch_warnings():
            # peft uses names that newer versions of transformers deprecate.
            warnings.simplefilter("ignore", FutureWarning)
            # It warns of the transposed weights of Conv1D, which it handles.
            warnings.filterwarnings("ignore", "fan_in_fan_out")
            return peft.get_peft_model(model, config).train(model.training)


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft, which is not installed: pip install 'nestlearn[continual]'.") from error
    return peft
