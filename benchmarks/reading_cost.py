"""What reading costs on SmolLM2-135M: python benchmarks/reading_cost.py writes docs/results/reading_cost.jsonl.

Segments of a novel, one level on every MLP (mode "split"). First the gate: one segment's write equals the step along
the gradient by autograd. Then CPU milliseconds per token (the best of several rounds, interleaved) of a plain forward
pass, of a plain forward and backward pass with the gradients of all weights, of reading (without and with the
comparison), and at rank 16 of four sessions that read one after another and together; the bytes of a session's file;
and the largest resident memory of a process that only reads. Each setting runs in a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import functional as F

from common import RESULTS, parse, parser
from nestlearn import Level, MemorySession, pretrained, stack_levels
from nestlearn.continual import read_together
from nestlearn.models.stacking import read_segment
from nestlearn.models.stacking.write import STEP

SETTINGS = [(dtype, rank, 64) for dtype in ("float32", "bfloat16") for rank in (None, 16)]
TOKENS, ROUNDS = 192, 2


def gate(model: Any, stacked: Any, ids: torch.Tensor) -> None:
    """A segment's write is the step along the gradient of autograd (float32; maps of the first and last layer)."""
    segment = ids[:, :64]
    loss = F.cross_entropy(model(segment).logits[0, :-1].float(), segment[0, 1:], reduction="sum")
    layers = [model.model.layers[i].mlp for i in (0, -1)]
    maps = [[m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight] for m in layers]
    found = torch.autograd.grad(loss, [w for weights in maps for w in weights])
    stack_levels(model, [Level(64, retain=1.0)], mode="split")
    state = read_segment(stacked, segment).state
    for number, (path, weights) in enumerate(
        zip((model.stack_plan.paths[0], model.stack_plan.paths[-1]), maps, strict=True)
    ):
        gradients = found[3 * number : 3 * number + 3]
        scale = STEP * sum(w.square().sum() for w in weights) ** 0.5 / sum(g.square().sum() for g in gradients) ** 0.5
        held = state.networks[path][0]
        for name, g in zip(("gate", "up", "down"), gradients, strict=True):
            torch.testing.assert_close(
                held.weights.params[name][0], -scale * g, rtol=1e-2, atol=float((scale * g).abs().max()) * 1e-3
            )


def best(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """CPU seconds of every run, the least of several rounds."""
    found = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.process_time()
            run()
            found[name] = min(found[name], time.process_time() - start)
    return found


def measure(dtype: str, rank: int | None, segment: int, text: str, only_read: bool) -> dict[str, Any]:
    """One setting: CPU milliseconds per token of each run, or the largest memory of reading alone."""
    model, tokenizer = pretrained("smollm2-135m", dtype=dtype)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids[: max(TOKENS, segment)]])
    parts = ids.split(segment, 1)

    def forward() -> None:
        with torch.no_grad():
            for part in parts:
                model(input_ids=part)

    def backward() -> None:
        for part in parts:
            model(input_ids=part, labels=part).loss.backward()
        model.zero_grad(set_to_none=True)

    plain = {} if only_read else best({"forward": forward, "forward_backward": backward})
    if dtype == "float32" and rank is None and not only_read:
        gate(model, model, ids)
    else:
        stack_levels(model, [Level(segment, retain=1.0, rank=rank)], mode="split")
    text = tokenizer.decode(ids[0])
    sessions = {f"read_{c}": MemorySession(model, tokenizer, compare=c) for c in ("none", "off")}
    if only_read:
        sessions.pop("read_off")
    runs: dict[str, Callable[[], object]] = {
        name: (lambda session=session: session.read(text)) for name, session in sessions.items()
    }
    if rank is not None and not only_read:
        four = [MemorySession(model, tokenizer, compare="none") for _ in range(4)]
        runs["read_4_alone"] = lambda: [session.read(text) for session in four]
        runs["read_4_together"] = lambda: read_together(four, [text] * 4)
    reading = best(runs)
    if only_read:
        return {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    milliseconds = {
        name: 1000 * seconds / ids.shape[1] / (4 if "_4_" in name else 1) for name, seconds in (plain | reading).items()
    }
    with TemporaryDirectory() as folder:
        sessions["read_none"].save(file := Path(folder) / "session")
        return {**milliseconds, "file_mb": file.stat().st_size / 1e6}


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, default=Path("../shared/data"))
    made.add_argument("--one", help="one setting, as JSON, in this process")
    options = parse(made, arguments)
    text = (options.data / "gutenberg_books" / "alice.txt").read_text()[3000:8000]
    if options.one:
        print(json.dumps(measure(*json.loads(options.one)[:3], text, json.loads(options.one)[3])))
        return
    with (RESULTS / "reading_cost.jsonl").open("w") as file:
        for setting in SETTINGS:
            record: dict[str, Any] = dict(zip(("dtype", "rank", "segment"), setting, strict=True))
            for only_read in (False, True):
                command = [
                    sys.executable,
                    __file__,
                    "--data",
                    str(options.data),
                    "--one",
                    json.dumps([*setting, only_read]),
                ]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                record |= json.loads(out.splitlines()[-1])
            record["ratio"] = record["read_none"] / record["forward_backward"]
            record["default_ratio"] = record["read_off"] / record["read_none"]
            file.write(json.dumps(record) + "\n")
            print(record, flush=True)


if __name__ == "__main__":
    main()
