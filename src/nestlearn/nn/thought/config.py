"""The configuration of a Continuous Thought Machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from nestlearn.fields import LARGEST, Between, Count, Size, check_fields

if TYPE_CHECKING:
    from nestlearn.nn.thought.layer import ContinuousThought


@dataclass(frozen=True)
class ContinuousThoughtConfig:
    """Sizes of `nestlearn.nn.ContinuousThought`.

    Args:
        classes: of each answer.
        answers: that every tick gives.
        neurons: D.
        ticks: of one call, where the call does not say otherwise.
        memory_length: M, the last pre-activations that each neuron sees.
        neuron_width: hidden units of each neuron's own network.
        query_pairs, output_pairs: pairs of neurons whose synchronization makes the query and the answers. A pair may be
            a neuron with itself. All pairs are drawn without repetition.
        attention_width: of queries, keys and values, all heads together.
        num_heads: of attention.
        synapse_layers: layers of the synapse network.
        pair_seed: of the draw of pairs.

    Raises:
        ValueError: a field that is not what its annotation says, more pairs than ``neurons (neurons + 1) / 2``, or
            heads that do not divide the width of attention.

    Example:
        >>> ContinuousThoughtConfig(classes=2, neurons=4, query_pairs=8, output_pairs=3)
        Traceback (most recent call last):
            ...
        ValueError: query_pairs=8 + output_pairs=3 are more than the 10 pairs of neurons=4. Use fewer, or more neurons.
    """

    classes: Annotated[int, Between(2, LARGEST)]
    answers: Size = 1
    neurons: Size = 128
    ticks: Size = 25
    memory_length: Size = 10
    neuron_width: Size = 4
    query_pairs: Size = 32
    output_pairs: Size = 32
    attention_width: Size = 64
    num_heads: Size = 4
    synapse_layers: Size = 1
    pair_seed: Count = 0

    def __post_init__(self) -> None:
        check_fields(self)
        there = self.neurons * (self.neurons + 1) // 2
        if self.query_pairs + self.output_pairs > there:
            raise ValueError(
                f"query_pairs={self.query_pairs} + output_pairs={self.output_pairs} are more than the {there} pairs "
                f"of neurons={self.neurons}. Use fewer, or more neurons."
            )
        if self.attention_width % self.num_heads:
            raise ValueError(
                f"attention_width={self.attention_width} is not divisible by num_heads={self.num_heads}; choose a "
                "number of heads that divides the width."
            )

    def build(self, d_input: int) -> ContinuousThought:
        """The machine for input tokens of this width."""
        from nestlearn.nn.thought.layer import ContinuousThought

        return ContinuousThought(d_input, self)
