"""Multi-query associative recall (MQAR), Zoology's layout: Arora et al. 2023, arXiv 2312.04927."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from nestlearn.data.synthetic import Batch, multi_query_recall
from nestlearn.evals.tasks.base import Metric, Split, Task


@dataclass(frozen=True, kw_only=True)
class Mqar(Task):
    """Recall of values: every key of ``pairs`` key-value pairs is queried once, at a gap drawn by a power law.

    The layout is that of `nestlearn.data.synthetic.multi_query_recall`: keys ``1 .. V/2 - 1``, values ``V/2 .. V-1``,
    each without repetition. The first ``2 * pairs`` positions hold the pairs; the target is at the query.

    Attributes:
        vocabulary: number of token ids, half of them keys.
        length: tokens of a sequence.
        pairs: pairs of a training sequence.
        train_pairs: several numbers of pairs instead, one drawn for every batch. Based and later sweeps train on such a
            mixture, since few pairs are learned first.
        eval_pairs: pairs of the evaluation splits, by default those of training. The last one is the headline.
        power: exponent a of the gaps' distribution ``p(g) ~ g ** (a - 1)``.
        random_non_queries: whether the other positions hold random tokens. False: token 0, as in Zoology's figure 2.

    Raises:
        ValueError: the pairs do not fit the vocabulary or the length.
    """

    name: ClassVar[str] = "mqar"
    version: ClassVar[int] = 1
    metric: ClassVar[Metric] = "token accuracy"
    writes: ClassVar[int] = 1
    """Times that every key is written."""

    vocabulary: int = 64
    length: int = 64
    pairs: int = 16
    train_pairs: tuple[int, ...] = ()
    eval_pairs: tuple[int, ...] = ()
    power: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for pairs in (*self._trained(), *self.eval_pairs):
            self._generate(1, torch.Generator(), pairs)

    def _trained(self) -> tuple[int, ...]:
        return self.train_pairs or (self.pairs,)

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(Split(f"{pairs} pairs", "pairs", pairs) for pairs in self.eval_pairs or self._trained())

    def draw(self, n: int, generator: torch.Generator) -> Batch:
        choice = self._trained()
        # A fixed training set is drawn at once, with every number of pairs in it.
        places = torch.randint(len(choice), (n if self.train_examples else 1,), generator=generator).tolist()
        if len(set(places)) == 1:
            return self._generate(n, generator, choice[places[0]])
        parts = [self._generate(places.count(i), generator, choice[i]) for i in sorted(set(places))]
        return Batch(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))

    def examples(self, split: str) -> Batch:
        pairs = int(self.find_split(split).value)
        generator = torch.Generator().manual_seed(self.eval_seed + pairs)
        return self._generate(self.eval_examples, generator, pairs)

    def chance(self, split: str) -> float:
        """The probability of guessing among the values of the sequence."""
        return 1 / self.find_split(split).value

    def _generate(self, n: int, generator: torch.Generator, pairs: int) -> Batch:
        return multi_query_recall(
            n,
            generator,
            vocabulary=self.vocabulary,
            length=self.length,
            pairs=pairs,
            power=self.power,
            random_non_queries=self.random_non_queries,
            writes=self.writes,
        )


@dataclass(frozen=True, kw_only=True)
class RewrittenMqar(Mqar):
    """`Mqar` with every key written twice, with two values; the target is the second (ours, not Zoology's).

    With keys written once there is nothing to erase, and a sum of outer products recalls about as much as a delta rule
    at its best step (docs/results/recall.md). Here the first value has to be erased.
    """

    name: ClassVar[str] = "mqar_rewritten"
    version: ClassVar[int] = 1
    writes: ClassVar[int] = 2

    pairs: int = 8
