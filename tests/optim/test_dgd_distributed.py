"""DGD on two processes is DGD on one: divided weights (FSDP2), replicated ones (DDP), other numbers of rows on each."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nestlearn.optim import DGD

STEPS, RANKS = 6, 2


class Net(nn.Module):
    """More outputs than processes, fewer, and an odd number of them; with and without bias, and a norm for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 6, bias=False)
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(self.norm(torch.relu(self.first(x))))))


def made() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    # The last rows of the second process are padding: the processes count other numbers of rows.
    counted = torch.ones(8, dtype=torch.float64)
    counted[6:] = 0
    return x, counted


def train(model: nn.Module, optimizer: DGD, part: slice) -> None:
    for step in range(STEPS):
        x, counted = (tensor[part] for tensor in batch(step))
        optimizer.zero_grad()
        # The mean over processes of what each has is the whole loss.
        share = len(x) / 8
        ((model(x)[:, 0] - x.sum(-1)).square() * counted).sum().div(8 * share).backward()
        optimizer.step()


def settings(form: str) -> dict:
    return {"lr": 0.4, "adamw_lr": 0.01, "form": form, "erase": 0.5, "weight_decay": 0.1}


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    part = slice(4 * rank, 4 * rank + 4)
    for form in ("batch", "sample"):
        sharded = made()
        fully_shard(sharded)
        train(sharded, DGD(sharded.parameters(), sharded, **settings(form)), part)
        replicated = made()
        train(DistributedDataParallel(replicated), DGD(replicated.parameters(), replicated, **settings(form)), part)
        alone = made()
        single = [dist.new_group([r]) for r in range(RANKS)][rank]
        train(alone, DGD(alone.parameters(), alone, process_group=single, **settings(form)), slice(0, 8))
        whole = [p.full_tensor().detach() for p in sharded.parameters()]
        torch.save(
            {"fsdp": whole, "ddp": list(replicated.parameters()), "alone": list(alone.parameters())},
            Path(folder) / f"{form}-{rank}.pt",
        )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Both are forks of one process, which imports this module once.
    torch.multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(work, (port, str(path)), RANKS, start_method="forkserver")
    return path


@pytest.mark.parametrize("how", ["fsdp", "ddp", "alone"])
@pytest.mark.parametrize("form", ["batch", "sample"])
def test_two_processes_equal_one(folder, form, how):
    expected = made()
    train(expected, DGD(expected.parameters(), expected, **settings(form)), slice(0, 8))
    for rank in range(RANKS):
        received = torch.load(folder / f"{form}-{rank}.pt", weights_only=False)[how]
        for (name, p), q in zip(expected.named_parameters(), received, strict=True):
            torch.testing.assert_close(q, p, msg=lambda text, name=name: f"{name}: {text}")
