"""The Continuous Thought Machine: a loop of ticks over one input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nestlearn.nn.common import check_tokens
from nestlearn.nn.state import index_rows, record
from nestlearn.nn.thought.config import ContinuousThoughtConfig
from nestlearn.nn.thought.loss import certainty_of
from nestlearn.nn.thought.neurons import Encoded, InputAttention, NeuronNetworks, Synapses
from nestlearn.nn.thought.synchronization import Synchronization, SynchronizationState, draw_pairs


@record("thought")
class ThoughtState(NamedTuple):
    """Everything a machine needs to go on after any tick; every tensor has the row as its first dimension.

    Args:
        history: the last M - 1 pre-activations of every neuron, the newest last.
        z: activations.
        synchronization: of all pairs, those of the query first.
    """

    history: Float[Tensor, "b d past"]
    z: Float[Tensor, "b d"]
    synchronization: SynchronizationState


class Thoughts(NamedTuple):
    """What k ticks gave.

    Args:
        outputs: logits of every answer.
        certainty: of every tick, in [0, 1]; see `certainty_of`.
        attention: weights over the input tokens; they sum to 1.
        activity: activations z after every tick.
    """

    outputs: Float[Tensor, "b k n c"]
    certainty: Float[Tensor, "b k"]
    attention: Float[Tensor, "b k h t"]
    activity: Float[Tensor, "b k d"]


class Answer(NamedTuple):
    """The answer of every row, its certainty, and the number of ticks that the row took."""

    outputs: Float[Tensor, "b n c"]
    certainty: Float[Tensor, " b"]
    ticks: Int[Tensor, " b"]


class ContinuousThought(nn.Module):
    r"""The Continuous Thought Machine (arXiv 2505.05522): it thinks in ticks about one input.

    Each tick, with the synchronization S of sampled pairs of neurons (`Synchronization`):

        o   = attention(W_q S_query, tokens)       what the input says to the present query
        a   = synapses([o, z])                     a pre-activation for every neuron
        z_d = network_d(last M of a_d)             each neuron has a network of its own
        y   = W_y S_output,  certainty = 1 - H(softmax y) / ln c

    S is that of all ticks up to now, with one learned decay per pair. The start (activations and pre-activations) is
    learned, and counts as a tick of S. Train it with `ticks_loss`.

    Args:
        d_input: width of the input tokens. Any encoder can make them: embeddings with positions, the hidden states of a
            language model, patches of an image. The machine itself has no notion of order.
        config: the other sizes.

    Raises:
        ValueError: sizes that do not fit.

    Example:
        >>> machine = ContinuousThoughtConfig(classes=2, neurons=32, ticks=6).build(d_input=8)
        >>> x = torch.randn(3, 5, 8)
        >>> thoughts, state = machine(x)
        >>> thoughts.outputs.shape, thoughts.certainty.shape
        (torch.Size([3, 6, 1, 2]), torch.Size([3, 6]))
        >>> more, state = machine(x, state, ticks=2)  # goes on where it was
        >>> machine.answer(x, threshold=0.9).outputs.shape  # each row stops when it is certain
        torch.Size([3, 1, 2])
    """

    def __init__(self, d_input: int, config: ContinuousThoughtConfig) -> None:
        super().__init__()
        if isinstance(d_input, bool) or not isinstance(d_input, int) or d_input < 1:
            raise ValueError(f"{d_input=} must be the width of the input tokens, an integer of at least 1.")
        self.d_input, self.config = d_input, config
        neurons, pairs = config.neurons, config.query_pairs + config.output_pairs
        self.attention = InputAttention(d_input, config.query_pairs, config.attention_width, config.num_heads)
        self.synapses = Synapses(config.attention_width + neurons, neurons, config.synapse_layers)
        self.networks = NeuronNetworks(neurons, config.memory_length, config.neuron_width)
        self.synchronization = Synchronization(draw_pairs(neurons, pairs, config.pair_seed), 4.0 * config.ticks)
        self.head = nn.Linear(config.output_pairs, config.answers * config.classes)
        self.start_z = nn.Parameter(torch.empty(neurons))
        self.start_history = nn.Parameter(torch.empty(neurons, config.memory_length - 1))
        nn.init.uniform_(self.start_z, -1, 1)
        nn.init.uniform_(self.start_history, -1, 1)

    def init_state(self, rows: int) -> ThoughtState:
        """The learned start of this many rows. `nestlearn.nn.state.reset_rows` puts it into single rows of a state.

        Example:
            >>> from nestlearn.nn.state import reset_rows
            >>> machine = ContinuousThoughtConfig(classes=2, neurons=16).build(4)
            >>> _, state = machine(torch.randn(2, 3, 4))
            >>> fresh = machine.init_state(1)
            >>> state = reset_rows(state, fresh, torch.tensor([True, False]))
            >>> torch.equal(state.z[0], fresh.z[0]), torch.equal(state.z[1], fresh.z[0])
            (True, False)
        """
        z = self.start_z.expand(rows, -1)
        _, state = self.synchronization(self.synchronization.init_state(z), z, self.synchronization.places(z.device))
        return ThoughtState(self.start_history.expand(rows, -1, -1), z, state)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: ThoughtState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        *,
        ticks: int | None = None,
    ) -> tuple[Thoughts, ThoughtState]:
        """Think for some ticks.

        Args:
            x: input tokens; masked ones may hold anything.
            state: from an earlier call, also on another input; None starts anew.
            mask: False marks padding, where the inputs of the rows differ in length.
            ticks: how many; None for those of the configuration.

        Returns:
            What every tick gave, and the state after the last one. k ticks and then l more equal k + l at once.

        Raises:
            TypeError: x is no floating-point tensor.
            ValueError: x, the mask or the state do not fit each other, or ``ticks`` is below 1.
        """
        self._check(x, state, mask)
        count = self._count(ticks)
        tokens, places = self.attention.encode(x, mask), self.synchronization.places(x.device)
        state = self.init_state(len(x)) if state is None else state
        synchronized, weights, activity = [], [], []
        for _ in range(count):
            s, seen, state = self._tick(tokens, state, places)
            synchronized.append(s)
            weights.append(seen)
            activity.append(state.z)
        y = self._answers(torch.stack(synchronized, 1))
        return Thoughts(y, certainty_of(y), torch.stack(weights, 1), torch.stack(activity, 1)), state

    def _tick(
        self, tokens: Encoded, state: ThoughtState, places: Int[Tensor, "2 pairs"]
    ) -> tuple[Float[Tensor, "b p"], Float[Tensor, "b h t"], ThoughtState]:
        """The synchronization that the answers see, attention weights, and the state after one tick."""
        queries = self.config.query_pairs
        seen, weights = self.attention(
            self.synchronization.read(state.synchronization)[:, :queries].to(state.z), tokens
        )
        new = self.synapses(torch.cat([seen, state.z], -1))
        last = torch.cat([state.history, new.unsqueeze(-1)], -1)
        z = self.networks(last)
        s, synchronization = self.synchronization(state.synchronization, z, places)
        return s[:, queries:], weights, ThoughtState(last[..., 1:], z, synchronization)

    def _answers(self, s: Float[Tensor, "*b p"]) -> Float[Tensor, "*b n c"]:
        """Logits."""
        return self.head(s).unflatten(-1, (self.config.answers, self.config.classes))

    @torch.no_grad()
    def answer(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"] | None = None,
        *,
        threshold: float = 0.8,
        ticks: int | None = None,
    ) -> Answer:
        """The answer of every row at its most certain tick, where a row stops at the first tick above a threshold.

        A row that has stopped is computed no further and keeps its answer; it changes no other row.

        Args:
            x, mask: as in `forward`.
            threshold: certainty at which a row stops, in [0, 1].
            ticks: at most; None for those of the configuration.

        Raises:
            TypeError, ValueError: as `forward`, or a threshold outside [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"{threshold=} must be a certainty, between 0 and 1.")
        self._check(x, None, mask)
        count = self._count(ticks)
        tokens, places = self.attention.encode(x, mask), self.synchronization.places(x.device)
        state, rows = self.init_state(len(x)), torch.arange(len(x), device=x.device)
        best: Answer | None = None
        for tick in range(1, count + 1):
            s, _, state = self._tick(tokens, state, places)
            y = self._answers(s)
            certainty = certainty_of(y)
            if best is None:
                best = Answer(y, certainty, torch.full_like(rows, count))
            better = certainty > best.certainty[rows]
            best.outputs[rows[better]], best.certainty[rows[better]] = y[better], certainty[better]
            done = certainty >= threshold
            best.ticks[rows[done]] = tick
            # The host waits here: it has to know which rows go on.
            going = (~done).nonzero().squeeze(1)
            if len(going) < len(rows):
                rows, tokens, state = rows[going], index_rows(tokens, going), index_rows(state, going)
            if len(rows) == 0:
                break
        assert best is not None
        return best

    def _count(self, ticks: int | None) -> int:
        count = self.config.ticks if ticks is None else ticks
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"ticks={count!r} must be an integer of at least 1.")
        return count

    def _check(self, x: Tensor, state: ThoughtState | None, mask: Tensor | None) -> None:
        """Raise unless the arguments fit each other."""
        if not isinstance(x, Tensor):
            raise TypeError(
                f"x must be a tensor [batch, tokens, {self.d_input}], got a {type(x).__name__}. Pad inputs of unequal "
                "length to the longest (torch.nn.utils.rnn.pad_sequence with batch_first=True) and mark the padding "
                "False in mask."
            )
        check_tokens(x, self.d_input)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(
                f"mask must be bool of shape {tuple(x.shape[:2])}, one entry per token of x, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}."
            )
        if state is not None and (len(state.z) != len(x) or state.history.shape[1:] != self.start_history.shape):
            raise ValueError(
                f"the state has {len(state.z)} rows and a history of {tuple(state.history.shape[1:])}, but x has "
                f"{len(x)} rows and this machine a history of {tuple(self.start_history.shape)} (neurons, memory "
                "length - 1). Pass the state of a call with the same machine and rows."
            )
