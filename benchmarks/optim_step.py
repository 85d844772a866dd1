"""What a step costs: python benchmarks/optim_step.py writes docs/results/optim_step.jsonl and prints the table.

(a) 100 matrices of 446 x 446, 19.9 million parameters; (b) with --preset hope-340m, the shapes of a preset, random
weights and gradients. All optimizers live in one process, on the same parameters, and keep their states, as in
training. They take turns, step by step. A round is ten steps, a slow period of M3, whose last one makes the slow
direction anew. The first step, which makes the states, is left out. The time of a step is (9 x median of the others +
median of the last ones) / 10, over all rounds: machines that others use too have slow moments. Reported are it, its
ratio to that of `torch.optim.Muon` and of AdamW (foreach), and the bytes of state per parameter. With one thread times
are those of the process, which others on the machine do not lengthen by taking turns with it.

For the delta rules there is also the ratio to AdamW (foreach) of what is left when the time inside their matrix
products (of DGD: inside the Cholesky factorization and the two triangular solves) is taken off, both medians over all
steps.
With a preset all states take memory at once (--optimizers leaves some out), and each optimizer takes 11 steps.
torch.optim.Muon refuses stacks, and DGD is for linear layers: they get the matrices of stacks one by one. DGD's inputs,
512 rows per layer, are seen before. Before timing, each step of this package is compared with the same step
in float64, and Muon's with that of M3 without slow memory and second moment.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from common import RESULTS, Records, parse, parser, processor, table
from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.optim import DGD, M3, DeepMomentum, DeltaMomentum, HigherOrderMomentum, param_groups

PERIOD = 10
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Clock = Callable[[], float]

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
    "DGD": lambda parameters: dgd_of(parameters),
}

ROWS = 512
"""Inputs of a layer that DGD sees."""
HEADER = (
    "optimizer",
    "ms per step",
    "to Muon",
    "to AdamW, foreach",
    "without products",
    "bytes of state per parameter",
)
BASE, MUON, DELTA_RULES = "AdamW, foreach", "torch.optim.Muon", ("DeltaMomentum", "DGD")
ONE_BY_ONE = (MUON, "DGD")


PRODUCTS = (
    (torch, "matmul"), (torch, "bmm"), (torch, "baddbmm"), (Tensor, "matmul"), (Tensor, "__matmul__"),
    (Tensor, "baddbmm_"), (Tensor, "addmm_"), (torch.linalg, "cholesky_ex"), (torch.linalg, "solve_triangular"),
)  # fmt: skip


@contextmanager
def seconds_in_products(clock: Clock) -> Iterator[list[float]]:
    """The seconds of each matrix product, factorization and triangular solve."""
    taken: list[float] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            began = clock()
            result = function(*args, **settings)
            taken.append(clock() - began)
            return result

        return call

    with ExitStack() as patches:
        for owner, name in PRODUCTS:
            patches.enter_context(patch.object(owner, name, counted(getattr(owner, name))))
        yield taken


def matrices_of(made: list[nn.Parameter]) -> list[nn.Parameter]:
    """The same memory with each matrix of a stack as a parameter of its own."""
    found = []
    for parameter in made:
        if parameter.ndim == 2:
            found.append(parameter)
            continue
        assert parameter.grad is not None
        for weight, gradient in zip(parameter.detach(), parameter.grad, strict=True):
            found.append(nn.Parameter(weight))
            found[-1].grad = gradient
    return found


def linear_layers(matrices: list[nn.Parameter]) -> nn.ModuleList:
    """Layers with these weights."""
    layers = nn.ModuleList()
    for matrix in matrices:
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        layer.weight = matrix
        layers.append(layer)
    return layers


def dgd_of(matrices: list[nn.Parameter]) -> DGD:
    """A DGD that has seen inputs of every layer."""
    layers, generator = linear_layers(matrices), torch.Generator().manual_seed(0)
    dgd = DGD(layers.parameters(), layers, erase=0.0)
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        gradient, weight.grad = weight.grad, None
        layer(torch.randn(ROWS, weight.shape[1], generator=generator).to(weight)).square().mean().backward()
        weight.grad = gradient
    return dgd


def of_preset(name: str) -> list[tuple[int, ...]]:
    """The shapes of a preset's matrices; its own weights are never allocated."""
    with torch.device("meta"):
        model = HopeForCausalLM(HopeConfig.from_preset(name))
    return [tuple(p.shape) for group in param_groups(model) if group["rule"] == "matrix" for p in group["params"]]


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
    names: Sequence[str], shapes: Sequence[tuple[int, ...]], rounds: int, clock: Clock
) -> dict[str, dict[str, float]]:
    """Seconds of a step, those beside its products, and bytes of state per parameter, by optimizer."""
    made = parameters(shapes)
    matrices, count = matrices_of(made), sum(parameter.numel() for parameter in made)
    kinds = OTHERS | OWN
    optimizers = {name: kinds[name](matrices if name in ONE_BY_ONE else made) for name in names}
    for optimizer in optimizers.values():
        optimizer.step()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds * PERIOD):
        for name, optimizer in optimizers.items():
            taken[name].append(once(optimizer, clock))
    return {
        name: summary(taken[name]) | {"bytes_per_parameter": state_bytes(optimizer) / count}
        for name, optimizer in optimizers.items()
    }


