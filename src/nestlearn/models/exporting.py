"""A step of decoding as a function of tensors, and its program for `torch.export`.

The state of a model is a tree of tensors in a `HopeCache`. Other tools (AOTInductor, ExecuTorch, a C++ server) want a
function of tensors: ids and state in, logits and state out. `DecodeStep` is that function, `export_step` its program.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_flatten, tree_unflatten

from nestlearn.models.cache import HopeCache
from nestlearn.models.modeling import HopeForCausalLM


class DecodeStep(nn.Module):
    """``(ids, *state) -> (logits, *state)`` for the next tokens of every row.

    Args:
        model: in evaluation mode.
        cache: of a prompt. It sets the structure and the shapes of the state; its tensors are `state`.

    Attributes:
        state: the tensors of the cache, in the order in which the function takes and returns them.

    Raises:
        ValueError: a cache that has read nothing or waits for a reset, or levels that learn from the next-token loss:
            those take a backward pass at the end of each segment, which a program of tensors does not contain.

    Example:
        >>> model = HopeForCausalLM(HopeConfig(num_hidden_layers=1)).eval()
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> with torch.no_grad():
        ...     cache = model(ids[:, :3], use_cache=True).past_key_values
        ...     step = DecodeStep(model, cache)
        ...     logits, *state = step(ids[:, 3:], *step.state)
        ...     print(torch.equal(logits, model(ids[:, 3:], past_key_values=cache).logits))
        True
    """

    def __init__(self, model: HopeForCausalLM, cache: HopeCache) -> None:
        super().__init__()
        if cache.segments or model.model.segment_length is not None:
            raise ValueError(
                "the levels of this model learn from the next-token loss (cms_signal='loss') and take a backward pass "
                "at the end of each segment, which cannot be part of an exported step. Decode with writes=False in "
                "eager mode, or use levels with cms_signal='local'."
            )
        if not cache.layers or cache.pending_reset is not None:
            raise ValueError(
                "the cache has read nothing yet, or some of its rows wait for a reset: its structure is not that of "
                "later steps. Read a prompt first: model(ids, use_cache=True).past_key_values."
            )
        self.model = model
        leaves, self._spec = tree_flatten(cache.layers)
        self._constants = [None if isinstance(leaf, Tensor) else (_general(leaf),) for leaf in leaves]
        self._cache = copy.copy(cache)
        self.state: tuple[Tensor, ...] = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def forward(self, ids: Int[Tensor, "b t"], *state: Tensor) -> tuple[Tensor, ...]:
        """The logits of the tokens, and the state after them."""
        tensors = iter(state)
        leaves = [next(tensors) if constant is None else constant[0] for constant in self._constants]
        cache = copy.copy(self._cache)
        cache.layers = cast(Any, tree_unflatten(leaves, self._spec))
        output = self.model(ids, past_key_values=cache, use_cache=True)
        after, spec = tree_flatten(output.past_key_values.layers)
        constants = [None if isinstance(leaf, Tensor) else (_general(leaf),) for leaf in after]
        if spec != self._spec or constants != self._constants:
            raise ValueError(
                "a step changed the structure of the state, so one program cannot do all steps. Read a longer prompt, "
                "so that every part of the state exists."
            )
        return output.logits, *(leaf for leaf in after if isinstance(leaf, Tensor))


def _general(constant: Any) -> Any:
    """A part of the state that is no tensor, as it holds at every step.

    Flags say what is known of positions without reading tensors (a chunk starts here). False claims nothing.
    """
    return False if isinstance(constant, bool) else constant


@torch.no_grad()
def export_step(model: HopeForCausalLM, cache: HopeCache) -> tuple[ExportedProgram, tuple[Tensor, ...]]:
    """The program of one step of decoding by `torch.export`, and the state to begin with.

    The program takes ids ``[b, 1]`` and the tensors of the state, and returns logits and the tensors of the next state.
    Memories, and attention with a full window, have a state of constant shape. The keys and values of attention that
    still grow have a dimension of any size.

    Args:
        model: in evaluation mode.
        cache: after a prompt of as many rows as the program is to have.

    Raises:
        ValueError: see `DecodeStep`; or a model in training mode.

    Example:
        >>> model = HopeForCausalLM(HopeConfig(num_hidden_layers=1, hidden_size=16)).eval()
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> with torch.no_grad():
        ...     cache = model(ids[:, :3], use_cache=True).past_key_values
        ...     program, state = export_step(model, cache)
        ...     logits, *state = program.module()(ids[:, 3:], *state)
        ...     print(torch.allclose(logits, model(ids[:, 3:], past_key_values=cache).logits, atol=1e-5))
        True
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before exporting a step of decoding.")
    step = DecodeStep(model, cache)
    ids = torch.zeros(step.state[0].shape[0], 1, dtype=torch.long, device=model.device)
    after = step(ids, *step.state)[1:]
    grows = tuple(
        {axis: Dim.DYNAMIC for axis, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)) if a != b}
        for old, new in zip(step.state, after, strict=True)
    )
    program = torch.export.export(step, (ids, *step.state), dynamic_shapes=({}, grows), strict=False)
    return program, step.state
