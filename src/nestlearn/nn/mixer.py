"""Any associative memory as a sequence layer: projections, local convolution, gates, normalized read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.fields import Count, Positive, Size, from_mapping, unknown_name
from nestlearn.memory import (
    MLP,
    AssociativeMemory,
    Delta,
    DotProduct,
    Gates,
    State,
    catalog,
    has_write_sizes,
    scan,
    scan_with_sizes,
)
from nestlearn.memory.objectives import needs_threshold
from nestlearn.memory.retention import is_per_channel
from nestlearn.memory.types import Weights

from .bounds import (
    MAX_THRESHOLD,
    bounded_momentum,
    bounded_step,
    bounds_values,
    check_step,
    is_deep,
    is_known,
    with_safe_steps,
)
from .common import (
    GateProjection,
    InitialWeights,
    Mixer,
    RMSNorm,
    check_tokens,
    full_precision,
    horizon_bias,
    unit,
    wide_dtype,
)
from .config import MixerConfig, register_mixer
from .conv import ShortConv
from .exact_cache import CacheState, ExactCache, Keep
from .flops import scan_flops
from .state import record


@dataclass(frozen=True)
class GateRule:
    """Which gates of a memory depend on the token.

    Args:
        lr: ``learned`` from the input, or fixed at ``one``.
        retain: ``learned`` from the input, ``one`` (nothing is forgotten), or ``retnet``, the constant
            ``1 - 2^(-5-h)`` of head h (arXiv 2307.08621).

    Momentum and thresholds, where the memory has them, are always learned from the input; with
    `Decay(per_channel=True)` retain has a logit per channel.
    """

    lr: Literal["learned", "one"] = "learned"
    retain: Literal["learned", "one", "retnet"] = "learned"

    def __post_init__(self) -> None:
        if self.lr not in ("learned", "one") or self.retain not in ("learned", "one", "retnet"):
            raise ValueError(f"unknown gate in {self!r}: lr is 'learned' or 'one'; retain 'learned', 'one' or 'retnet'")


GATE_RULES: dict[str, GateRule] = {
    "linear_attention": GateRule(lr="one", retain="one"),
    "retnet": GateRule(lr="one", retain="retnet"),
    "deltanet": GateRule(retain="one"),
    "ttt_linear": GateRule(retain="one"),
    "ttt_mlp": GateRule(retain="one"),
}
"""Gates of the memories of the catalog whose papers fix one; every other memory has both gates learned."""


@dataclass(frozen=True)
class FastMemoryConfig(MixerConfig):
    """Fields of every mixer around an associative memory of `nestlearn.memory`.

    Args:
        memory: a name of `nestlearn.memory.catalog`, or any `AssociativeMemory` (which a saved model knows only by a
            name: ``catalog["mine"] = memory``).
        expansion: replaces the hidden width of an MLP memory over its head width.
        chunk_size: replaces the memory's own chunk size: errors are taken at the chunk's first weights.
        max_step: scale of the step size: any for proximal steps, which most memories take in a layer
            (`nestlearn.nn.bounds`), at most 2 for other delta rules, else 1. None is 4 for proximal steps, else 1.
        gates: which gates are learned. By default as in the paper of a catalog name, else all.
        conv_size: width of the depthwise causal convolution on q, k and v; 0 for none.
        norm_eps: epsilon of the norms.

    Raises:
        ValueError: for names or steps that do not fit, with the fix.
    """

    memory: str | AssociativeMemory = "titans"
    expansion: Size | None = None
    chunk_size: Size | None = None
    max_step: Positive | None = None
    gates: GateRule | None = None
    conv_size: Count = 4
    norm_eps: Positive = 1e-6

    def __post_init__(self) -> None:
        if isinstance(self.gates, Mapping):
            object.__setattr__(self, "gates", from_mapping(GateRule, self.gates, "field of gates"))
        super().__post_init__()
        memory, _ = self.resolved()
        check_step(memory, self.max_step)

    def resolved(self) -> tuple[AssociativeMemory, GateRule]:
        """The memory at the configured sizes and with steps that are safe in a layer, and its gates."""
        memory, rule = self.memory, GateRule()
        if isinstance(memory, str):
            if memory not in catalog:
                raise unknown_name("memory", memory, catalog)
            memory, rule = catalog[memory], GATE_RULES.get(memory, rule)
        if self.expansion is not None and isinstance(memory.architecture, MLP):
            memory = replace(memory, architecture=replace(memory.architecture, expansion=self.expansion))
        if self.chunk_size is not None:
            memory = replace(memory, chunk_size=self.chunk_size)
        memory = with_safe_steps(memory)
        rule = rule if self.gates is None else self.gates
        _check_rule(memory, rule)
        return memory, rule

    def alone(self, **changes: Any) -> MemoryMixerConfig:
        """The configuration of the memory as a mixer of its own, with some fields changed."""
        names = ("memory", "expansion", "chunk_size", "max_step", "gates", "conv_size", "norm_eps")
        return MemoryMixerConfig(**({name: getattr(self, name) for name in names} | changes))

    @property
    def work_period(self) -> int:
        return self.resolved()[0].chunk_size

    def to_dict(self) -> dict[str, Any]:
        if not isinstance(self.memory, str):
            raise ValueError(
                f"memory={self.memory!r} has no name that a saved configuration could hold. Give it one, "
                'nestlearn.memory.catalog["mine"] = memory, and use memory="mine".'
            )
        return super().to_dict()


@register_mixer("memory")
@dataclass(frozen=True)
class MemoryMixerConfig(FastMemoryConfig):
    """Configuration of `MemoryMixer`: the fields of `FastMemoryConfig`, and four more.

    Args:
        output_gate: multiply what is read by ``silu(W_g x)``.
        learn_initial: train the initial weights of a matrix memory as well (they start at zero). Those of an MLP
            are always trained.
        cache: tokens that an `ExactCache` keeps per head beside the memory; 0 for none. A matrix memory with delta
            retention and no momentum can have one.
        cache_keep: which ones: those that wrote most (``surprise``), or the most recent ones (``recent``).
    """

    output_gate: bool = False
    learn_initial: bool = False
    cache: Count = 0
    cache_keep: Keep = "surprise"

    def __post_init__(self) -> None:
        super().__post_init__()
        memory, _ = self.resolved()
        if self.cache and not has_write_sizes(memory):
            known = ", ".join(repr(name) for name in catalog if has_write_sizes(catalog[name]))
            raise ValueError(
                f"cache={self.cache} keeps the tokens that wrote most into the memory, and memory={self.memory!r} has "
                f"no size of a single write. Use a matrix memory with delta retention and no momentum ({known}), or "
                "cache=0."
            )

    @property
    def shortest_text(self) -> int:
        return self.cache + self.resolved()[0].chunk_size + 1 if self.cache else 1

    def build(self, d_model: int, num_heads: int) -> MemoryMixer:
        return MemoryMixer(d_model, num_heads, self)


@record("memory_mixer")
class MixerState(NamedTuple):
    """Streaming state of a `MemoryMixer`: fast weights, the tail of the convolution and the cache (None without)."""

    memory: State
    conv: Float[Tensor, "b w ch"] | None
    cache: CacheState | None = None


class MemoryMixer(Mixer):
    r"""A sequence layer around one associative memory per head.

        q_t, k_t, v_t = silu(conv(W_qkv x_t)),  q and k of unit norm (v too if the memory is an MLP)
        M_t = M_{t-1} after writing (k_t, v_t) with gates (eta_t, alpha_t, beta_t),   y_t = W_o norm(M_t(q_t))

    The memory and its update are those of `nestlearn.memory.scan` (NL Eq. 57, 88; Titans Eq. 9-14). Values are
    normalized for an MLP memory because its maps multiply each other: unbounded targets overflow within one sequence;
    also where objective or retention is not linear, which a scale of the values would change.

    **Bounds** (no gate the layer can emit makes the recurrence expand): retain in [0, 1], thresholds in [0, 2], a step
    size and a momentum bounded jointly with them. A memory of the package that feeds errors back takes proximal steps
    (``layer.memory`` is the memory as it runs), others a small enough step: see `nestlearn.nn.bounds`.

    Args:
        d_model: width of input and output.
        num_heads: heads; must divide ``d_model``. Each has its own memory.
        config: the memory and its settings; `MemoryMixerConfig`.

    Raises:
        ValueError: for sizes that do not fit, with the fix.

    Example:
        >>> import torch
        >>> from nestlearn.nn import MemoryMixerConfig
        >>> layer = MemoryMixerConfig("gated_deltanet", chunk_size=8).build(16, num_heads=2)
        >>> x = torch.randn(1, 20, 16)
        >>> y, state = layer(x[:, :13])
        >>> rest, state = layer(x[:, 13:], state)
        >>> torch.allclose(torch.cat([y, rest], 1), layer(x)[0], atol=1e-5)
        True
    """

    def __init__(self, d_model: int, num_heads: int, config: MemoryMixerConfig) -> None:
        super().__init__()
        config.check_sizes(d_model, num_heads)
        self.memory, self.rule = config.resolved()
        self.max_step = check_step(self.memory, config.max_step)
        self.d_model, self.num_heads, self.d_head = d_model, num_heads, d_model // num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.conv = ShortConv(3 * d_model, config.conv_size, silu=True) if config.conv_size else None
        biases = _gate_biases(self.memory, self.rule, num_heads, self.d_head)
        self.gates = GateProjection(d_model, biases) if biases else None
        self.initial: InitialWeights | None = None
        if is_deep(self.memory) or config.learn_initial:
            self.initial = InitialWeights(self.memory, (num_heads,), self.d_head, self.d_head)
        self.cache: ExactCache | None = None
        if config.cache:
            self.cache = ExactCache(config.cache, self.memory.chunk_size, num_heads, config.cache_keep)
        self.norm = RMSNorm(self.d_head, eps=config.norm_eps)
        self.output_gate = nn.Linear(d_model, d_model, bias=False) if config.output_gate else None
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: MixerState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        *,
        writes: bool = True,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "b t d"], MixerState | None]:
        """Read tokens, answer each, and learn from them; the protocol of `nestlearn.nn.Mixer`."""
        check_tokens(x, self.d_model)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, 0)
        q, k, v, tail = self._heads(x, None if state is None else state.conv, mask, reset)
        with full_precision(x):
            initial = self.initial_weights(q)
            gates = self._gates(x, initial, writes)
            heads, before = (-1, self.num_heads, -1), None if state is None else state.memory
            flags = {"mask": mask, "reset": reset}
            flags = {name: None if flag is None else flag.unsqueeze(1).expand(heads) for name, flag in flags.items()}
            start = None if self.initial is None else initial  # None: known to be zero
            settings: Any = {"initial": start, "return_state": return_state, **flags}
            cached = None
            if self.cache is None:
                y, end = scan(self.memory, before, q, k, v, gates, **settings)
            else:
                y, end, sizes = scan_with_sizes(self.memory, before, q, k, v, gates, **settings)
                read, cached = self.cache(q, k, v, sizes, None if state is None else state.cache, mask, reset)
                y = y + read
            y = self.norm(y)
        y = y.transpose(1, 2).flatten(2).to(x.dtype)
        if self.output_gate is not None:
            y = y * F.silu(self.output_gate(x))
        # A copy: the tail is a view that would keep all tokens of this call alive.
        tail = tail.clone() if tail is not None and return_state else tail
        return self.out(y), MixerState(end, tail, cached) if return_state else None

    def _heads(
        self, x: Tensor, tail: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values ``[b, h, t, d_head]``, and the new tail. Keys and values are wide."""
        mixed = self.qkv(x)
        if self.conv is None:
            mixed = F.silu(mixed)
        else:
            mixed, tail = self.conv(mixed, tail, mask, reset)
        q, k, v = mixed.to(wide_dtype(x)).unflatten(-1, (3, self.num_heads, self.d_head)).permute(2, 0, 3, 1, 4)
        # On a device the dtype of q is that of a kernel's products (docs/gpu.md).
        q = unit(q).to(mixed.dtype) if x.is_cuda else unit(q)
        return q, unit(k), unit(v) if bounds_values(self.memory) else v, tail

    def _gates(self, x: Tensor, initial: Weights, writes: bool) -> Gates:
        """Bounded gates ``[b, h, t]``; see `nestlearn.nn.bounds`."""
        logits = {} if self.gates is None else self.gates(x)
        ones = x.new_ones(x.shape[0], self.num_heads, x.shape[1], dtype=wide_dtype(x))
        retain = ones
        channels = is_per_channel(self.memory.retention)
        if self.rule.retain == "learned":
            retain = torch.sigmoid(logits["retain"])
            if channels:
                retain = retain.unflatten(1, (self.num_heads, self.d_head)).mT
        elif self.rule.retain == "retnet":
            head = torch.arange(self.num_heads, device=x.device, dtype=ones.dtype)
            retain = ones * (1 - 2.0 ** (-5 - head)).unsqueeze(-1)
        if channels and retain.dim() == ones.dim():
            retain = retain.unsqueeze(-1).expand(-1, -1, -1, self.d_head)
        lr = ones
        if self.rule.lr == "learned":
            lr = bounded_step(self.memory, self.max_step, torch.sigmoid(logits["lr"]), retain, initial)
        momentum = None
        if "momentum" in logits:
            momentum = bounded_momentum(self.memory, torch.sigmoid(logits["momentum"]), retain)
        threshold = MAX_THRESHOLD * torch.sigmoid(logits["threshold"]) if "threshold" in logits else None
        return Gates(lr if writes else torch.zeros_like(lr), retain, momentum, threshold)

    def initial_weights(self, like: Tensor) -> Weights:
        """Initial weights ``[h, out, in]`` in the dtype (and on the device) of ``like``."""
        if self.initial is None:
            shapes = self.memory.architecture.shapes(self.d_head, self.d_head)
            zeros = {name: like.new_zeros(self.num_heads, *shape) for name, shape in shapes.items()}
            return {name: self.memory.retention.start(w) for name, w in zeros.items()}
        return self.initial(like.dtype)

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token at this context length (multiply-add = 2), writes included."""
        linears = [self.qkv, self.out, *([self.output_gate] if self.output_gate is not None else [])]
        slow = sum(2 * linear.weight.numel() for linear in linears)
        slow += 0 if self.conv is None else self.conv.flops_per_token(context_length)
        slow += 0 if self.gates is None else 2 * self.gates.weight.numel()
        slow += 0 if self.cache is None else self.cache.flops_per_token(context_length, self.d_head)
        return slow + self.num_heads * scan_flops(self.memory, self.d_head, self.d_head, context_length)


def _check_rule(memory: AssociativeMemory, rule: GateRule) -> None:
    """Raise ValueError for gates with which the memory expands or never writes."""
    free = isinstance(memory.objective, DotProduct) and not memory.has_momentum
    if rule.lr == "one" and (is_deep(memory) or not free):
        raise ValueError(
            "GateRule(lr='one') writes with step size 1, which is stable only for a matrix memory with the "
            f"dot-product objective and no momentum; got {memory!r}. Use lr='learned'."
        )
    if rule.retain == "one" and _tied(memory):
        raise ValueError(
            f"{memory!r} has its step tied to its decay, step <= 1 - retain, so it would never write with "
            "GateRule(retain='one'). Use retain='learned', or delta retention."
        )


def _tied(memory: AssociativeMemory) -> bool:
    """Whether only decay bounds the memory, so that its step must stay below it; see `nestlearn.nn.bounds`."""
    tied = is_deep(memory) and isinstance(memory.objective, DotProduct) and not isinstance(memory.retention, Delta)
    return tied and is_known(memory) and not memory.follows_weights


def _gate_biases(memory: AssociativeMemory, rule: GateRule, heads: int, width: int) -> dict[str, tuple[float, ...]]:
    """The learned gates and the logit each starts at.

    Matrices begin with horizons of 16 to 1,024 tokens over the heads. A deep memory that decays takes its meta-learned
    weights along, so it begins at 0.9997; where its step is tied to the decay, at 64 to 4,096 tokens.
    """
    biases: dict[str, tuple[float, ...]] = {}
    if rule.lr == "learned":
        biases["lr"] = (0.0,) * heads
    if rule.retain == "learned":
        if not is_deep(memory):
            biases["retain"] = horizon_bias(16, 1024, heads)
        else:
            biases["retain"] = horizon_bias(64, 4096, heads) if _tied(memory) else (8.0,) * heads
        if is_per_channel(memory.retention):
            biases["retain"] = tuple(bias for bias in biases["retain"] for _ in range(width))
    if memory.has_momentum:
        biases["momentum"] = (0.0,) * heads
    if needs_threshold(memory.objective):
        biases["threshold"] = (0.0,) * heads
    return biases
