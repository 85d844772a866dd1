"""What a step costs: python benchmarks/optim_step.py writes docs/results/optim_step.jsonl and prints the table.

(a) 100 matrices of 446 x 446, 19.9 million parameters; (b) with --preset hope-340m, the shapes of a preset, random
weights and gradients. All optimizers take turns in one process, a whole slow period of ten steps each per round;
reported are medians over rounds of the time and of the ratio to `torch.optim.Muon` and to AdamW (foreach) of the same
round, and the bytes of state per parameter. For the delta rules also the ratio of what is left to AdamW (foreach) when
the time of their matrix products (of DGD: its solve) alone is taken off. DGD's inputs, 512 rows per layer, are seen
outside the time. Before timing, each step of this package is compared with the same step in float64, and Muon's with
that of M3 without slow memory and second moment.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.optim import DGD, M3, DeepMomentum, DeltaMomentum, HigherOrderMomentum, param_groups
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


ROWS = 512


def linear_layers(made: list[nn.Parameter]) -> nn.ModuleList:
    """Layers with these weights; those of stacks are left out."""
    layers = nn.ModuleList()
    for parameter in made:
        if parameter.ndim == 2:
            layer = nn.Linear(parameter.shape[1], parameter.shape[0], bias=False, device="meta")
            layer.weight = parameter
            layers.append(layer)
    return layers


def delta_products(made: list[nn.Parameter]) -> None:
    """The two products of the delta rule, on every matrix."""
    for parameter in made:
        m = parameter.detach()
        wide = m.shape[-2] <= m.shape[-1]
        torch.matmul(m @ m.mT, m) if wide else torch.matmul(m, m.mT @ m)


def solves(made: list[nn.Parameter]) -> None:
    """A Cholesky factorization and two triangular solves, for every matrix."""
    for parameter in made:
        m = parameter.detach()
        factor = torch.linalg.cholesky_ex(torch.eye(m.shape[-1]))[0]
        half = torch.linalg.solve_triangular(factor.mT, m, upper=True, left=False)
        torch.linalg.solve_triangular(factor, half, upper=False, left=False)


PRODUCTS: dict[str, Callable[[list[nn.Parameter]], None]] = {"DeltaMomentum": delta_products, "DGD": solves}


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
    optimizers = {name: make(made) for name, make in kinds.items() if name != "DGD"}
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "products": []} for name in kinds}
    layers = linear_layers(made)
    dgd = DGD(layers.parameters(), layers, lr=1e-9, erase=0.0) if "DGD" in kinds else None
    for current in range(rounds + 1):
        for name, values in found.items():
            if dgd is not None and name == "DGD":
                taken = watched_step(dgd, layers)
            else:
                taken = timed(optimizers[name].step, steps)
            products = timed(partial(PRODUCTS[name], made), 1) if name in PRODUCTS else 0.0
            if current:  # the first round makes the states
                values["seconds"].append(taken)
                values["products"].append(products)
    for name, values in found.items():
        values["bytes_per_parameter"] = state_bytes(optimizers[name]) / count if name in optimizers else 0.0
    return found


def timed(run: Callable[[], object], times: int) -> float:
    """Seconds per call."""
    began = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - began) / times


def watched_step(dgd: DGD, layers: nn.ModuleList) -> float:
    """Seconds of a step of DGD; the passes through the layers before it are not in the time."""
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        gradient, weight.grad = weight.grad, None
        layer(torch.randn(ROWS, weight.shape[1])).square().mean().backward()
        weight.grad = gradient
    return timed(dgd.step, 1)


def ratio(measured: dict[str, dict[str, Any]], name: str, base: str) -> float:
    """Median over rounds of the ratio of two times of the same round."""
    rounds = zip(measured[name]["seconds"], measured[base]["seconds"], strict=True)
    return statistics.median(own / other for own, other in rounds)


def beside_products(measured: dict[str, dict[str, Any]], name: str) -> float:
    """Median over rounds of the ratio to AdamW (foreach) of what a step takes beside its products."""
    own, base = measured[name], measured["AdamW, foreach"]["seconds"]
    rounds = zip(own["seconds"], own["products"], base, strict=True)
    return statistics.median((taken - products) / other for taken, products, other in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="the shapes of a preset in place of 100 squares")
    parser.add_argument("--optimizers", nargs="*", choices=[*OTHERS, *OWN, "DGD"], default=[*OTHERS, *OWN, "DGD"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=PERIOD, help="per round; a slow period is ten")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    check()
    shapes = of_preset(options.preset) if options.preset else squares()
    # DGD is made where its layers are.
    kinds = {name: make for name, make in (OTHERS | OWN | {"DGD": M3}).items() if name in options.optimizers}
    measured = measure(kinds, shapes, options.rounds, options.steps)
    print("| optimizer | ms per step | to Muon | to AdamW, foreach | beside products | bytes of state per parameter |")
    print("|---|---|---|---|---|---|")
    with options.out.open("a") as file:
        for name, values in measured.items():
            record = {
                "optimizer": name, "shapes": options.preset or "100 x 446 x 446", "threads": options.threads,
                "parameters": sum(torch.Size(shape).numel() for shape in shapes), "rounds": options.rounds,
                "milliseconds": 1e3 * statistics.median(values["seconds"]),
                "to_muon": ratio(measured, name, "torch.optim.Muon"),
                "to_adamw_foreach": ratio(measured, name, "AdamW, foreach"),
                "to_adamw_foreach_beside_products": beside_products(measured, name),
                "bytes_per_parameter": values["bytes_per_parameter"],
                "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
            print(
                f"| {name} | {record['milliseconds']:.1f} | {record['to_muon']:.2f} | {record['to_adamw_foreach']:.2f} "
                f"| {record['to_adamw_foreach_beside_products']:.2f} | {record['bytes_per_parameter']:.1f} |"
            )


if __name__ == "__main__":
    tune_allocator()
    main()
