"""A new objective and a new retention, outside the package: both engines run them, and the contract holds.

python examples/new_update_rule.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nestlearn.memory import MLP, AssociativeMemory, Gates, Retention, explain, scan
from nestlearn.memory.contract import check_contract


@dataclass(frozen=True)
class LogCosh:
    """``sum_i log cosh r_i``, r = M(k) - v: quadratic near 0, linear far away; its gradient is tanh(r)."""

    def loss(self, prediction, v):
        return torch.log(torch.cosh(prediction - v)).sum(-1)

    def error(self, predict, v):
        return torch.tanh(predict() - v)


@dataclass(frozen=True)
class UnitRows(Retention):
    """Weights whose rows have length 1 at most: ``W = A / sqrt(1 + ||A_row||^2)``."""

    def weights(self, accumulator, anchor):
        return accumulator * torch.rsqrt(1 + accumulator.square().sum(-1, keepdim=True))


def main() -> None:
    memory = AssociativeMemory(MLP(2), LogCosh(), UnitRows(), chunk_size=8)
    print(explain(memory))

    torch.manual_seed(0)
    q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 20, 16, dtype=torch.float64), dim=-1)
    gates = Gates(lr=torch.full((2, 20), 0.5), retain=torch.full((2, 20), 0.99))
    state = memory.init_state((2,), 16, 16, dtype=torch.float64)
    outputs = {engine: scan(memory, state, q, k, v, gates, engine=engine)[0] for engine in ("reference", "chunked")}
    difference = (outputs["reference"] - outputs["chunked"]).abs().max()
    print(f"largest difference of the two engines: {difference:.1e}")
    check_contract(memory)
    print("the contract holds: engines, splits, causality, rows, masks")


if __name__ == "__main__":
    main()
