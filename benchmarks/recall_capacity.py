"""What one pass of a linear memory can recall: linear attention and the delta rule on keys of their own choice.

    python benchmarks/recall_capacity.py                   (half a minute)

No model and no training: the pairs of the suites `recall` and `recall-rewritten` are written once, in order, without
the rest of their sequences. Then each key is read, and the answer is the value vector nearest to the result. The 31
keys and 32 values are unit vectors in 16 dimensions. "Spread" vectors are as far apart as possible, the best that a
model could learn; "random" ones are as drawn. "Rewritten" keys are spread, and each was written before with another
value, which the memory should forget. Writes a record per memory to docs/results/recall_capacity.jsonl and prints the
table.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from common import RESULTS, Records, parse, parser, table
from nestlearn.data.synthetic import multi_query_recall
from nestlearn.memory import Gates, catalog, scan

WORDS, WIDTH = 32, 16
PAIRS = (4, 8, 16, 24, 31)
STEPS = (0.1, 0.3, 0.5, 0.7, 1.0)


def spread(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Unit vectors whose products are as small as gradient descent makes them."""
    vectors = torch.randn(count, width, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=0.02)
    for _ in range(2000):
        unit = F.normalize(vectors, dim=-1)
        optimizer.zero_grad()
        (unit @ unit.T - torch.eye(count)).pow(4).sum().backward()
        optimizer.step()
    return F.normalize(vectors.detach(), dim=-1)


def recalled(name: str, step: float, keys: Tensor, written: Tensor, values: Tensor, asked: int) -> float:
    """The share of the last `asked` pairs whose value is the nearest to what is read at the end.

    Args:
        name: a matrix memory of the catalog.
        step: of every write.
        keys: unit vectors, ``[b, t, d]``.
        written: the numbers of their values, ``[b, t]``.
        values: all value vectors, ``[n, d]``.
        asked: pairs at the end that count.
    """
    memory = catalog[name]
    batch, tokens, width = keys.shape
    gates = Gates(lr=torch.full((batch, tokens), step), retain=torch.ones(batch, tokens))
    state = memory.init_state((batch,), width, width)
    _, state = scan(memory, state, keys, keys, values[written], gates)
    read = keys[:, -asked:] @ state.params["W"].mT
    return float(((read @ values.T).argmax(-1) == written[:, -asked:]).float().mean())


def main(words: Sequence[str] | None = None) -> None:
    """Write and recall with every kind of keys and number of pairs."""
    made = parser(__doc__, RESULTS / "recall_capacity.jsonl")
    made.add_argument("--sequences", type=int, default=1000)
    options = parse(made, words)
    records, rows, generator = Records(options.out, fresh=True), [], torch.Generator().manual_seed(0)
    far, values = spread(WORDS, WIDTH, generator), spread(WORDS, WIDTH, generator)
    near = F.normalize(torch.randn(WORDS, WIDTH, generator=generator), dim=-1)
    memories = [("linear_attention", 1.0), *(("deltanet", step) for step in STEPS)]
    for (kind, vectors), pairs in product((("spread", far), ("random", near), ("rewritten", far)), PAIRS):
        writes = 2 if kind == "rewritten" else 1
        told = 2 * pairs * writes
        sizes = {"vocabulary": 2 * WORDS, "length": told + 2 * pairs, "pairs": pairs, "writes": writes}
        tokens = multi_query_recall(options.sequences, generator, **sizes).inputs[:, :told]
        keys, written = vectors[tokens[:, 0::2]], tokens[:, 1::2] - WORDS
        scores = [recalled(name, step, keys, written, values, pairs) for name, step in memories]
        for (name, step), score in zip(memories, scores, strict=True):
            key = {"keys": kind, "pairs": pairs, "memory": name, "step": step}
            records.add(key | {"recalled": score, "sequences": options.sequences})
        rows.append([kind, str(pairs), *(f"{100 * score:.1f}" for score in scores)])
    print(table(["keys", "pairs", "linear attention", *(f"delta, step {step:g}" for step in STEPS)], rows))


if __name__ == "__main__":
    main()