def summary(taken: Sequence[tuple[float, float]]) -> dict[str, float]:
    """What single steps come to, the last of each period apart."""
    ordinary = statistics.median(seconds for i, (seconds, _) in enumerate(taken, 1) if i % PERIOD)
    slow = statistics.median(seconds for i, (seconds, _) in enumerate(taken, 1) if not i % PERIOD)
    beside = statistics.median(seconds for _, seconds in taken)
    seconds = ((PERIOD - 1) * ordinary + slow) / PERIOD
    return {"seconds": seconds, "ordinary": ordinary, "slow": slow, "beside": beside}


def once(optimizer: torch.optim.Optimizer, clock: Clock) -> tuple[float, float]:
    """Seconds of a step, and of what it takes beside its products."""
    with seconds_in_products(clock) as products:
        began = clock()
        optimizer.step()
        seconds = clock() - began
    return seconds, seconds - sum(products)


def main(words: Sequence[str] | None = None) -> None:
    """Check the optimizers, then time them."""
    everything = [*OTHERS, *OWN]
    made = parser(__doc__, RESULTS / "optim_step.jsonl", threads=2)
    made.add_argument("--preset", help="the shapes of a preset in place of 100 squares")
    made.add_argument("--optimizers", nargs="*", choices=everything, default=everything)
    made.add_argument("--rounds", type=int, default=5)
    options = parse(made, words)
    check()
    shapes = of_preset(options.preset) if options.preset else [(446, 446)] * 100
    names = [name for name in everything if name in {*options.optimizers, BASE, MUON}]
    clock = time.process_time if options.threads == 1 else time.perf_counter
    measured = measure(names, shapes, options.rounds, clock)
    shared = {
        "shapes": options.preset or "100 x 446 x 446", "threads": options.threads, "rounds": options.rounds,
        "parameters": sum(torch.Size(shape).numel() for shape in shapes), "all_optimizers_live_at_once": True,
        "combined": f"({PERIOD - 1} x ordinary + slow) / {PERIOD}", "clock": clock.__name__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": processor(), "torch": torch.__version__,
    }  # fmt: skip
    records, rows, (muon, base) = Records(options.out), [], (measured[MUON], measured[BASE])
    for name, values in measured.items():
        beside = values["beside"] / base["seconds"] if name in DELTA_RULES else None
        record = records.add(shared | {
            "optimizer": name, "milliseconds": 1e3 * values["seconds"],
            "ordinary_milliseconds": 1e3 * values["ordinary"], "slow_milliseconds": 1e3 * values["slow"],
            "matrices_of_stacks_one_by_one": name in ONE_BY_ONE and any(len(shape) > 2 for shape in shapes),
            "to_muon": values["seconds"] / muon["seconds"], "to_adamw_foreach": values["seconds"] / base["seconds"],
            "to_adamw_foreach_beside_products": beside, "bytes_per_parameter": values["bytes_per_parameter"],
            "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "load": os.getloadavg()[0],
        })  # fmt: skip
        cells = [f"{record['milliseconds']:.1f}", f"{record['to_muon']:.2f}", f"{record['to_adamw_foreach']:.2f}"]
        rest = "" if beside is None else f"{beside:.2f}"
        rows.append([name, *cells, rest, f"{values['bytes_per_parameter']:.1f}"])
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
