"""Two processes that each hold a part of every parameter (FSDP2) against one process that holds all.

All cases run in one start of two processes, which leave what they found in a folder; the tests read it there.
"""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim import Optimizer

from nestlearn.optim import (
    DGD,
    M3,
    AdaGradMemory,
    AssociativeMomentum,
    DeepMomentum,
    DeltaRule,
    Diagonal,
    InputProjection,
    LeastSquares,
    MultiTimescale,
    NestedTransfer,
    NewtonSchulz,
    Polynomial,
    Whitening,
    matrices,
)

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo, the CPU backend"),
    # Of torch's own: it distributes small tensors one by one, and reads checkpoints of one process without a group.
    pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed"),
]

PROCESSES, STEPS, STOP = 2, 20, 14  # it stops within a slow period, and within a period of every level


class Mixed(nn.Module):
    """Rows that two processes cannot share evenly, fewer rows than processes, a stack, a vector, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 5)
        self.stack = nn.Parameter(torch.randn(3, 4, 5) / 3)
        self.kernel = nn.Parameter(torch.randn(1, 1, 3, 2))
        self.last = nn.Linear(3, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens)))
        x = torch.einsum("btn,smn->bsm", x, self.stack)
        x = F.conv2d(x[:, None], self.kernel).flatten(1)
        return self.last(x.unflatten(1, (-1, 3)).sum(1))


def groups(model: Mixed, **more: Any) -> list[dict[str, Any]]:
    rest = [parameter for parameter in model.parameters() if parameter is not model.embedding.weight]
    return [{"params": [model.embedding.weight], "rule": "adamw", **more}, {"params": rest}]


OPTIMIZERS: dict[str, Callable[[Mixed], Optimizer]] = {
    "m3": lambda model: M3(groups(model), lr=0.02, slow_period=4),
    "m3-paper": lambda model: M3(groups(model), lr=0.02, slow_period=4, accumulate="paper"),
    "m3-as-muon": lambda model: M3(groups(model), lr=0.02, alpha=0.0, second_moment=False),
    "delta-momentum": lambda model: AssociativeMomentum(
        groups(model), lr=0.02, delta=DeltaRule(), features=Polynomial(), preconditioner=Diagonal()
    ),
    "whitened": lambda model: AssociativeMomentum(
        groups(model), lr=0.02, preconditioner=Whitening(period=3), output=NewtonSchulz()
    ),
    "least-squares": lambda model: AssociativeMomentum(
        groups(model), lr=0.02, preconditioner=LeastSquares("rows", period=3)
    ),
    "deep-momentum": lambda model: DeepMomentum(groups(model), lr=0.02, momentum=0.5),
    "adagrad-memory": lambda model: AdaGradMemory(groups(model), lr=0.02, momentum=0.5),
    "dgd": lambda model: DGD(groups(model), model, lr=0.1, adamw_lr=0.02, erase=0.1),
    "multi-timescale-dgd": lambda model: MultiTimescale(
        DGD(groups(model), model, lr=0.1, adamw_lr=0.02, erase=0.1), periods=[3, 4, 2]
    ),
    "nested-transfer": lambda model: NestedTransfer(M3(groups(model), lr=0.02, slow_period=4), period=4),
    "multi-timescale": lambda model: MultiTimescale(M3(groups(model), lr=0.02, slow_period=2), periods=[3, 4]),
}


def make(name: str) -> tuple[Mixed, Optimizer]:
    """A model with its optimizer, in parts where there are several processes."""
    torch.manual_seed(0)
    model = Mixed().double()
    if dist.is_initialized():
        fully_shard(model)
    return model, OPTIMIZERS[name](model)


def train(model: Mixed, optimizer: Optimizer, steps: Iterable[int]) -> None:
    """The same batches for all; of several processes each reads its own rows."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(7, (8, 5), generator=generator)
        tokens = tokens.chunk(PROCESSES)[rank] if dist.is_initialized() else tokens
        optimizer.zero_grad()
        F.mse_loss(model(tokens), tokens.double().mean(1, keepdim=True) - 2).backward()
        optimizer.step()


