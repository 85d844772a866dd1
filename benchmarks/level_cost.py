"""What levels of different periods cost: python benchmarks/level_cost.py writes docs/results/level_cost.jsonl.

Four levels of equal size with periods 16, 64, 256 and 1,024 read 2,048 tokens with signal "loss" in segments of 16;
the write of every level is counted (FLOPs, by torch.utils.flop_counter) and timed (median), by whether the segment
ended its period. Then whole sequences with signal "local", which nobody goes on from: the FLOPs of a level by its
period.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nestlearn.nn import ContinuumMemory, FeedForward, Level
from nestlearn.nn.cms.tape import Tape, segment_factors

PERIODS = (16, 64, 256, 1024)
RULES = ("descent", "momentum", "delta", "orthogonalized")
OUT = Path(__file__).parents[1] / "docs" / "results" / "level_cost.jsonl"


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
        {
            "kind": "write",
            "rule": rule,
            "period": period,
            "ended": ended,
            "segments": len(times),
            "flops": flops[period, ended],
            "milliseconds": 1000 * statistics.median(times),
        }
        for (period, ended), times in sorted(seconds.items())
        if (period, ended) in flops
    ]


def reads_of_a_sequence(width: int, tokens: int) -> list[dict[str, object]]:
    """FLOPs per token of one level that teaches itself, by its period, beside a plain feed-forward network."""
    x: Tensor = torch.randn(1, tokens, width)
    plain = FeedForward(width, 1, "gelu")
    records: list[dict[str, object]] = [{"kind": "local", "period": None, "flops": counted(lambda: plain(x)) / tokens}]
    for period in (*PERIODS, tokens, 2 * tokens):
        cms = ContinuumMemory(width, [Level(period, 1)], "gelu")
        with torch.no_grad():
            cost = counted(lambda cms=cms: cms(x, return_state=False))
        records.append({"kind": "local", "period": period, "flops": cost / tokens})
    return records


def _processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def main() -> None:
    """Run both and write the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = [r for rule in RULES for r in writes_of_a_stream(arguments.width, arguments.tokens, rule)]
    records += reads_of_a_sequence(arguments.width, arguments.tokens)
    machine = {"width": arguments.width, "tokens": arguments.tokens, "machine": _processor(), "threads": 1}
    OUT.write_text("".join(json.dumps(record | machine) + "\n" for record in records))
    for record in records:
        print(record)


if __name__ == "__main__":
    main()
