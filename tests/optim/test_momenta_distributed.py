"""Momentum memories on two processes that hold parts of each parameter: the weights of one process, and its state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.optim import (
    AssociativeMomentum,
    DeepMemory,
    DeltaRule,
    Diagonal,
    LeastSquares,
    NewtonSchulz,
    Polynomial,
    Sign,
    Whitening,
)

CASES: list[dict[str, Any]] = [
    {"delta": DeltaRule(), "nesterov": True},
    {"delta": DeltaRule(0.5), "features": Polynomial((1.0, 0.5, 0.1)), "preconditioner": Diagonal()},
    {"preconditioner": Whitening("columns", period=2), "output": Sign()},
    {"preconditioner": LeastSquares("rows", period=2), "output": NewtonSchulz()},
    {"memory": DeepMemory(), "momentum": 0.5},
]
# Rows that two processes cannot share equally, fewer rows than processes, a stack.
SHAPES = [(5, 4), (4, 6), (1, 3), (3, 4, 2), (5, 4), (7,)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(random(*shape, seed=place) for place, shape in enumerate(SHAPES))


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for place, weight in enumerate(net.weights):
            target = random(*SHAPES[place], seed=100 * step + place)
            full = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # type: ignore[operator]
            loss = loss + (full - target).square().sum() * (1 + place)
        loss.backward()
        optimizer.step()


def process(rank: int, folder: str) -> None:
    """Each case: six steps, a checkpoint, four more; then from the checkpoint the last four again."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for case, settings in enumerate(CASES):
        net = Net()
        fully_shard(net, mesh=mesh)
        optimizer = AssociativeMomentum(net.parameters(), lr=0.02, **settings)
        train(net, optimizer, range(6))
        half = [weight.full_tensor().clone() for weight in net.parameters()]  # type: ignore[attr-defined]
        dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=f"{folder}/{case}")
        train(net, optimizer, range(6, 10))
        results = [[weight.full_tensor() for weight in net.parameters()]]  # type: ignore[attr-defined]

        again = Net()
        with torch.no_grad():
            for weight, value in zip(again.parameters(), half, strict=True):
                weight.copy_(value)
        fully_shard(again, mesh=mesh)
        resumed = AssociativeMomentum(again.parameters(), lr=0.02, **settings)
        state = {"optimizer": get_optimizer_state_dict(again, resumed)}
        dcp.load(state, checkpoint_id=f"{folder}/{case}")
        set_optimizer_state_dict(again, resumed, state["optimizer"])
        train(again, resumed, range(6, 10))
        results.append([weight.full_tensor() for weight in again.parameters()])  # type: ignore[attr-defined]
        if rank == 0:
            torch.save([[w.detach() for w in weights] for weights in results], f"{folder}/{case}.pt")
    dist.destroy_process_group()


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    for case, settings in enumerate(CASES):
        net = Net()
        train(net, AssociativeMomentum(net.parameters(), lr=0.02, **settings), range(10))
        straight, resumed = torch.load(tmp_path / f"{case}.pt")
        for one, two, again in zip(net.parameters(), straight, resumed, strict=True):
            torch.testing.assert_close(two, one.detach(), rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(again, two, rtol=0, atol=0)
