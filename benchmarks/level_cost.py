"""What levels of different periods cost: python benchmarks/level_cost.py writes docs/results/level_cost.jsonl.

Four levels of equal size with periods 16, 64, 256 and 1,024 read 2,048 tokens with signal "loss" in segments of 16;
the write of every level is counted (FLOPs, by torch.utils.flop_counter) and timed (median), by whether the segment
ended its period. Then whole sequences with signal "local" and without a state at the end: the FLOPs of a level by its
period.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common import RESULTS, Records, parse, parser, processor
from nestlearn.nn import ContinuumMemory, FeedForward, Level
from nestlearn.nn.cms.tape import Tape, segment_factors

PERIODS = (16, 64, 256, 1024)
RULES = ("descent", "momentum", "delta", "orthogonalized")


def counted(run) -> int:
    """FLOPs of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def writes_of_a_stream(width: int, tokens: int, rule: str) -> list[dict[str, object]]:
    """One record per level, and whether its period ended: FLOPs and milliseconds of a segment's write."""
    torch.manual_seed(0)
    levels = [Level(period, 1, rule=rule, lr=0.01, clip=1.0) for period in PERIODS]
    cms, state = ContinuumMemory(width, levels, "gelu", signal="loss"), None
    seconds: dict[tuple[int, bool], list[float]] = {}
    flops: dict[tuple[int, bool], int] = {}
    for first in range(0, tokens, PERIODS[0]):
        tape, x = Tape(), torch.randn(1, PERIODS[0], width)
        y, state = cms(x, state, tape=tape)
        found = segment_factors(y.square().mean(-1).sum(), tape)
        with torch.no_grad():
            for i, period in enumerate(PERIODS):
                key = (period, (first + PERIODS[0]) % period == 0)
                level, fast, factors = cms.networks[i], state.levels[i], found[None, i]
                begin = time.perf_counter()
                level.absorb(fast, factors)  # pyright: ignore[reportCallIssue]
                seconds.setdefault(key, []).append(time.perf_counter() - begin)
                if first >= PERIODS[0]:
                    flops[key] = counted(lambda level=level, fast=fast, factors=factors: level.absorb(fast, factors))
            state = cms.absorb(state, found)
    return [
        {"kind": "write", "rule": rule, "period": key[0], "ended": key[1], "segments": len(times)}
        | {"flops": flops[key], "milliseconds": 1000 * statistics.median(times)}
        for key, times in sorted(seconds.items())
        if key in flops
    ]


def reads_of_a_sequence(width: int, tokens: int) -> list[dict[str, object]]:
    """FLOPs per token of one level with a local signal, by its period, and of a plain feed-forward network."""
    x: Tensor = torch.randn(1, tokens, width)
    plain = FeedForward(width, 1, "gelu")
    records: list[dict[str, object]] = [{"kind": "local", "period": None, "flops": counted(lambda: plain(x)) / tokens}]
    for period in (*PERIODS, tokens, 2 * tokens):
        cms = ContinuumMemory(width, [Level(period, 1)], "gelu")
        with torch.no_grad():
            cost = counted(lambda cms=cms: cms(x, return_state=False))
        records.append({"kind": "local", "period": period, "flops": cost / tokens})
    return records


def main(words: Sequence[str] | None = None) -> None:
    """Run both and write the records."""
    made = parser(__doc__, RESULTS / "level_cost.jsonl")
    made.add_argument("--width", type=int, default=256)
    made.add_argument("--tokens", type=int, default=2048)
    options = parse(made, words)
    settings = {"width": options.width, "tokens": options.tokens, "machine": processor(), "threads": options.threads}
    records = Records(options.out, fresh=True)
    found = [r for rule in RULES for r in writes_of_a_stream(options.width, options.tokens, rule)]
    for record in found + reads_of_a_sequence(options.width, options.tokens):
        records.add(record | settings)


if __name__ == "__main__":
    main()
