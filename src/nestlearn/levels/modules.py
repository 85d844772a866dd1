"""The problems that a model solves while it reads: memories, attention, caches, statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nestlearn.memory import L2, AssociativeMemory, Decay, Delta, DotProduct, Lp
from nestlearn.models.stacking.network import StackedLevel
from nestlearn.nn import (
    PMI,
    CausalAttention,
    ContinuousThought,
    LongTermMemory,
    MemoryAsContext,
    MemoryMixer,
    SelfModifyingMLP,
    SelfModifyingTitans,
    WorkingMemory,
)
from nestlearn.nn.cms.level import LevelWeights
from nestlearn.nn.cms.loss import LossLevel
from nestlearn.nn.common import InitialWeights
from nestlearn.nn.cross_attention import InitialSlots
from nestlearn.nn.exact_cache import ExactCache
from nestlearn.nn.thought.neurons import InputAttention

from .system import Component, Frequency
from .trace import attention_of, carried_state, changing_buffers, example_of

KEYS = "keys and values of its tokens"
OWN_KEYS = "keys and targets that the memories generate"
SEGMENT_LOSS = "next-token loss of its segment"
FLOAT = 4


def memories(model: nn.Module) -> Iterator[Component]:
    """Fast weights of every module that has some, one component per module."""
    for name, module in model.named_modules():
        yield from _of_module(name, module)


def _of_module(name: str, module: nn.Module) -> Iterator[Component]:
    if isinstance(module, SelfModifyingTitans):
        yield from _self_modifying(name, module)
    elif isinstance(module, MemoryMixer):
        starts = "initialization" if module.initial is not None else None
        size = module.num_heads * fast_bytes(module.memory, module.d_head)
        yield _memory(name, module.memory, KEYS, ("direct, parametric", starts), size)
    elif isinstance(module, PMI):
        yield from _slots(name, module)
    elif isinstance(module, LevelWeights):
        yield from _level(name, module)
    elif isinstance(module, StackedLevel) and module.memory is not None:
        yield _memory(
            name, module.memory, "the text, in segments", ("backpropagation", "initialization"),
            FLOAT * sum(math.prod(shape) for shape in module.shapes.values()), SEGMENT_LOSS, module.level.period,
        )  # fmt: skip
    elif isinstance(module, ExactCache):
        yield Component(
            name, "cache", Frequency(module.chunk_size), KEYS, "none: it keeps tokens", f"keeps {module.size} tokens",
            ("direct, non-parametric",), members=(name,),
        )  # fmt: skip
    elif isinstance(module, ContinuousThought):
        yield from _thought(name, module)
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        yield Component(
            name, "memory", Frequency(1), "its inputs", "none: a learned transition",
            f"transition of {type(module).__name__}", ("direct, parametric",), members=(name,),
        )  # fmt: skip
    elif not isinstance(module, InitialWeights | InitialSlots):
        found = [value for value in vars(module).values() if isinstance(value, AssociativeMemory)]
        if found:
            yield _memory(name, found[0], KEYS, ("direct, parametric",))


def _memory(
    name: str,
    memory: AssociativeMemory,
    context: str,
    transfer: Iterable[str | None],
    size: int = 0,
    objective: str | None = None,
    period: int | None = None,
) -> Component:
    """The component of an associative memory; its period by how it is read unless it is given."""
    period = period or (memory.chunk_size if memory.read == "chunk" else 1)
    return Component(
        name, "memory", Frequency(period), context, objective or objective_of(memory), rule_of(memory),
        tuple(way for way in transfer if way), bytes=size, members=(name,),
    )  # fmt: skip


def _self_modifying(name: str, layer: SelfModifyingTitans) -> Iterator[Component]:
    ways = ("generation" if layer.adaptive else "direct, parametric", "initialization")
    context = OWN_KEYS if layer.self_values else KEYS
    size = layer.num_heads * fast_bytes(layer.memory, layer.d_head)
    yield _memory(name, layer.memory, context, ways, size)
    if isinstance(layer, SelfModifyingMLP) and layer.adaptive:
        made, period = ", ".join(layer.adaptive), layer.projection_chunk_size
        group = _memory(f"{name}.{{{made}}}", layer.memory, context, ways, len(layer.adaptive) * size, period=period)
        yield replace(group, members=(name,))


def _thought(name: str, machine: ContinuousThought) -> Iterator[Component]:
    """What changes with every tick: the memory of pairs of activations, and the last pre-activations."""
    inside, tick, config = f"{name}." if name else "", Frequency(1, "tick"), machine.config
    yield Component(
        f"{inside}synchronization", "memory", tick, "pairs of its own activations", "−⟨A z_i, z_j⟩",
        "descent, decay of each pair", ("direct, parametric", "initialization"),
        bytes=2 * FLOAT * (config.query_pairs + config.output_pairs), members=(f"{inside}synchronization",),
    )  # fmt: skip
    yield Component(
        f"{inside}networks", "cache", tick, "its own pre-activations", "none: it keeps ticks",
        f"keeps {config.memory_length} ticks", ("direct, non-parametric",),
        bytes=FLOAT * config.neurons * (config.memory_length - 1), members=(f"{inside}networks",),
    )  # fmt: skip


def _slots(name: str, layer: PMI) -> Iterator[Component]:
    """Working memory, and long-term memory, which changes after it at the same moments."""
    memory, period, size = layer.working, Frequency(layer.chunk_size), FLOAT * layer.d_model * layer.working.slots
    ways = ("direct, parametric", "initialization")
    yield Component(
        f"{name}.working", "memory", period, "the tokens of its chunk", "none: a learned gated write",
        f"M ← σ(f) M + σ(i) tanh(A), {memory.take_in.topk} tokens win", ways, bytes=size,
        members=(f"{name}.working",), depth=1,
    )  # fmt: skip
    if (long_term := layer.long_term) is None:
        return
    outer = long_term.merge == "outer"
    yield Component(
        f"{name}.long_term", "memory", period, "the working memory after each chunk",
        "−⟨M, a ⊗ M_w⟩" if outer else "none: a product with a sum",
        "descent, layer norm" if outer else "M ← LN(M + M ⊙ Σ M_w)", ways if long_term.initial else ways[:1],
        bytes=long_term.segments * size, members=(f"{name}.long_term",),
    )  # fmt: skip


def _level(name: str, level: LevelWeights) -> Iterator[Component]:
    by_loss = isinstance(level, LossLevel)
    ways = ("backpropagation" if by_loss else "direct, parametric", "initialization")
    size = fast_bytes(level.memory, level.d_model)
    context = "the text, in segments" if by_loss else "its inputs, and values made of them"
    yield _memory(name, level.memory, context, ways, size, SEGMENT_LOSS if by_loss else None, level.period)
    if level.outer is not None:
        yield Component(
            f"{name}.initial", "memory", Frequency(level.outer), "what the faster level learned in a period",
            "½‖θ₀ − θ‖²", f"θ₀ ← θ₀ + {level.transfer:g} (θ − θ₀)", ("initialization",), bytes=size, members=(name,),
        )  # fmt: skip


def objective_of(memory: AssociativeMemory) -> str:
    """The objective of a memory as a formula, or by its name."""
    known = {DotProduct: "−⟨M(k), v⟩", L2: "½‖M(k) − v‖²"}
    objective: Any = memory.objective
    if isinstance(objective, Lp):
        return f"‖M(k) − v‖^{objective.p:g}"
    return known.get(type(objective), type(objective).__name__)


def rule_of(memory: AssociativeMemory) -> str:
    """Algorithm and retention, and where errors are taken."""
    kept = {Decay: "decay", Delta: "delta rule"}.get(type(memory.retention), type(memory.retention).__name__)
    algorithm = {"Descent": "descent", "Momentum": "momentum"}.get(name := type(memory.algorithm).__name__, name)
    return f"{algorithm}, {kept}" + (f", chunks of {memory.chunk_size}" if memory.chunk_size > 1 else "")


def fast_bytes(memory: AssociativeMemory, width: int) -> int:
    """Bytes of the fast weights, and of a momentum, for one row."""
    shapes = memory.architecture.shapes(width, width)
    return FLOAT * (1 + memory.has_momentum) * sum(math.prod(shape) for shape in shapes.values())


# -- what only a forward pass shows ---------------------------------------------------------------------------------


def traced(model: nn.Module, example: Any, known: bool) -> tuple[list[Component], list[str]]:
    """Attention, caches, carried states and running statistics, and notes on what could not be seen.

    Args:
        model: any model.
        example: an input; None makes one for models of transformers.
        known: whether the model has memories that are known by their modules; other carried states are then theirs.
    """
    notes: list[str] = []
    given, example = example is not None, example_of(model) if example is None else example
    known_types = CausalAttention | MemoryAsContext | InputAttention | nn.MultiheadAttention
    attends = [n for n, m in model.named_modules() if isinstance(m, known_types)]
    averages = [n for n, m in model.named_modules() if isinstance(m, _NormBase) and m.track_running_stats]
    states: list[Component] = []
    if example is None:
        if type(model).__module__.partition(".")[0] != "torch":
            notes.append("Without example= attention is known by the types of torch's modules only.")
    else:
        try:
            # A memory of slots is read and written by attention, and is a component of its own.
            slots = [n for n, m in model.named_modules() if isinstance(m, WorkingMemory | LongTermMemory)]
            found = _outside(attention_of(model, example), [*attends, *slots])
            attends = list(dict.fromkeys([*attends, *found]))
            buffers = changing_buffers(model, example)
            averages = list(dict.fromkeys([*averages, *(name.rpartition(".")[0] for name in buffers)]))
            states = list(_carried(model, known))
        except Exception as error:  # a foreign model may raise anything
            if given:
                raise ValueError(
                    f"the model cannot run on example=: {type(error).__name__}: {error}. Give a tensor, a tuple of "
                    "arguments, or a dictionary of named ones, on the model's device."
                ) from error
            notes.append(f"The model could not run on an input made from its configuration ({error}); give example=.")
    return [*map(_attention, attends), *states, *(_statistics(name) for name in averages)], notes


def _outside(found: list[str], known: list[str]) -> Iterator[str]:
    """Those that are not parts of known ones."""
    for name in found:
        if not any(name == k or name.startswith(f"{k}.") for k in known):
            yield name


def _attention(name: str) -> Component:
    return Component(
        name, "attention", Frequency(0), "all tokens in view", "Nadaraya–Watson: Σ s(q, k)‖v − y‖²",
        "solved anew for each token", ("direct, non-parametric",), members=(name,),
    )  # fmt: skip


def _statistics(name: str) -> Component:
    return Component(
        name, "statistics", Frequency(1, "batch"), "activations of each batch", "mean and variance of activations",
        "running average", ("direct, parametric",), members=(name,),
    )  # fmt: skip


def _carried(model: nn.Module, known: bool, shorter: int = 8, longer: int = 12) -> Iterator[Component]:
    """What grows with the text is a cache; what does not, and changes, is a state."""
    short, long = carried_state(model, shorter), carried_state(model, longer)
    grows = {n: long[n].nbytes - x.nbytes for n, x in short.items() if n in long and long[n].numel() > x.numel()}
    if grows:
        per_token = sum(grows.values()) // (longer - shorter)
        yield Component(
            "key-value cache", "cache", Frequency(1), "keys and values of all tokens", "none: it keeps every token",
            f"appends {per_token:,} bytes per token", ("direct, non-parametric",), members=tuple(grows),
        )  # fmt: skip
    same = [n for n, x in short.items() if n in long and long[n].shape == x.shape and x.is_floating_point()]
    moved = [n for n in same if short[n].numel() > 1 and (short[n].is_meta or not short[n].equal(long[n]))]
    if moved and not known:
        yield Component(
            "carried state", "memory", Frequency(1), "the tokens read", "none: a learned transition",
            "recurrence of the model", ("direct, parametric",), bytes=sum(short[n].nbytes for n in moved),
            members=tuple(moved),
        )  # fmt: skip


def starts_memory(model: nn.Module) -> Callable[[Tensor], bool]:
    """Whether a parameter is the initial state of a memory."""
    modules = [m for m in model.modules() if isinstance(m, InitialWeights | InitialSlots)]
    found = {id(p) for module in modules for p in module.parameters()}
    return lambda parameter: id(parameter) in found
