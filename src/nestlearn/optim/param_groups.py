"""Parameter groups of a model: which parameters the matrix rules train, and which AdamW trains."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def param_groups(
    model: nn.Module, *, lr: float | None = None, adamw_lr: float | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of a model for the optimizers of this package, decided by modules and shapes.

    The optimizer's own rule trains:

    - matrices and stacks of matrices: parameters of two or three dimensions that are none of those below;
    - kernels of convolutions, [out, in, ...], as matrices [out, in · ...].

    AdamW trains:

    - embeddings and the output head (``model.get_output_embeddings()``, as in Hugging Face models): a row belongs to
    one
      token, and most rows have no gradient at a step;
    - kernels of grouped convolutions, whose outputs have different inputs;
    - tensors of one row or column, and the ``vector_parameters()`` of modules, such as depthwise convolutions here;
    - vectors and scalars, without weight decay.

    Args:
        model: its trainable parameters. A weight that several modules share is in one group; it counts as an embedding
            if one of them is an embedding.
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
            f"{type(model).__name__} has no trainable parameter; unfreeze (requires_grad_) those that should learn."
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
    # The optimizer's own value stands for a missing entry.
    return [{key: value for key, value in group.items() if value is not None} for group in groups if group["params"]]


def _embeddings(model: nn.Module) -> set[Tensor]:
    """Weights whose rows are tokens."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    return {module.weight for module in [*modules, head] if isinstance(getattr(module, "weight", None), Tensor)}


def _vectors(model: nn.Module) -> set[Tensor]:
    """Weights whose modules declare that their rows are vectors."""
    declared = [getattr(module, "vector_parameters", list)() for module in model.modules()]
    return {parameter for parameters in declared for parameter in parameters}


def _kernels(model: nn.Module) -> dict[Tensor, int]:
    """Weights of convolutions with their numbers of groups."""
    return {module.weight: module.groups for module in model.modules() if isinstance(module, _ConvNd)}
