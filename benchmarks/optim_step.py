"""What a step costs: python benchmarks/optim_step.py writes docs/results/optim_step.jsonl and prints the table.

(a) 100 matrices of 446 x 446, 19.9 million parameters; (b) with --preset hope-340m, the shapes of a preset, random
weights and gradients. All optimizers take turns in one process, a whole slow period of ten steps each per round;
reported are medians over rounds of the time and of the ratio to `torch.optim.Muon` and to AdamW (foreach) of the same
round, and the bytes of state per parameter. Before timing, each step of this package is compared with the same step in
float64, and Muon's with that of M3 without slow memory and second moment.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.optim import M3, DeepMomentum, DeltaMomentum, HigherOrderMomentum, param_groups
from nestlearn.train.allocator import tune_allocator

OUT = Path(__file__).parents[1] / "docs" / "results" / "optim_step.jsonl"
PERIOD = 10
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OTHERS: dict[str, Make] = {
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "torch.optim.Muon": lambda parameters: torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw"),
}
OWN: dict[str, Make] = {
    "M3": lambda parameters: M3(parameters, slow_period=PERIOD),
    "M3, no second moment": lambda parameters: M3(parameters, slow_period=PERIOD, second_moment=False),
    "M3, no slow memory (Muon)": lambda parameters: M3(parameters, alpha=0.0, second_moment=False),
    "DeltaMomentum": DeltaMomentum,
    "HigherOrderMomentum": HigherOrderMomentum,
    "DeepMomentum": DeepMomentum,
}


def squares() -> list[tuple[int, int]]:
    """100 matrices, 19.9 million parameters."""
    return [(446, 446)] * 100


def of_preset(name: str) -> list[tuple[int, ...]]:
    """The shapes of a preset's matrices; its own weights are never allocated."""
    with torch.device("meta"):
        model = HopeForCausalLM(HopeConfig.from_preset(name))
    groups = param_groups(model)
    return [tuple(p.shape) for group in groups if group["rule"] == "matrix" for p in group["params"]]


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Random weights with random gradients, the same for every call."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02).to(dtype)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator).mul_(0.01).to(dtype)
    return made


def change(make: Make, dtype: torch.dtype) -> Tensor:
    """What eleven steps change, over two small matrices."""
    small = parameters([(40, 56), (96, 24)], dtype)
    before = [parameter.detach().clone() for parameter in small]
    optimizer = make(small)
    for _ in range(PERIOD + 1):
        optimizer.step()
    return torch.cat([(p.detach() - old).flatten().double() for p, old in zip(small, before, strict=True)])


def check() -> None:
    """Raises RuntimeError if a step is not what it is in float64, or Muon's not M3's without its extensions."""
    pairs = {name: (change(make, torch.float32), change(make, torch.float64)) for name, make in OWN.items()}
    muon = change(OTHERS["torch.optim.Muon"], torch.float32)
    pairs["torch.optim.Muon"] = muon, pairs["M3, no slow memory (Muon)"][0]
    for name, (fast, exact) in pairs.items():
        error = float((fast - exact).norm() / exact.norm())
        if not error < 5e-2:  # Newton-Schulz in bfloat16
            raise RuntimeError(f"{name} differs by {error:.1e} of its change; it must be right before it is timed.")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors, scalars left out."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.ndim)


def measure(
    kinds: dict[str, Make], shapes: Sequence[tuple[int, ...]], rounds: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Seconds per step of each round, and bytes of state per parameter, by optimizer."""
    made = parameters(shapes)
    count = sum(parameter.numel() for parameter in made)
    # All train the same parameters: only states take memory of their own.
    optimizers = {name: make(made) for name, make in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for current in range(rounds + 1):
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            for _ in range(steps):
                optimizer.step()
            if current:  # the first round makes the states
                seconds[name].append((time.perf_counter() - began) / steps)
    return {
        name: {"seconds": seconds[name], "bytes_per_parameter": state_bytes(optimizers[name]) / count} for name in kinds
    }


def ratio(measured: dict[str, dict[str, Any]], name: str, base: str) -> float:
    """Median over rounds of the ratio of two times of the same round."""
    rounds = zip(measured[name]["seconds"], measured[base]["seconds"], strict=True)
    return statistics.median(own / other for own, other in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="the shapes of a preset in place of 100 squares")
    parser.add_argument("--optimizers", nargs="*", choices=[*OTHERS, *OWN], default=[*OTHERS, *OWN])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=PERIOD, help="per round; a slow period is ten")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    check()
    shapes = of_preset(options.preset) if options.preset else squares()
    kinds = {name: make for name, make in (OTHERS | OWN).items() if name in options.optimizers}
    measured = measure(kinds, shapes, options.rounds, options.steps)
    print("| optimizer | ms per step | to Muon | to AdamW, foreach | bytes of state per parameter |")
    print("|---|---|---|---|---|")
    with options.out.open("a") as file:
        for name, values in measured.items():
            record = {
                "optimizer": name, "shapes": options.preset or "100 x 446 x 446", "threads": options.threads,
                "parameters": sum(torch.Size(shape).numel() for shape in shapes), "rounds": options.rounds,
                "milliseconds": 1e3 * statistics.median(values["seconds"]),
                "to_muon": ratio(measured, name, "torch.optim.Muon"),
                "to_adamw_foreach": ratio(measured, name, "AdamW, foreach"),
                "bytes_per_parameter": values["bytes_per_parameter"],
                "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
            print(
                f"| {name} | {record['milliseconds']:.1f} | {record['to_muon']:.2f} | {record['to_adamw_foreach']:.2f} "
                f"| {record['bytes_per_parameter']:.1f} |"
            )


if __name__ == "__main__":
    tune_allocator()
    main()
