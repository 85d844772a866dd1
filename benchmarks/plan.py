"""`nestlearn plan` beside what a run takes on this machine: memory of the process, and time of an update.

    python benchmarks/plan.py                        # three presets at three contexts, about ten minutes
    python benchmarks/plan.py --presets hope-tiny --contexts 256

Every run is a process of its own: a model, AdamW, six updates of 4,096 tokens on one thread. Time is the processor's,
median of the last five, so that other work on the machine counts less; the rates of the plan are measured just before.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from common import parse, parser, processor, table, update
from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.allocator import tune_allocator
from nestlearn.train import TrainConfig
from nestlearn.train.planning import plan, this_processor

TOKENS = 4096


def measured(preset: str, context: int) -> dict[str, float]:
    """Seconds of an update and bytes of this process."""
    tune_allocator()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = HopeForCausalLM(HopeConfig.from_preset(preset)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, 256, (TOKENS // context, context))
    times = []
    for _ in range(6):
        began = time.process_time()
        update(model, model(ids, labels=ids, use_cache=False).loss, optimizer)
        times.append(time.process_time() - began)
    return {
        "seconds": statistics.median(times[1:]),
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def planned(preset: str, context: int) -> dict[str, float]:
    """The same, as planned."""
    torch.set_num_threads(1)
    settings = TrainConfig(preset=preset, sequence_length=context)
    found = plan(settings, this_processor(), batch_size=TOKENS // context, update_tokens=TOKENS)
    return {"seconds": found.chosen.seconds, "bytes": found.chosen.memory.total}


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write benchmarks/results/plan_*.json."""
    made = parser(__doc__, Path(__file__).parent / "results")
    made.add_argument("--presets", nargs="+", default=["hope-tiny", "transformer-tiny", "titans-tiny"])
    made.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    made.add_argument("--one", action="store_true", help="Measure one case here and print JSON.")
    options = parse(made, words)
    if options.one:
        print(json.dumps(measured(options.presets[0], options.contexts[0])))
        return
    cases: list[dict[str, Any]] = []
    for preset in options.presets:
        for context in options.contexts:
            expected = planned(preset, context)
            command = [sys.executable, __file__, "--one", "--presets", preset, "--contexts", str(context)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.strip().splitlines()[-1])
            cases.append({"preset": preset, "context": context, "planned": expected, "measured": found})
            print(f"{preset} {context}: {expected} {found}", flush=True)
    report = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "machine": processor(), "cases": cases}
    options.out.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in processor().lower()).strip("-")
    (options.out / f"plan_{name}.json").write_text(json.dumps(report, indent=1))
    print(
        "\n"
        + table(("preset", "context", "memory: planned / measured", "", "time: planned / measured", ""), rows(cases))
    )


def rows(cases: list[dict[str, Any]]) -> list[list[str]]:
    """A row for every case."""
    found = []
    for case in cases:
        plan, real = case["planned"], case["measured"]
        size = f"{plan['bytes'] / 1e6:,.0f} / {real['bytes'] / 1e6:,.0f} MB", f"{plan['bytes'] / real['bytes']:.2f}"
        span = f"{plan['seconds']:.2f} / {real['seconds']:.2f} s", f"{plan['seconds'] / real['seconds']:.2f}"
        found.append([case["preset"], f"{case['context']:,}", *size, *span])
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