def complete(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}


def load(name: str, folder: Path, full: dict[str, Any] | None = None) -> tuple[Mixed, Optimizer]:
    """A new model and optimizer with what was saved in `folder`, or with a state that is whole in memory."""
    model, optimizer = make(name)
    content = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(content, checkpoint_id=folder)
    set_model_state_dict(model, content["model"])
    options = StateDictOptions(full_state_dict=full is not None)
    set_optimizer_state_dict(model, optimizer, full or content["optimizer"], options=options)
    return model, optimizer


def run_cases(rank: int, folder: Path, port: int) -> None:
    """What each of the two processes does."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    for name in OPTIMIZERS:
        model, optimizer = make(name)
        train(model, optimizer, range(STOP))
        content = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(content, checkpoint_id=folder / name)
        options = StateDictOptions(full_state_dict=True)
        full = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        train(model, optimizer, range(STOP, STEPS))
        found = {"end": complete(model)}
        for way, given in (("resumed", None), ("resumed from full", full)):
            model, optimizer = load(name, folder / name, given)
            train(model, optimizer, range(STOP, STEPS))
            found[way] = complete(model)
        torch.save(found, folder / f"{name}-{rank}.pt")
    (folder / f"stack-{rank}").write_text(stacks_that_are_collected())
    torch.save(refusals(), folder / f"refused-{rank}.pt")
    dist.destroy_process_group()


def stacks_that_are_collected() -> str:
    """Divided along the first dimension; more processes than matrices of the second one."""
    collected: list[tuple[int, ...]] = []
    model = nn.ParameterList([torch.ones(3, 4, 5), torch.ones(1, 4, 5)])
    fully_shard(model)
    for optimizer in (M3(model), AssociativeMomentum(model, delta=DeltaRule())):
        for parameter in model:
            parameter.grad = torch.ones_like(parameter)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matrices, "whole", lambda part, like: collected.append(tuple(like.shape)))
            optimizer.step()
    return str(collected)


def refusals() -> list[str]:
    """What `InputProjection` says to a model in parts, and to one that is the same on all processes."""
    said = []
    for shard in (True, False):
        model = nn.Linear(4, 4)
        if shard:
            fully_shard(model)
        with pytest.raises(ValueError) as refused:
            InputProjection(torch.optim.SGD(model.parameters(), lr=0.1), model)
        said.append(str(refused.value))
    return said


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_cases, (folder, port), nprocs=PROCESSES)
    return folder


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=1e-7, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_train_as_one(name: str, found: Path):
    model, optimizer = make(name)
    start = complete(model)["first.weight"].clone()
    train(model, optimizer, range(STEPS))
    for rank in range(PROCESSES):
        close(torch.load(found / f"{name}-{rank}.pt")["end"], complete(model))
    assert float((model.first.weight.detach() - start).abs().max()) > 0.01


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("way", ["resumed", "resumed from full"])
def test_two_processes_resume_to_the_bit(name: str, way: str, found: Path):
    for rank in range(PROCESSES):
        results = torch.load(found / f"{name}-{rank}.pt")
        assert all(torch.equal(x, results["end"][key]) for key, x in results[way].items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_process_goes_on_from_the_checkpoint_of_two(name: str, found: Path):
    model, optimizer = load(name, found / name)
    train(model, optimizer, range(STOP, STEPS))
    close(complete(model), torch.load(found / f"{name}-0.pt")["end"])


def test_matrices_that_are_whole_on_a_process_are_not_collected(found: Path):
    assert [(found / f"stack-{rank}").read_text() for rank in range(PROCESSES)] == ["[]"] * PROCESSES


def test_a_projection_by_the_inputs_of_one_process_is_refused(found: Path):
    for rank in range(PROCESSES):
        for said in torch.load(found / f"refused-{rank}.pt"):
            assert "inputs of its own process only" in said and "on one process" in said
