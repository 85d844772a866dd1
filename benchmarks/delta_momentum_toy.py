"""The toy function of NL Eq. 53: steps to its optimum with plain and with delta momentum (NL Figure 4).

    python benchmarks/delta_momentum_toy.py

writes docs/results/delta-momentum.jsonl, one line for each choice of constants and rule, and delta-momentum.svg. The
paper prints the function and the start, but not the constants and rates, so a whole grid is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from common import RESULTS, parse, parser, save_chart
from nestlearn.evals.report.plots import BLUE, GREEN, ORANGE, Line, Panel
from nestlearn.optim import AssociativeMomentum, DeltaMomentum

START = (-3.5, 2.0)
NEAR = 1e-4
"""The value of the function below which its optimum, 0 at (0, 0), counts as reached."""

CONSTANTS = list(product((1.0, 2.0, 5.0, 10.0, 20.0), (0.25, 0.5, 1.0), (2.0, 3.0, 5.0, 8.0)))
SHOWN = (5.0, 0.5, 5.0)
"""(k, a, ω) of the plot, from the middle of the grid."""
MOMENTA = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
RATES = tuple(10 ** (-4 + place / 6) for place in range(25))

RULES: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], str]] = {
    "momentum": (lambda groups: AssociativeMomentum(groups), BLUE),
    "delta momentum, ε = 1": (lambda groups: DeltaMomentum(groups, eps=1.0), ORANGE),
    "delta momentum, ε = 1e-8": (lambda groups: DeltaMomentum(groups, eps=1e-8), GREEN),
}


def toy(point: Tensor, constants: Tensor) -> Tensor:
    """``r² + k (r - θ + a sin(ω r))²`` of points [..., 1, 2] (r, θ), constants [..., 3] (k, a, ω)."""
    (r, angle), (k, a, omega) = point[..., 0, :].unbind(-1), constants.unbind(-1)
    return r.square() + k * (r - angle + a * torch.sin(omega * r)).square()


def runs(
    make: Callable[[Any], torch.optim.Optimizer],
    constants: Sequence[tuple[float, float, float]],
    settings: Sequence[tuple[float, float]],
    steps: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """After each step the points [settings, constants, 2] and their values, all runs side by side in float64."""
    grid = torch.tensor(constants, dtype=torch.float64)
    start = torch.tensor(START, dtype=torch.float64).expand(len(constants), 1, 2)
    points = [nn.Parameter(start.clone()) for _ in settings]
    groups = [{"params": [p], "momentum": a, "lr": lr} for p, (a, lr) in zip(points, settings, strict=True)]
    optimizer = make(groups)
    for _ in range(steps):
        optimizer.zero_grad()
        toy(torch.stack(tuple(points)), grid).sum().backward()
        optimizer.step()
        with torch.no_grad():
            together = torch.stack(tuple(points))
            yield together[..., 0, :], toy(together, grid)


def steps_needed(
    make: Callable[[Any], torch.optim.Optimizer],
    constants: Sequence[tuple[float, float, float]],
    settings: Sequence[tuple[float, float]],
    steps: int,
) -> Tensor:
    """The step from which on the value stays below `NEAR`, `steps` + 1 if it does not: [settings, constants]."""
    needed = torch.ones(len(settings), len(constants), dtype=torch.long)
    for step, (_, values) in enumerate(runs(make, constants, settings, steps), start=1):
        needed[~(values < NEAR)] = step + 1  # also where it is not a number
    return needed


def measure(steps: int) -> Iterator[dict[str, Any]]:
    """Each rule at its own best of the grid, and at its best rate for momentum 0.9, for all constants."""
    for rule, (make, _) in RULES.items():
        # Without momentum both rules are descent: one of them covers it.
        settings = list(product([a for a in MOMENTA if a > 0 or rule == "momentum"], RATES))
        needed = steps_needed(make, CONSTANTS, settings, steps)
        usual = [place for place, (a, _) in enumerate(settings) if a == 0.9]
        for column, (k, a, omega) in enumerate(CONSTANTS):
            row: dict[str, Any] = {"k": k, "a": a, "omega": omega, "rule": rule, "limit": steps}
            for name, places in (("best", range(len(settings))), ("at_0.9", usual)):
                place = min(places, key=lambda place: int(needed[place, column]))
                momentum, rate = settings[place]
                row[name] = {"steps": int(needed[place, column]), "momentum": momentum, "lr": rate}
            yield row


def panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """Paths in the plane and values by step for the constants shown, each rule at its best setting."""
    shown = {r["rule"]: r["best"] for r in rows if (r["k"], r["a"], r["omega"]) == SHOWN}
    paths, values = [], []
    for rule, (make, color) in RULES.items():
        best = shown[rule]
        count = max(setting["steps"] for setting in shown.values())
        trace = [(START, float("nan"))]
        for point, value in runs(make, [SHOWN], [(best["momentum"], best["lr"])], count):
            trace.append((tuple(point[0, 0].tolist()), float(value[0, 0])))
        until = [p for p, _ in trace[: best["steps"] + 1]]
        label = f"{rule}: {best['steps']} steps"
        paths.append(Line(label, [p[0] for p in until], [p[1] for p in until], color, width=1.2))
        values.append(Line(label, range(1, len(trace)), [v for _, v in trace[1:]], color, width=1.2))
    value = Panel(values, "step", "value", y_log=True, y_range=(1e-7, 300.0), y_format="{:.0e}".format)
    return [Panel(paths, "r", "θ"), value]


def main(words: Sequence[str] | None = None) -> None:
    """Run the grid, write records and chart, and print how often each rule beats momentum."""
    made = parser(__doc__, RESULTS / "delta-momentum")
    made.add_argument("--steps", type=int, default=2000)
    options = parse(made, words)
    rows = list(measure(options.steps))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    options.out.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
    save_chart(options.out.with_suffix(".svg"), panels(rows))
    by_rule = {rule: [row for row in rows if row["rule"] == rule] for rule in RULES}
    for name, (rule, mine) in product(("best", "at_0.9"), by_rule.items()):
        pairs = [(x[name]["steps"], y[name]["steps"]) for x, y in zip(mine, by_rule["momentum"], strict=True)]
        reached = [(x, y) for x, y in pairs if min(x, y) <= options.steps]
        ratio = sorted(x / y for x, y in reached)[len(reached) // 2] if reached else float("nan")
        fewer = sum(x < y for x, y in reached)
        print(f"{name}: {rule}: fewer steps than momentum in {fewer} of {len(reached)}, median ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
