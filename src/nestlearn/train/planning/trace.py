"""What a training step costs, counted on the meta device: no weight is made, nothing is computed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nestlearn.memory import AssociativeMemory
from nestlearn.memory.fla import lacks_kernel
from nestlearn.models import HopeConfig, HopeForCausalLM
from nestlearn.models.flops import meta_model
from nestlearn.nn import MixerConfig, SelfModifyingTitans
from nestlearn.nn.self_modifying.kernel import kernel_refusal

TRACED_TOKENS = 2**20


class StepCost(NamedTuple):
    """What one training step of one process takes.

    Attributes:
        products: FLOPs of matrix products of two matrices (the linear maps); a multiply-add counts 2.
        batched: FLOPs of batches of products (memories); with ``products`` and ``attention`` all that is counted.
        attention: FLOPs of softmax attention in a fused kernel.
        moved: bytes that all operations but the linear maps and attention read and write.
        operations: that torch dispatches, views left out.
        peak: the most bytes alive at once beside weights and their gradients.
    """

    products: float = 0.0
    batched: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    operations: float = 0.0
    peak: float = 0.0

    def plus(self, other: StepCost, times: float = 1.0) -> StepCost:
        """This cost, and another so many times."""
        return StepCost(*(a + times * b for a, b in zip(self, other, strict=True)))

    @property
    def flops(self) -> float:
        """FLOPs of all products."""
        return self.products + self.batched + self.attention


class _FusedAttention(torch.autograd.Function):
    """Softmax attention as one kernel that keeps queries, keys, values, its output and one number per query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        read = v.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, read, q.new_empty(q.shape[:-1]))
        return read

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _Attention(TorchFunctionMode):
    """Replaces torch's attention: on the meta device it would be the sum over all scores that no device stores."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        seen = 0.5 if kwargs.get("is_causal") else 1.0
        forward = 2 * seen * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        # Backward computes the scores again, and four products.
        self.flops += forward * (3.5 if torch.is_grad_enabled() and q.requires_grad else 1)
        return _FusedAttention.apply(q, k, v)


class _Counter(TorchDispatchMode):
    """Counts FLOPs, bytes moved and operations, and follows the bytes that are alive."""

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.products = self.batched = 0.0
        self.moved = self.operations = self.alive = self.peak = 0
        self._known = {x.untyped_storage()._cdata for x in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        if returned and returned[0].alias_info is not None and not returned[0].alias_info.is_write:
            return result  # a view
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.operations += 1
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=result)
        if count is not None and outputs[0].ndim == 2:
            self.products += flops
        else:
            # Batches of small products read and write about as many bytes as they do work.
            self.batched += flops
            inputs = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            self.moved += sum(x.nbytes for x in (*inputs, *outputs))
        for output in outputs:
            self._follow(output)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def count(run: Callable[[], Any], held: Iterable[Tensor] = (), attention: _Attention | None = None) -> StepCost:
    """The cost of a function of tensors on the meta device; ``held`` are alive before it, and do not count."""
    with attention or _Attention() as attention, _Counter(held) as counter:
        result = run()
    del result
    numbers = (counter.moved, counter.operations, counter.peak)
    return StepCost(counter.products, counter.batched, attention.flops, *map(float, numbers))


def _traced(config: HopeConfig, batch: int, length: int, checkpointing: bool) -> StepCost:
    """Forward, loss and backward of a whole model."""
    model, attention = meta_model(config).train(), _Attention()
    if checkpointing:
        # A block that is computed again during backward is outside the mode.
        model.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": lambda: (nullcontext(), attention)}
        )
    for parameter in model.parameters():
        # A gradient is a resident of its own: only what else is alive beside it counts here.
        parameter.register_post_accumulate_grad_hook(_drop)
    # So many rows that what does not depend on them is lost beside them: the gradient of a weight before it is dropped.
    repeats = math.ceil(TRACED_TOKENS / (batch * length))
    ids = torch.zeros(repeats * batch, length, dtype=torch.long, device="meta")
    cost = count(lambda: _step(model, ids), [*model.parameters(), *model.buffers(), ids], attention)
    return StepCost(*(x / repeats for x in cost))._replace(operations=cost.operations)


def _step(model: HopeForCausalLM, ids: Tensor) -> None:
    loss = model(ids, labels=ids, use_cache=False).loss
    assert loss is not None
    loss.backward()


def _parabola(lengths: list[int], costs: list[StepCost], at: int) -> StepCost:
    """The values at a length of the parabolas through three costs."""
    total = StepCost()
    for i, cost in enumerate(costs):
        others = [x for j, x in enumerate(lengths) if j != i]
        total = total.plus(cost, math.prod((at - x) / (lengths[i] - x) for x in others))
    return total


def step_cost(
    config: HopeConfig, batch: int, length: int, *, checkpointing: bool = False, kernels: bool = False
) -> StepCost:
    """Forward and backward of one batch of ``batch`` sequences of ``length`` tokens, in float32.

    With ``kernels`` a memory that has a kernel of its own takes as many operations for a sequence as for one chunk.

    All layers of one kind cost the same, and every chunk of a sequence costs as much as the one before, attention
    aside, whose cost grows with the square. So one and two layers on short sequences tell the rest.

    Raises:
        ValueError: levels that learn from the loss (the number of their passes depends on the text).

    Example:
        >>> step_cost(HopeConfig(mixer="attention", num_hidden_layers=3), 2, 512).flops > 3e9
        True
    """
    if config.cms_signal == "loss" and any(level.get("period") is not None for level in config.cms):
        raise ValueError("The passes of levels that learn from the loss depend on the text: their cost is not planned.")
    total = StepCost()
    head: StepCost | None = None
    for mixer, number in config.mixer_counts:
        one, two = (_at_length(config, mixer, n, batch, length, checkpointing, kernels) for n in (1, 2))
        layer = two.plus(one, -1)
        total = total.plus(layer, number)
        head = head or one.plus(layer, -1)
    return total.plus(head or StepCost())


def _at_length(
    config: HopeConfig, mixer: MixerConfig, layers: int, batch: int, length: int, checkpointing: bool, kernels: bool
) -> StepCost:
    fields = {name: getattr(config, name) for name in config.field_names()}
    small = HopeConfig(**fields | {"mixer": mixer, "num_hidden_layers": layers, "reset_token_id": None})
    period = math.lcm(mixer.work_period, *(level.get("period") or 1 for level in config.cms))
    period = max(period, mixer.stored_tokens or 0)
    if length <= 4 * period:
        return _traced(small, batch, length, checkpointing)
    # The first period differs: nothing was written before it.
    lengths = [2 * period, 3 * period, 4 * period]
    cost = _parabola(lengths, [_traced(small, batch, x, checkpointing) for x in lengths], length)
    if kernels and _has_kernel(small):
        return cost._replace(operations=_traced(small, batch, period, checkpointing).operations)
    return cost


def _has_kernel(config: HopeConfig) -> bool:
    """Whether the memories of a model run in kernels of their own on a GPU."""
    found = []
    for module in meta_model(config).modules():
        if isinstance(module, SelfModifyingTitans):
            found.append(kernel_refusal(module) is None)
        elif isinstance(memory := getattr(module, "memory", None), AssociativeMemory):
            found.append(lacks_kernel(memory) is None)
    return all(found)
