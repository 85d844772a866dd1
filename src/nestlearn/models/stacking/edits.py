"""Edits: low-rank changes of named linear maps, which a level state holds beside what its levels have learned.

    W = W_0 + sum_edits Lᵀ G,    G [n, in], L [n, out]    (n: facts of the edit)

How G and L are found is the matter of `nestlearn.continual.editing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.nn.state import record


@record("stacking.map_edit")
class MapEdit(NamedTuple):
    """The change ``leftᵀ right`` of one map, and the keys (inputs of the map) at which its facts are read."""

    keys: Float[Tensor, "n in"]
    right: Float[Tensor, "n in"]
    left: Float[Tensor, "n out"]


@record("stacking.edit")
class Edit(NamedTuple):
    """Some facts, and the changes by which they were written together.

    Attributes:
        facts: (prompt, subject, target) of each.
        method: by which they were written.
        alpha: share of the attention maps.
        maps: changes by the path of the linear map.
    """

    facts: tuple[tuple[str, str, str], ...]
    method: str
    alpha: float
    maps: Mapping[str, MapEdit]


class LowRank(NamedTuple):
    """``x ↦ x rightᵀ left``."""

    right: Float[Tensor, "n in"]
    left: Float[Tensor, "n out"]

    def __call__(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        return (x.to(self.right) @ self.right.mT) @ self.left


def joined(edits: Iterable[Edit]) -> dict[str, LowRank]:
    """The change of every map by all edits together.

    Example:
        >>> one = MapEdit(torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 2))
        >>> edits = [Edit((("", "", ""),), "memit", 0.0, {"layer.0": one})] * 2
        >>> joined(edits)["layer.0"](torch.ones(3))
        tensor([6., 6.])
    """
    parts: dict[str, list[MapEdit]] = {}
    for edit in edits:
        for path, change in edit.maps.items():
            parts.setdefault(path, []).append(change)
    with torch.inference_mode(False):  # tensors made in inference mode could not take part in a backward pass later
        return {
            path: LowRank(torch.cat([part.right for part in found], -2), torch.cat([part.left for part in found], -2))
            for path, found in parts.items()
        }
