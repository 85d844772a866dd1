"""A hierarchy of memories: a slow one over the whole text, fast ones that start anew in every window (TNT)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nestlearn.fields import Size
from nestlearn.memory import Gates, State, catalog, scan
from nestlearn.memory.types import Weights
from nestlearn.nn.attention import document_positions
from nestlearn.nn.common import check_tokens, full_precision, unit
from nestlearn.nn.config import register_mixer
from nestlearn.nn.flops import scan_flops
from nestlearn.nn.mixer import FastMemoryConfig, MemoryMixer
from nestlearn.nn.state import record

PROJECTOR = catalog["linear_attention"]
"""Holds ``sum_s k_s k_s^T``: with values equal to keys, linear attention applies it to a query (TNT Eq. 8-10)."""


@record("tnt.local")
class LocalState(NamedTuple):
    """A local memory, its query projector and the tokens read in the current window.

    ``aligned`` is static: True where every row is known to stand at the start of a window.
    """

    memory: State
    projector: State
    position: Int[Tensor, "b"]
    aligned: bool


@record("tnt")
class HierarchicalState(NamedTuple):
    """Streaming state of `HierarchicalMemory`: the global memory, the local ones, the tail of the convolution."""

    memory: State
    locals: tuple[LocalState, ...]
    conv: Float[Tensor, "b w ch"] | None


class Heads(NamedTuple):
    """Queries, keys and values of the tokens of a layer, ``[b, h, t, e]``."""

    q: Tensor
    k: Tensor
    v: Tensor


def spread(initial: Weights, leading: int) -> Weights:
    """Initial weights ``[h, out, in]`` for rows of ``leading`` dimensions ``[b, h, ...]``."""
    index = (slice(None), *[None] * (leading - 2))
    return {name: w[index] for name, w in initial.items()}


class LocalMemory(MemoryMixer):
    """A memory that goes back to its learned start every ``window`` tokens; the projections are its layer's."""

    def __init__(self, d_model: int, num_heads: int, config: TNTConfig, window: int, chunk_size: int) -> None:
        super().__init__(d_model, num_heads, config.alone(conv_size=0, chunk_size=chunk_size, learn_initial=True))
        del self.qkv, self.out, self.norm, self.conv
        self.window = window

    def read_windows(
        self,
        x: Tensor,
        heads: Heads,
        state: LocalState | None,
        mask: Tensor | None,
        reset: Tensor | None,
        writes: bool,
    ) -> tuple[Float[Tensor, "b h t e"], LocalState]:
        """Reads of the memory with the projected queries, and the state after the last token."""
        initial = self.initial_weights(heads.q)
        gates = self._gates(x, initial, writes)
        if mask is None and reset is None and (state is None or state.aligned):
            return self._folded(heads, gates, initial)
        return self._placed(heads, gates, initial, state, mask, reset)

    def _fresh(self, rows: tuple[int, ...], initial: Weights, like: Tensor) -> tuple[State, State]:
        """Memory and projector at the start of a window, for rows ``[b, h, ...]``."""
        options = {"dtype": like.dtype, "device": like.device}
        memory = self.memory.init_state(rows, self.d_head, self.d_head, spread(initial, len(rows)), **options)
        return memory, PROJECTOR.init_state(rows, self.d_head, self.d_head, **options)

    def _read(
        self, heads: Heads, gates: Gates, start: tuple[State, State], initial: Weights, mask: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[State, State]]:  # fmt: skip
        """Both scans over tokens ``[*rows, t]``: queries into the span of the window's keys, then the memory."""
        q, k, v = heads
        one = torch.ones_like(gates.lr)
        q, projector = scan(PROJECTOR, start[1], q, k, k, Gates(one, one), mask=mask, reset=reset)
        # A sum of projectors is no projector: its scale grows with the number of keys.
        y, memory = scan(self.memory, start[0], unit(q), k, v, gates, initial=initial, mask=mask, reset=reset)
        return y, (memory, projector)

    def _folded(self, heads: Heads, gates: Gates, initial: Weights) -> tuple[Tensor, LocalState]:
        """All rows at the start of a window: the windows, independent of each other, are rows of one batch."""
        rows, tokens = heads.q.shape[:2], heads.q.shape[2]
        whole = tokens // self.window * self.window
        outputs = []
        if whole:
            count = whole // self.window

            def fold(x: Tensor) -> Tensor:
                return x[:, :, :whole].unflatten(2, (count, self.window))

            start = self._fresh((*rows, count), initial, heads.q)
            y, _ = self._read(Heads(*map(fold, heads)), gates.map(fold), start, spread(initial, 3))
            outputs.append(y.flatten(2, 3))
        end = self._fresh(tuple(rows), initial, heads.q)
        if whole < tokens:
            rest = Heads(*(x[:, :, whole:] for x in heads))
            y, end = self._read(rest, gates.map(lambda g: g[:, :, whole:]), end, initial)
            outputs.append(y)
        position = torch.full(rows[:1], tokens - whole, dtype=torch.long, device=heads.q.device)
        return torch.cat(outputs, 2), LocalState(*end, position, whole == tokens)

    def _placed(
        self, heads: Heads, gates: Gates, initial: Weights, state: LocalState | None, mask: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, LocalState]:  # fmt: skip
        """Rows of any phase: a window's first token is a reset."""
        rows, tokens = heads.q.shape[:2], heads.q.shape[2]
        real = torch.ones(rows[0], tokens, dtype=torch.bool, device=heads.q.device) if mask is None else mask
        start, position = self._fresh(tuple(rows), initial, heads.q), real.new_zeros(rows[0], dtype=torch.long)
        if state is not None:
            start, position = (state.memory, state.projector), state.position
        place, _ = document_positions(position, real, reset)
        begins = (place % self.window == 0) & real
        each = (-1, self.num_heads, -1)
        flags = None if mask is None else mask.unsqueeze(1).expand(each)
        y, end = self._read(heads, gates, start, initial, flags, begins.unsqueeze(1).expand(each))
        position = (place[:, -1] + 1) % self.window
        return y, LocalState(*end, position, False)

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token: gates, projected query, memory."""
        length = min(self.window, context_length)
        gates = 0 if self.gates is None else 2 * self.gates.weight.numel()
        read = sum(scan_flops(memory, self.d_head, self.d_head, length) for memory in (PROJECTOR, self.memory))
        return gates + self.num_heads * read


@register_mixer("tnt")
@dataclass(frozen=True)
class TNTConfig(FastMemoryConfig):
    """Configuration of `HierarchicalMemory`: the fields of `FastMemoryConfig` for all its memories, and the following.

    Args:
        chunk_size: tokens of a chunk of the global memory.
        local_windows: tokens between two fresh starts, one number per local memory.
        local_chunk_sizes: tokens of a chunk of each local memory; each divides its window.
    """

    chunk_size: Size = 256
    local_windows: tuple[Size, ...] = (128,)
    local_chunk_sizes: tuple[Size, ...] = (16,)

    def __post_init__(self) -> None:
        super().__post_init__()
        windows, chunks = self.local_windows, self.local_chunk_sizes
        if not windows or len(windows) != len(chunks) or any(map(int.__mod__, windows, chunks)):
            raise ValueError(
                f"local_windows={list(windows)} and local_chunk_sizes={list(chunks)} must hold one number each per "
                "local memory, and each window must be a multiple of its chunk; for example [128, 128] and [8, 32]."
            )

    def build(self, d_model: int, num_heads: int) -> HierarchicalMemory:
        return HierarchicalMemory(d_model, num_heads, self)

    @property
    def work_period(self) -> int:
        return math.lcm(self.chunk_size, *self.local_windows)


class HierarchicalMemory(MemoryMixer):
    r"""One global memory in sequence, local memories in parallel windows (TNT, arXiv 2511.07343, Eq. 5-7, 13-15).

        y_t = W_o norm( V_{start of chunk}(q_t) + sum_i W^i_t( unit( sum_s k_s k_s^T q_t ) ) )

    The global memory V has large chunks of ``chunk_size`` tokens and is read at their start. Local memory i
    learns in chunks of ``local_chunk_sizes[i]`` and goes back to its learned start every ``local_windows[i]`` tokens;
    it reads with the query projected on the keys of its window up to t. Windows are independent: where all rows stand
    at the start of one, all windows of a sequence run as rows of one batch. Queries, keys and values are
    shared, gates and initial weights are each memory's own.

    Args:
        d_model: width of input and output.
        num_heads: heads; each has its own memories.
        config: the memories and their windows; `TNTConfig`.

    Raises:
        ValueError: for sizes that do not fit, with the fix.

    Example:
        >>> import torch
        >>> from nestlearn.nn import TNTConfig
        >>> layer = TNTConfig("deltanet", local_windows=(8, 16), local_chunk_sizes=(4, 4)).build(16, num_heads=2)
        >>> x = torch.randn(1, 40, 16)
        >>> y, state = layer(x[:, :13])
        >>> rest, state = layer(x[:, 13:], state)
        >>> torch.allclose(torch.cat([y, rest], 1), layer(x)[0], atol=1e-5)
        True
    """

    def __init__(self, d_model: int, num_heads: int, config: TNTConfig) -> None:
        super().__init__(d_model, num_heads, config.alone(learn_initial=True))
        self.memory = replace(self.memory, read="chunk")
        self.locals = nn.ModuleList(
            LocalMemory(d_model, num_heads, config, window, chunk)
            for window, chunk in zip(config.local_windows, config.local_chunk_sizes, strict=True)
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - the state is another record
        self,
        x: Float[Tensor, "b t d"],
        state: HierarchicalState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        *,
        writes: bool = True,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "b t d"], HierarchicalState | None]:
        """Read tokens, answer each, and learn from them; the protocol of `nestlearn.nn.Mixer`."""
        check_tokens(x, self.d_model)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, 0)
            reset = None if reset is None else reset & mask
        q, k, v, tail = self._heads(x, None if state is None else state.conv, mask, reset)
        heads, each = Heads(q, k, v), (-1, self.num_heads, -1)
        with full_precision(x):
            initial = self.initial_weights(q)
            rows = (q.shape[0], self.num_heads)
            start = self.memory.init_state(rows, self.d_head, self.d_head, initial, dtype=q.dtype, device=q.device)
            if state is not None:
                start = state.memory
            y, end = scan(
                self.memory, start, q, k, v, self._gates(x, initial, writes), initial=initial,
                mask=None if mask is None else mask.unsqueeze(1).expand(each),
                reset=None if reset is None else reset.unsqueeze(1).expand(each),
                return_state=return_state,
            )  # fmt: skip
            after = []
            for i, local in enumerate(self.locals):
                past = None if state is None else state.locals[i]
                answer, learned = local.read_windows(x, heads, past, mask, reset, writes)  # type: ignore[operator]
                y = y + answer
                after.append(learned)
            y = self.norm(y)
        y = self.out(y.transpose(1, 2).flatten(2).to(x.dtype))
        tail = tail.clone() if tail is not None and return_state else tail
        return y, HierarchicalState(end, tuple(after), tail) if return_state else None

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token at this context length (multiply-add = 2), writes included."""
        local = sum(memory.flops_per_token(context_length) for memory in self.locals)  # type: ignore[operator]
        return super().flops_per_token(context_length) + local
