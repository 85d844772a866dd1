"""Two processes that each hold a part of every parameter (FSDP2), or all (DDP), against one process that holds all.

All cases run in one start of two processes, which leave what they found in a folder; the tests read it there.
"""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nestlearn.memory.kernels.newton_schulz import newton_schulz
from nestlearn.optim import (
    DGD,
    M3,
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
    orthogonal,
)

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo, the CPU backend"),
    # Of torch's own: it distributes small tensors one by one, and reads checkpoints of one process without a group.
    pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed"),
]

REPLICAS = {"whole": None, "low rank": 8, "low rank, exceeded": 2, "models of their own": None}
"""The rank of the memory of inputs."""

PROCESSES, STEPS, STOP = 2, 9, 5  # it stops within a slow period, and within a period of every level


class Mixed(nn.Module):
    """Rows that two processes cannot share evenly, fewer rows than processes, a stack, a vector, an embedding, and
    three matrices of one shape, which two processes cannot share evenly either."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 5)
        self.alike = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
        self.stack = nn.Parameter(torch.randn(3, 4, 5) / 3)
        self.kernel = nn.Parameter(torch.randn(1, 1, 3, 2))
        self.last = nn.Linear(3, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.alike(self.first(self.embedding(tokens))))
        x = torch.einsum("btn,smn->bsm", x, self.stack)
        x = F.conv2d(x[:, None], self.kernel).flatten(1)
        return self.last(x.unflatten(1, (-1, 3)).sum(1))


def groups(model: Mixed, **more: Any) -> list[dict[str, Any]]:
    rest = [parameter for parameter in model.parameters() if parameter is not model.embedding.weight]
    return [{"params": [model.embedding.weight], "rule": "adamw", **more}, {"params": rest}]


OPTIMIZERS: dict[str, Callable[[Mixed], Optimizer]] = {
    "m3": lambda model: M3(groups(model), lr=0.02, slow_period=4),
    "m3-mixed-before": lambda model: M3(groups(model), lr=0.02, mix="before", timescales=(4.0, 9.0), slow_from=3),
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
    "dgd": lambda model: DGD(groups(model), model, lr=0.1, adamw_lr=0.02, erase=0.1),
    "multi-timescale-dgd": lambda model: MultiTimescale(
        DGD(groups(model), model, lr=0.1, adamw_lr=0.02, erase=0.1), periods=[3, 4, 4]
    ),
    "dgd-inverse": lambda model: DGD(groups(model), model, lr=0.02, adamw_lr=0.02, precondition="inverse", refresh=4),
    "multi-timescale-dgd-inverse": lambda model: MultiTimescale(
        DGD(groups(model), model, lr=0.02, adamw_lr=0.02, precondition="inverse", refresh=2), periods=[3, 4, 4]
    ),
    "input-projection": lambda model: InputProjection(
        M3(groups(model), lr=0.02, slow_period=4), model, alpha=10.0, period=4, dtype=torch.float64
    ),
    "input-projection-of-gradients": lambda model: InputProjection(
        MultiTimescale(torch.optim.Adam(model.parameters(), lr=0.02), periods=[3]),
        model,
        alpha=10.0,
        period=4,
        dtype=torch.float64,
        apply_to="gradient",
        unit="steps",
    ),
    "nested-transfer": lambda model: NestedTransfer(M3(groups(model), lr=0.02, slow_period=4), period=4),
    "outer-nesterov": lambda model: NestedTransfer(M3(groups(model), lr=0.02, alpha=0.0), period=4, momentum=0.5),
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
    layer = nn.Linear(2, 1, bias=False)
    early = InputProjection(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    layer(torch.eye(2)[rank : rank + 1])
    early.step()
    torch.save(early.own_state()["maps"][0]["seen"], folder / f"early-{rank}.pt")
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
    for name in REPLICAS:
        torch.save(replicas(name), folder / f"replicas, {name}-{rank}.pt")
    torch.save(replicas_that_share(), folder / f"shared-{rank}.pt")
    torch.save(refusals(), folder / f"refused-{rank}.pt")
    dist.destroy_process_group()


def replicas_that_share() -> tuple[dict[str, Tensor], int]:
    """A network after steps of M3, whose replicas share the work; how many matrices this process orthogonalized."""
    torch.manual_seed(0)
    model, done = Mixed().double(), 0
    optimizer = OPTIMIZERS["m3"](model)
    replica: nn.Module = model
    if dist.is_initialized():
        replica = DistributedDataParallel(model)
        optimizer.process_group = dist.group.WORLD

    def counted(x: Tensor, *given: Any, **more: Any) -> Tensor:
        nonlocal done
        done += len(x)
        return newton_schulz(x, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orthogonal, "newton_schulz", counted)
        train(cast(Mixed, replica), optimizer, range(STEPS))
    return complete(model), done


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
    """What `InputProjection` says to a weight that is divided along its inputs, and to inputs that are divided."""
    said, mesh = [], init_device_mesh("cpu", (PROCESSES,))
    across, plain = nn.Linear(4, 4), nn.Linear(4, 4)
    fully_shard(across, mesh=mesh, shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))
    with pytest.raises(ValueError) as refused:
        InputProjection(torch.optim.SGD(across.parameters(), lr=0.1), across)
    said.append(str(refused.value))
    InputProjection(torch.optim.SGD(plain.parameters(), lr=0.1), plain)
    with pytest.raises(ValueError) as refused:
        plain(distribute_tensor(torch.ones(2, 4), mesh, [Shard(0)]))
    said.append(str(refused.value))
    return said


def replicas(name: str) -> dict[str, Any]:
    """A network and the memory of its inputs after eight steps, each of two passes through replicas of it (DDP)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 2, bias=False)).double()
    own_group, replica, rows, scale = None, net, slice(0, 6), 1.0
    if dist.is_initialized() and name == "models of their own":
        own_group = [dist.new_group([rank]) for rank in range(PROCESSES)][dist.get_rank()]
    elif dist.is_initialized():
        replica, rows, scale = DistributedDataParallel(net), [slice(0, 2), slice(2, 6)][dist.get_rank()], PROCESSES
    optimizer = InputProjection(
        torch.optim.Adam(net.parameters(), lr=0.02), net, alpha=0.5, rank=REPLICAS[name], unit="steps",
        dtype=torch.float64, process_group=own_group,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(3, 9, generator=generator, dtype=torch.float64)  # with the 1 of the bias of rank 4
    for step in range(8):
        optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(6, 3, generator=generator, dtype=torch.float64) @ mixing
            ((replica(x[rows]) - 1).square().sum() * scale / 6).backward()
        optimizer.step()
        if step in (3, 6):
            optimizer.refresh()
    seen = {str(place): memory["seen"] for place, memory in enumerate(optimizer.own_state()["maps"])}
    return net.state_dict() | {f"products {k}": x if len(x) == x.shape[1] else x.T @ x for k, x in seen.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Both are forks of one process, which imports this module once.
    torch.multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(run_cases, (folder, port), PROCESSES, start_method="forkserver")
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
    assert float((model.first.weight.detach() - start).abs().max()) > 0.005


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


@pytest.mark.parametrize("name", REPLICAS)
def test_replicas_share_one_memory_of_inputs(name: str, found: Path):
    first, second = (torch.load(found / f"replicas, {name}-{rank}.pt") for rank in range(PROCESSES))
    assert all(torch.equal(x, second[key]) for key, x in first.items())
    expected = replicas(name)
    if name == "low rank, exceeded":  # each process has reduced its own rows before
        assert not torch.allclose(first["products 0"], expected["products 0"])
    else:
        close(first, expected)


def test_replicas_share_the_work_on_whole_matrices(found: Path):
    (first, own), (second, other) = (torch.load(found / f"shared-{rank}.pt") for rank in range(PROCESSES))
    assert all(torch.equal(x, second[key]) for key, x in first.items())
    alone, every = replicas_that_share()
    close(first, alone)
    # Of three matrices of one shape two here and one there, 9 times for the fast and twice for the slow momentum.
    assert own == every - 11
    assert other == every - 2 * 11


def test_a_memory_made_before_the_processes_met_is_shared(found: Path):
    for rank in range(PROCESSES):
        assert torch.equal(torch.load(found / f"early-{rank}.pt"), torch.eye(2))


def test_weights_and_inputs_that_a_projection_cannot_read_are_refused(found: Path):
    for rank in range(PROCESSES):
        across, divided = torch.load(found / f"refused-{rank}.pt")
        assert "is divided as" in across and "(Shard(0))" in across
        assert "input that is distributed" in divided and "data parallelism" in divided
