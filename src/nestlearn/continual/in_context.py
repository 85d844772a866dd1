"""In-context learning as a continual learner: the prompt holds examples of the tasks seen, and nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.continual.result import ContinualResult
from nestlearn.continual.scoring import logits_of
from nestlearn.data.continual import TaskStream
from nestlearn.data.documents import stable_hash


class InContextLearner:
    """Classifies texts by a language model whose prompt holds examples of every class seen so far.

    The prompt is ``text\\tlabel\\n`` for up to `shots` examples per class, the newest last, then ``text\\t``. If it
    exceeds `context` tokens, its oldest tokens are cut off: the window is the only memory. The answer is the class seen
    whose label has the highest log-probability per token.

    Args:
        model: a causal language model, from ids to logits or to an object with `.logits`.
        tokenizer: a Hugging Face tokenizer.
        labels: the label text of each class.
        shots: examples per class.
        context: tokens that the model can read.
        test_limit: number of test examples per task, the first ones; None: all. Each is scored for every class.
        seed: of the choice of the examples.

    Raises:
        ValueError: no shots, no labels, or labels that leave no room in the context.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        labels: Sequence[str],
        shots: int = 1,
        context: int = 512,
        test_limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.labels = model, tokenizer, list(labels)
        self.shots, self.context, self.test_limit, self.seed = shots, context, test_limit, seed
        self._label_ids = [self._ids(f"{label}\n") for label in self.labels]
        longest = max(map(len, self._label_ids), default=0)
        if not self.labels or shots < 1 or longest >= context:
            raise ValueError(
                f"{len(self.labels)} labels, shots is {shots} and context {context}, the longest label has {longest} "
                "tokens; give at least one label and one shot, and a context that holds an example and a label."
            )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def fit(self, stream: TaskStream, texts: Sequence[tuple[Sequence[str], Sequence[str]]]) -> ContinualResult:
        """Add the examples of each task to the prompt, and test all tasks seen after each.

        Args:
            stream: for names and classes.
            texts: (training texts, test texts) of each task, in the order of the stream's examples.
        """
        began = time.perf_counter()
        shown: list[list[int]] = []
        seen: list[int] = []
        rows: list[tuple[float, ...]] = []
        for place, task in enumerate(stream.tasks):
            shown += self._examples(task.train.targets, texts[place][0], place)
            seen += task.classes
            rows.append(
                tuple(
                    self._accuracy(shown, seen, tested.test.targets, texts[column][1]) if column <= place else 0.0
                    for column, tested in enumerate(stream.tasks)
                )
            )
        fits = sum(total < self.context for total in accumulate(len(example) for example in reversed(shown)))
        config = {"shots": self.shots, "context": self.context, "test_limit": self.test_limit,
                  "examples_in_reach": fits}  # fmt: skip
        return ContinualResult(
            stream=stream.name, method="in-context", tasks=tuple(task.name for task in stream.tasks), score="accuracy",
            matrix=tuple(rows), initial=(0.0,) * len(stream), seed=self.seed, steps=0, examples=0,
            stored_examples=len(shown), seconds=time.perf_counter() - began, config=config | {"stream": stream.config},
        )  # fmt: skip

    def _examples(self, targets: Tensor, texts: Sequence[str], place: int) -> list[list[int]]:
        """The lines of one task, its classes in turn, so that every class is near the end of the prompt."""
        generator = torch.Generator().manual_seed(stable_hash("shots", self.seed, place) >> 1)
        order = torch.randperm(len(targets), generator=generator).tolist()
        by_class: dict[int, list[int]] = {}
        for index in order:
            chosen = by_class.setdefault(int(targets[index]), [])
            if len(chosen) < self.shots:
                chosen.append(index)
        turns = [chosen[shot] for shot in range(self.shots) for chosen in by_class.values() if shot < len(chosen)]
        return [self._ids(f"{texts[i]}\t{self.labels[int(targets[i])]}\n") for i in turns]

    def _accuracy(self, shown: list[list[int]], seen: list[int], targets: Tensor, texts: Sequence[str]) -> float:
        count = min(len(texts), self.test_limit or len(texts))
        right = sum(self._answer(shown, seen, texts[i]) == int(targets[i]) for i in range(count))
        return right / count

    @torch.no_grad()
    def _answer(self, shown: list[list[int]], seen: list[int], text: str) -> int:
        """The class seen whose label is the most likely continuation per token."""
        room = self.context - max(len(self._label_ids[label]) for label in seen)
        prompt = ([token for example in shown for token in example] + self._ids(f"{text}\t"))[-room:]
        rows = torch.zeros(len(seen), self.context, dtype=torch.long)
        targets = torch.full_like(rows, -100)
        for row, label in enumerate(seen):
            ids = prompt + self._label_ids[label]
            rows[row, : len(ids)] = torch.tensor(ids)
            targets[row, len(prompt) - 1 : len(ids) - 1] = rows[row, len(prompt) : len(ids)]
        keep = int((targets >= 0).nonzero()[:, 1].max()) + 1
        self.model.eval()
        logits = logits_of(self.model, rows[:, :keep])
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets[:, :keep], reduction="none")
        asked = (targets[:, :keep] >= 0).sum(1)
        return seen[int((losses.sum(1) / asked).argmin())]
