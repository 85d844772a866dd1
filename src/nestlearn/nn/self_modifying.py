"""Self-modifying Titans: the projections of a memory are memories themselves (NL Eq. 83-91)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory import (
    L2,
    MLP,
    AssociativeMemory,
    Decay,
    Delta,
    Descent,
    DotProduct,
    Factor,
    Gates,
    Momentum,
    State,
)
from nestlearn.memory.associative import Read, RetainTo, StepSize
from nestlearn.memory.chunked import (
    Prepared,
    Tokens,
    absorb_span,
    advance_span,
    anchored,
    prepare,
    revive,
    run_span,
    split_tokens,
    spoil_before_reset,
)
from nestlearn.memory.clock import known_empty, place, scatter_outputs, span_length
from nestlearn.memory.kernels.products import Activation, limit_gradient, unit_norm
from nestlearn.memory.types import Running, Weights

from .bounds import MAX_MOMENTUM, check_self_modifying_step
from .common import HeadNorm, InitialWeights, check_tokens, full_precision, wide_dtype
from .conv import ShortConv
from .flops import self_modifying_flops
from .self_modifying_state import (
    MOST_LEARNED,
    STREAMS,
    Projected,
    SelfModifyingState,
    back_to_initial,
    check_settings,
    handed_on,
    poison_state,
    quarantine,
    refresh,
    single,
    split_projected,
    stacked,
)

GRADIENT_LIMIT = 1e6
"""Norm beyond which the gradient of carried weights is scaled down."""


class SelfModifyingTitans(nn.Module):
    r"""A sequence layer whose keys, values, step sizes and retention come from memories that learn in context.

    At the weights of the last chunk boundary (NL Eq. 83-91; docs/decisions.md for what the paper leaves open):

        k_t = M_k(x^k_t)   v_t = M_v(x^v_t)   eta_t = M_eta(x^eta_t)   alpha_t = M_alpha(x^alpha_t)
        v^_{m,t} = M_m(v_t)      every memory m generates its own target (v_t itself without self_values)
        W_m <- W_m (alpha_t I - eta'_t x x^T) - eta'_t e x^T  for every map of every memory (retention to initial)
        y_t = M_memory,t(q_t)    or, with chunk reads, the memory at the start of the chunk of t

    Each stream ``x^m`` is a linear map of the input, a causal convolution of width 4 and SiLU, split in heads.
    q, k, v and the targets are L2-normalized per head. All initial states are meta-learned parameters.

    **Bounds** (no gate the layer can emit makes the recurrence expand): alpha in (0, 1], momentum beta in (0, 0.9), and
    ``eta < max_step (1 - beta)``. Proximal steps contract at any max_step. ``normalized`` steps have max_step <= 2,
    eigenvalues in [-1, 1]. The L2 objective feeds back the error at the anchor, so eta is also divided by
    projection_chunk_size. Without delta retention ``eta < max_step (1 - alpha)`` with max_step <= 1/2: what is written
    stays smaller than the initial weights. A memory that writes its own targets is bounded but can be chaotic, with
    eigenvalues near -1 above all: gradients through it grow exponentially. The gradient of the weights that pass from
    one span to the next is therefore scaled down to norm 1e6 where it is larger; below it is exact.

    Args:
        d_model: width of input and output.
        num_heads: heads; d_model must be divisible by it.
        expansion: hidden units of a memory per head width.
        memory_chunk_size: tokens between two anchors of the main memory.
        projection_chunk_size: the same for the projection memories; a multiple of memory_chunk_size.
        adaptive: which of ``q k v eta alpha`` are memories; the others are static projections (NL Table 6).
        step_size: ``proximal`` or ``normalized``, for all maps or per map ``{map: mode}``.
        max_step: upper bound of eta.
        objective: ``dot`` or ``l2`` (paper-literal).
        momentum: add momentum to the inner rule (NL Table 6).
        delta: DGD's erasing term; False is plain gradient descent (NL Table 6).
        retention: learned alpha; False keeps alpha = 1 (NL Table 6).
        conv_size: width of the convolution; 0 for none.
        activation: of the memories.
        read: ``token`` reads the memory after the token's own write, ``chunk`` at the start of its chunk (NL Eq. 90).
        self_values: False gives every memory the value v_t as its target.
        retain_to: what retention and erasing pull toward, the ``initial`` weights or ``zero`` (as printed).

    Raises:
        ValueError: for contradictory or impossible settings.

    Example:
        >>> import torch
        >>> from nestlearn.nn import SelfModifyingTitans
        >>> layer = SelfModifyingTitans(d_model=32, num_heads=2, memory_chunk_size=8, projection_chunk_size=16)
        >>> x = torch.randn(1, 20, 32)
        >>> y, state = layer(x[:, :13])
        >>> rest, state = layer(x[:, 13:], state)
        >>> torch.allclose(torch.cat([y, rest], 1), layer(x)[0], atol=1e-5)
        True
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        expansion: int = 4,
        memory_chunk_size: int = 64,
        projection_chunk_size: int = 256,
        adaptive: Sequence[str] = ("k", "v", "eta", "alpha"),
        step_size: StepSize | Mapping[str, StepSize] = "proximal",
        max_step: float | None = None,
        objective: str = "dot",
        momentum: bool = False,
        delta: bool = True,
        retention: bool = True,
        conv_size: int = 4,
        activation: Activation = "gelu",
        norm_eps: float = 1e-6,
        read: Read = "token",
        self_values: bool = True,
        retain_to: RetainTo = "initial",
    ):
        super().__init__()
        check_settings(d_model, num_heads, adaptive, objective, delta, retention)
        self.memory = AssociativeMemory(
            MLP(expansion, activation),
            objective=DotProduct() if objective == "dot" else L2(),
            retention=Delta() if delta else Decay(),
            algorithm=Momentum() if momentum else Descent(),
            step_size=step_size if delta else "raw",
            retain_to=retain_to,
            chunk_size=memory_chunk_size,
            read=read,
        )
        if projection_chunk_size < 1 or projection_chunk_size % memory_chunk_size:
            raise ValueError(
                f"projection_chunk_size must be a multiple of memory_chunk_size, "
                f"got {projection_chunk_size} and {memory_chunk_size}"
            )
        self.max_step = check_self_modifying_step(self.memory, max_step)
        self.d_model, self.num_heads, self.d_head = d_model, num_heads, d_model // num_heads
        self.projection_chunk_size = projection_chunk_size
        self.adaptive = tuple(name for name in STREAMS if name in adaptive)
        self.streams_order = (*self.adaptive, *(name for name in STREAMS if name not in adaptive))
        self.retention, self.self_values = retention, self_values
        self.streams = nn.Linear(d_model, len(STREAMS) * d_model, bias=False)
        self.conv = ShortConv(len(STREAMS) * d_model, conv_size, silu=True) if conv_size else None
        names = (*self.adaptive, "memory")
        initial = {name: InitialWeights(self.memory, (num_heads,), self.d_head, self.d_head) for name in names}
        self.initial = nn.ModuleDict(initial)
        self.eta_vector = nn.Parameter(torch.empty(num_heads, self.d_head))
        self.eta_bias = nn.Parameter(torch.empty(num_heads))
        self.alpha_vector = nn.Parameter(torch.empty(num_heads, self.d_head))
        self.alpha_bias = nn.Parameter(torch.empty(num_heads))
        self.beta_gate = nn.Linear(d_model, num_heads) if momentum else None
        self.norm, self.norm_eps = HeadNorm(self.d_head, eps=norm_eps), norm_eps
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def vector_parameters(self) -> list[nn.Parameter]:
        """Parameters whose rows are vectors and no linear map: no matrix rule of an optimizer suits them."""
        return [self.eta_vector, self.alpha_vector]

    def reset_parameters(self) -> None:
        """Initial values: random memories (both maps non-zero), gates that read a little and keep nearly everything."""
        for weights in self.initial.values():
            weights.reset_parameters()  # type: ignore[operator]
        # Small streams keep SiLU in its linear range: keys then have mean zero and do not erase each other
        # (docs/log.md: recall is learned in a third of the steps).
        nn.init.normal_(self.streams.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=self.d_model**-0.5)
        if self.conv is not None:
            self.conv.reset_parameters()
        for vector in (self.eta_vector, self.alpha_vector):
            nn.init.normal_(vector, std=0.02)
        nn.init.zeros_(self.eta_bias)
        # alpha = sigmoid(8) = 0.9997: with less the memories forget before they can be read (design trial).
        nn.init.constant_(self.alpha_bias, 8.0 if isinstance(self.memory.retention, Delta) else 4.0)
        if self.beta_gate is not None:
            nn.init.normal_(self.beta_gate.weight, std=0.02)
            nn.init.zeros_(self.beta_gate.bias)
        nn.init.ones_(self.norm.weight)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: SelfModifyingState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        *,
        writes: bool = True,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "b t d"], SelfModifyingState | None]:
        """Read tokens, answer each, and learn from them.

        Args:
            x: inputs; masked tokens may hold anything.
            state: from an earlier call; None starts fresh.
            mask: False marks padding: it changes nothing and its output is 0.
            reset: True forgets everything of the row before that token.
            writes: False computes the same with step size 0.
            return_state: False skips the work only the next call would need.

        Returns:
            Outputs and the state after the last token (None if not asked for). A non-finite token makes the outputs of
            its row NaN from there to the next reset.
        """
        check_tokens(x, self.d_model)
        x, poisoned = quarantine(x, mask, reset)
        streams, beta, tail = self._streams(x, None if state is None else state.conv, mask, reset)
        with full_precision(x):
            if mask is None and reset is None and (state is None or state.clock.aligned):
                y, new = self._aligned(streams, beta, state, writes, return_state)
            else:
                y, new = self._placed(streams, beta, state, mask, reset, writes)
        y = self._merge(y, x)
        if not known_empty(poisoned):
            visible = poisoned if mask is None else poisoned & mask
            y = torch.where(visible.unsqueeze(-1), float("nan"), y)
        if mask is not None:
            y = torch.where(mask.unsqueeze(-1), y, 0)
        if not return_state:
            return y, None
        new = poison_state(new._replace(conv=tail), poisoned[:, -1])
        return y, new

    def _streams(
        self, x: Tensor, tail: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Streams ``[b, t, streams, heads, d]``, momentum gate ``[b, heads, t]``, both wide, and the new tail."""
        mixed, end = self.streams(x), None
        if self.conv is None:
            mixed = F.silu(mixed)
        else:
            mixed, end = self.conv(mixed, tail, mask, reset)
        wide = wide_dtype(x)
        split = mixed.to(wide).unflatten(-1, (len(STREAMS), self.num_heads, self.d_head))
        beta = None
        if self.beta_gate is not None:
            beta = MAX_MOMENTUM * torch.sigmoid(self.beta_gate(x).to(wide)).mT
        return split, beta, end

    def _merge(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads back together, in the dtype of the inputs: ``[b * heads, t, d] -> [b, t, d_model]``."""
        y = self.norm(y).unflatten(0, (x.shape[0], self.num_heads))
        return self.out(y.transpose(1, 2).flatten(2).to(x.dtype))

    def _initial(self, names: tuple[str, ...], batch: int, dtype: torch.dtype) -> Weights:
        """Initial weights of a group of memories, ``[batch * heads, memories, out, in]``."""
        maps = self.memory.architecture.shapes(self.d_head, self.d_head)
        made = [self.initial[n](dtype) for n in names]
        stacked = {m: torch.stack([weights[m] for weights in made], 1) for m in maps}
        return {m: w.repeat(batch, 1, 1, 1) for m, w in stacked.items()}

    def _group(self, names: tuple[str, ...], fast: State | None, batch: int, dtype: torch.dtype) -> Running:
        """A group of memories as one state of rows ``[batch * heads, memories]``."""
        initial = self._initial(names, batch, dtype)
        nothing = torch.zeros((), dtype=torch.long)
        if fast is None:
            momentum = None
            if isinstance(self.memory.algorithm, Momentum):
                momentum = {m: torch.zeros_like(w) for m, w in initial.items()}
            return Running(initial, momentum, initial, initial, nothing)

        def rows(weights: Weights) -> Weights:
            return {m: w.flatten(0, 1) for m, w in weights.items()}

        momentum = None if fast.momentum is None else rows(fast.momentum)
        return Running(rows(fast.params), momentum, rows(fast.anchor), initial, nothing)

    def _project(
        self, group: Running | None, streams: Tensor, beta: Tensor | None, reset: Tensor | None, writes: bool
    ) -> Projected:
        """Keys, values, queries, gates of a span at the projection anchor; ``streams: [b, c, streams, heads, d]``."""
        sizes = (len(self.adaptive), len(STREAMS) - len(self.adaptive))
        adaptive, static = (x.permute(0, 3, 2, 1, 4).flatten(0, 1) for x in streams.split(sizes, 2))
        if group is not None:
            linear, _ = anchored(group.anchor, group.initial, None if reset is None else reset.unsqueeze(1))
            made = (*self.memory.architecture(linear, adaptive).unbind(1), *static.unbind(1))
        else:
            made = static.unbind(1)
        named = dict(zip(self.streams_order, made, strict=True))
        q, k, v, eta, alpha = (named[name] for name in STREAMS)
        batch = streams.shape[0]
        eta_logit, alpha_logit = (
            torch.bmm(x, vector.to(x.dtype).repeat(batch, 1).unsqueeze(-1)).view(batch, self.num_heads, -1)
            for x, vector in ((eta, self.eta_vector), (alpha, self.alpha_vector))
        )
        gates = self._gates(eta_logit, alpha_logit, beta, writes)
        return Projected(unit_norm(q), unit_norm(k), unit_norm(v), gates)

    def _gates(self, eta_logit: Tensor, alpha_logit: Tensor, beta: Tensor | None, writes: bool) -> Gates:
        """Bounded gates (see the class docstring) from their logits ``[b, heads, c]``; returns rows ``[r, c]``."""
        alpha = torch.sigmoid(alpha_logit + self.alpha_bias.to(alpha_logit.dtype).unsqueeze(-1))
        eta = self.max_step * torch.sigmoid(eta_logit + self.eta_bias.to(eta_logit.dtype).unsqueeze(-1))
        alpha, eta = alpha.flatten(0, 1), eta.flatten(0, 1)
        if not isinstance(self.memory.retention, Delta):
            eta = eta * (1 - alpha)
        if beta is not None:
            eta = eta * (1 - beta)
        if self.memory.objective == L2():
            eta = eta / self.projection_chunk_size
        if not self.retention:
            alpha = torch.ones_like(alpha)
        if not writes:
            eta = torch.zeros_like(eta)
        return Gates(eta, alpha, beta)

    def _learn_projections(
        self,
        group: Running,
        made: Projected,
        valid: Tensor | None,
        reset: Tensor | None,
        prepared: Sequence[Prepared] | None = None,
    ) -> Running:
        """Write a span into the projection memories; errors at their anchor. ``prepared``: its pieces, if at hand."""
        memories, flag = self.memory.architecture, None if reset is None else reset.unsqueeze(1)
        linear, adjoint = anchored(group.anchor, group.initial, flag)
        k, v = made.k.unsqueeze(1), made.v.unsqueeze(1)
        target = unit_norm(memories(linear, v)) if self.self_values else v.expand(-1, len(self.adaptive), -1, -1)
        factors = memories.factors(linear, adjoint, k, target, self.memory.objective)
        tokens = k.shape[-2]
        size = span_length(self.projection_chunk_size, tokens, longest=MOST_LEARNED) if valid is None else tokens
        inputs = {m: f.input.split(size, -2) for m, f in factors.items()}
        errors = {m: f.error.split(size, -2) for m, f in factors.items()}
        pieces = split_tokens(made.gates, size)
        for i, gates in enumerate(pieces):
            here = {m: Factor(inputs[m][i], errors[m][i]) for m in factors}
            gates = Gates(*gates).map(lambda g: g.unsqueeze(1))
            shared = None if prepared is None else prepared[i].map(lambda x: x.unsqueeze(1))
            span = Tokens(None, k, v, gates, None if valid is None else valid.unsqueeze(1), flag, shared)
            kernels, starts, writes = absorb_span(self.memory, group, here, span, guard=False)
            last = i == len(pieces) - 1
            group = advance_span(self.memory, group, kernels, starts, writes, span.valid, settle=last)
        return self._carry(group._replace(displacement=None))

    def _run_memory(
        self,
        group: Running,
        made: Projected,
        valid: Tensor | None,
        reset: Tensor | None,
        update: bool,
        prepared: Prepared | None = None,
    ) -> tuple[Tensor, Running]:
        """Outputs of a span and the main memory after it."""
        group, lost = (group, None) if reset is None else revive(group, reset)
        linear, _ = anchored(group.anchor, group.initial, reset)
        target = unit_norm(self.memory.architecture(linear, made.v)) if self.self_values else made.v
        span = Tokens(made.q, made.k, target, made.gates, valid, reset, prepared)
        y, group = run_span(self.memory, group, span, self.memory.read, update=update, guard=False)
        assert y is not None
        if lost is not None and reset is not None:
            y = spoil_before_reset(y, lost, reset)
        return y, self._carry(group) if update else group

    def _carry(self, group: Running) -> Running:
        """The group as it goes on to the next span, its gradients finite whatever the gates were."""
        params = {m: limit_gradient(w, GRADIENT_LIMIT) for m, w in group.params.items()}
        return group._replace(params=params, displacement=None)

    def _aligned(
        self, streams: Tensor, beta: Tensor | None, state: SelfModifyingState | None, writes: bool, return_state: bool
    ) -> tuple[Tensor, SelfModifyingState]:
        """All rows at the start of a chunk: projections run over whole projection chunks."""
        (batch, tokens), dtype = streams.shape[:2], streams.dtype
        projections = None
        if self.adaptive:
            projections = self._group(self.adaptive, None if state is None else state.projections, batch, dtype)
        memory = single(self._group(("memory",), None if state is None else state.memory, batch, dtype))
        beta = None if beta is None else beta.flatten(0, 1)
        chunk, outputs = self.projection_chunk_size, []
        size = span_length(self.memory.chunk_size, tokens)
        streams_cut, beta_cut = streams.split(chunk, 1), None if beta is None else beta.split(chunk, 1)
        for j, here in enumerate(streams_cut):
            begin, end = j * chunk, min(j * chunk + chunk, tokens)
            if projections is not None:
                projections = projections._replace(anchor=projections.params)
            made = self._project(projections, here, None if beta_cut is None else beta_cut[j], None, writes)
            parts = split_projected(made, size)
            prepared = prepare(self.memory, [part.k for part in parts], [part.gates for part in parts])
            for i, part in enumerate(parts):
                if i * size % self.memory.chunk_size == 0:
                    memory = memory._replace(anchor=memory.params)
                update = return_state or begin + (i + 1) * size < tokens
                y, memory = self._run_memory(memory, part, None, None, update, prepared[i])
                outputs.append(y)
            if projections is not None and (return_state or end < tokens):
                same = span_length(chunk, end - begin, longest=MOST_LEARNED) == size
                projections = self._learn_projections(projections, made, None, None, prepared if same else None)
        if tokens % self.memory.chunk_size == 0:
            memory = memory._replace(anchor=memory.params)
        if tokens % chunk == 0 and projections is not None:
            projections = projections._replace(anchor=projections.params)
        position = torch.full((batch,), tokens % chunk, dtype=torch.long, device=streams.device)
        return torch.cat(outputs, 1), self._pack(projections, memory, position, tokens % chunk == 0)

    def _pack(
        self, projections: Running | None, memory: Running, position: Tensor, aligned: bool
    ) -> SelfModifyingState:
        learned = None if projections is None else handed_on(projections, position, aligned)
        inside = position % self.memory.chunk_size
        return SelfModifyingState(learned, handed_on(stacked(memory), inside, aligned), None)

    def _placed(
        self,
        streams: Tensor,
        beta: Tensor | None,
        state: SelfModifyingState | None,
        mask: Tensor | None,
        reset: Tensor | None,
        writes: bool,
    ) -> tuple[Tensor, SelfModifyingState]:
        """Rows of any phase, masks and resets: one span of the main memory's chunk at a time."""
        (batch, tokens), dtype, device = streams.shape[:2], streams.dtype, streams.device
        projections = None
        if self.adaptive:
            projections = self._group(self.adaptive, None if state is None else state.projections, batch, dtype)
        memory = single(self._group(("memory",), None if state is None else state.memory, batch, dtype))
        position = (
            torch.zeros(batch, dtype=torch.long, device=device) if state is None else state.clock.position[:, 0, 0]
        )
        size = span_length(self.memory.chunk_size, tokens)
        grid = place(position, tokens, self.projection_chunk_size, size, mask, reset, boundary=self.memory.chunk_size)
        texts, grid = grid, grid.repeat(self.num_heads)
        row = torch.arange(batch * self.num_heads, device=device)[:, None, None]
        beta = None if beta is None else torch.where(grid.valid, beta.flatten(0, 1)[row, grid.index], 1)
        outputs = []
        for i in range(grid.index.shape[1]):
            valid, flag = grid.valid[:, i], None if grid.reset is None else grid.reset[:, i]
            here = streams[row[:batch, 0], texts.index[:, i]]
            here = torch.where(texts.valid[:, i, :, None, None, None], here, 0)
            begins = grid.phase[:, i]
            projections = None if projections is None else refresh(projections, begins == 0)
            memory = refresh(memory, begins % self.memory.chunk_size == 0)
            made = self._project(projections, here, None if beta is None else beta[:, i], flag, writes)
            gates = Gates(
                torch.where(valid, made.gates.lr, 0), torch.where(valid, made.gates.retain, 1), made.gates.momentum
            )
            made = made._replace(gates=gates)
            y, memory = self._run_memory(memory, made, valid, flag, update=True)
            outputs.append(y)
            if projections is not None:
                projections = self._learn_projections(projections, made, valid, flag)
            if flag is not None:
                restarted = flag.any(-1)
                memory = back_to_initial(memory, restarted)
                projections = None if projections is None else back_to_initial(projections, restarted)
        memory = refresh(memory, grid.end % self.memory.chunk_size == 0)
        projections = None if projections is None else refresh(projections, grid.end == 0)
        y = scatter_outputs(torch.stack(outputs, 1), grid, tokens)
        return y, self._pack(projections, memory, grid.end.view(batch, self.num_heads)[:, 0], aligned=False)

    def loop(
        self, x: Float[Tensor, "b t d"], state: SelfModifyingState | None = None
    ) -> tuple[Float[Tensor, "b t d"], SelfModifyingState]:
        """The definition: the same layer token by token with inner gradients by autograd. The oracle of `forward`."""
        from .self_modifying_loop import token_loop

        return token_loop(self, x, state)

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token at this context length (multiply-add = 2), writes included."""
        width, longest = self.d_head, span_length(self.projection_chunk_size, context_length, MOST_LEARNED)
        learning = max(0, 1 - self.projection_chunk_size / context_length)
        fast = self_modifying_flops(
            self.memory, width, len(self.adaptive), learning, longest, context_length, self_values=self.self_values
        )
        linear = 2 * self.d_model * (len(STREAMS) + 1) * self.d_model
        return linear + self.num_heads * fast + (0 if self.conv is None else self.conv.flops_per_token(context_length))

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, adaptive={self.adaptive}, "
            f"projection_chunk_size={self.projection_chunk_size}, max_step={self.max_step}, memory={self.memory}"
        )
