"""Which parameters of a model are matrices in the sense of the matrix rules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def param_groups(
    model: nn.Module, *, lr: float | None = None, adamw_lr: float | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of a model for the optimizers of this package, decided by modules and shapes.

    - Matrices and stacks of matrices, updated by the optimizer's own rule: trainable parameters of two or three
      dimensions that belong to none of the following.
    - Kernels of convolutions, [out, in, ...], updated by it as matrices [out, in · ...]; grouped ones are left to AdamW
      (each output has inputs of its own: there is no matrix).
    - Embeddings and the output head, updated by AdamW: a row is one token's, and most rows have no gradient at a step.
      The head is what ``model.get_output_embeddings()`` returns, as Hugging Face models do.
    - What only looks like a matrix, updated by AdamW: tensors of one row or column, and what modules return as their
      ``vector_parameters()``, as this package's depthwise convolutions do.
    - Vectors and scalars, updated by AdamW without weight decay.

    Args:
        model: frozen parameters are left out. A weight that several modules share is in one group; it is an embedding
            if one of them is.
        lr: of the matrices; the optimizer's own by default.
        adamw_lr: of the rest; `lr` by default.
        weight_decay: of all but vectors and scalars; the optimizer's own by default.

    Raises:
        ValueError: a model without trainable parameters.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
        >>> [(group["rule"], len(group["params"])) for group in param_groups(model)]
        [('matrix', 1), ('adamw', 1), ('adamw', 1)]
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter; unfreeze (requires_grad_) what shall learn."
        )
    kernels = _kernels(model)
    excluded = {*_embeddings(model), *_vectors(model), *(w for w, groups in kernels.items() if groups > 1)}
    flat = [p for p in trained if p.ndim < 2]
    rest = [p for p in trained if p.ndim >= 2 and (p in excluded or (min(p.shape[-2:]) == 1 and p not in kernels))]
    taken = {*flat, *rest}
    convolutions = [p for p in trained if p in kernels and p not in taken]
    matrices = [p for p in trained if p not in kernels and p not in taken]
    rest_lr = lr if adamw_lr is None else adamw_lr
    groups = [
        {"params": matrices, "rule": "matrix", "lr": lr, "weight_decay": weight_decay},
        {"params": convolutions, "rule": "matrix", "kernels": True, "lr": lr, "weight_decay": weight_decay},
        {"params": rest, "rule": "adamw", "lr": rest_lr, "weight_decay": weight_decay},
        {"params": flat, "rule": "adamw", "lr": rest_lr, "weight_decay": 0.0},
    ]
    # An entry that is left out is the optimizer's own.
    return [{key: value for key, value in group.items() if value is not None} for group in groups if group["params"]]


def _embeddings(model: nn.Module) -> set[Tensor]:
    """Weights whose rows are tokens."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    return {module.weight for module in [*modules, head] if isinstance(getattr(module, "weight", None), Tensor)}


def _vectors(model: nn.Module) -> set[Tensor]:
    """Weights of which the modules themselves say that their rows are vectors."""
    declared = [getattr(module, "vector_parameters", list)() for module in model.modules()]
    return {parameter for parameters in declared for parameter in parameters}


def _kernels(model: nn.Module) -> dict[Tensor, int]:
    """Weights of convolutions, with the number of their groups."""
    return {module.weight: module.groups for module in model.modules() if isinstance(module, _ConvNd)}
