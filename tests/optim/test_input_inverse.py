"""DGD behind the inverse second moment of a map's inputs: a loop over rows in float64, refreshes, and resumed runs."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from nestlearn.optim import DGD, MultiTimescale

LR, REST, REFRESH, MOMENTUM, DAMPING, DECAY = 0.02, 0.01, 3, 0.8, 0.3, 0.05
SETTINGS = {"precondition": "inverse", "refresh": REFRESH, "momentum": MOMENTUM, "damping": DAMPING}


class Net(nn.Module):
    """Tokens through two linear maps, one without bias and used twice, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.inner = nn.Linear(5, 5, bias=False)
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.inner(self.embed(ids)))
        return self.out(self.norm(torch.relu(self.inner(x))))


def made(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def dgd(net: nn.Module, **more) -> DGD:
    return DGD(net.parameters(), net, lr=LR, adamw_lr=REST, weight_decay=DECAY, **{**SETTINGS, **more})


def loss_of(output: Tensor) -> Tensor:
    return (output - torch.linspace(-1, 1, output.shape[-1]).to(output)).square().sum(-1).mean()


def tokens(step: int) -> Tensor:
    return torch.randint(7, (4, 3), generator=torch.Generator().manual_seed(step))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net(tokens(step))).backward()
        optimizer.step()


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(left.parameters(), right.parameters(), strict=True))


def quintic(x: Tensor) -> Tensor:
    """Five iterations on one matrix, by the formula."""
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Oracle:
    """Each step from the equations, with inputs that a forward pass written out here yields."""

    def __init__(self, net: Net) -> None:
        self.net = net
        rest = [net.embed.weight, net.norm.weight, net.norm.bias, net.out.bias]
        self.rest = torch.optim.AdamW(rest, lr=REST, betas=(0.9, 0.95), weight_decay=DECAY)
        self.inverse: dict[str, Tensor] = {}
        self.momentum = {"inner": torch.zeros_like(net.inner.weight), "out": torch.zeros_like(net.out.weight)}

    def step(self, ids: Tensor, number: int) -> None:
        net = self.net
        net.zero_grad()
        x1 = net.embed(ids).reshape(-1, 5)
        x2 = torch.tanh(x1 @ net.inner.weight.T)
        x3 = nn.functional.layer_norm(torch.relu(x2 @ net.inner.weight.T), (5,), net.norm.weight, net.norm.bias)
        loss_of(x3 @ net.out.weight.T + net.out.bias).backward()
        with torch.no_grad():
            for name, rows in (("inner", torch.cat([x1, x2])), ("out", x3)):
                if number % REFRESH == 0:
                    second = sum((torch.outer(row, row) for row in rows), torch.zeros(5, 5).double()) / len(rows)
                    eye = torch.eye(5).double()
                    self.inverse[name] = torch.linalg.inv(second + DAMPING * second.trace() / 5 * eye)
                weight = getattr(net, name).weight
                g = weight.grad @ self.inverse[name]
                self.momentum[name] = MOMENTUM * self.momentum[name] + (1 - MOMENTUM) * g
                direction = quintic(MOMENTUM * self.momentum[name] + (1 - MOMENTUM) * g)
                weight.mul_(1 - LR * DECAY).sub_(LR * 0.2 * max(weight.shape) ** 0.5 * direction)
        self.rest.step()


@pytest.mark.parametrize("parts", [1, 2])
def test_ten_steps_equal_the_loop_over_rows(parts):
    net, twin = made(), made()
    optimizer, oracle = dgd(net), Oracle(twin)
    for step in range(10):
        optimizer.zero_grad()
        for part in tokens(step).chunk(parts):  # accumulated: the same as the large batch
            (loss_of(net(part)) / parts).backward()
        optimizer.step()
        oracle.step(tokens(step), step)
        for (name, p), q in zip(net.named_parameters(), twin.named_parameters(), strict=True):
            torch.testing.assert_close(p, q[1], rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("stop", range(1, 8))
def test_resumes_to_the_bit_at_every_step_between_two_refreshes(stop, tmp_path):
    net, again = made(torch.float32), made(torch.float32)
    optimizer, resumed = dgd(net), dgd(again)
    train(net, optimizer, range(stop))
    torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(net, optimizer, range(stop, 11))
    train(again, resumed, range(stop, 11))
    assert same(net, again)
    assert set(optimizer.state[net.inner.weight]) == {"step", "momentum_buffer", "inverse"}


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_period_is_resumed_in_its_middle(stop):
    """One step in two, and of these one in three makes a new inverse, from the inputs of both."""

    def slow(net: Net) -> MultiTimescale:
        base = dgd(net)
        return MultiTimescale(base, [2] * len(base.param_groups))

    net, again = made(), made()
    optimizer, resumed = slow(net), slow(again)
    train(net, optimizer, range(stop))
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(stop, 13))
    train(again, resumed, range(stop, 13))
    assert same(net, again)


def test_a_period_is_one_large_batch():
    net, whole = made(), made()
    slow = MultiTimescale(dgd(net), [2, 2])
    train(net, slow, range(2))
    optimizer = dgd(whole)
    loss_of(whole(torch.cat([tokens(0), tokens(1)]))).backward()
    optimizer.step()
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_inputs_are_read_on_the_steps_of_a_refresh_alone():
    net = made()
    optimizer = dgd(net)
    read, inverses = [], []
    for step in range(7):
        train(net, optimizer, range(step, step + 1))
        read.append(optimizer._layers[net.inner.weight].rows is not None)
        inverses.append(optimizer.state[net.inner.weight]["inverse"].clone())
    assert read == [step % 3 == 0 for step in range(7)]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(inverses)] == [step % 3 != 2 for step in range(6)]


def test_the_scale_of_the_inputs_does_not_matter():
    """Inputs four times as large and a map a quarter as large: steps are a quarter as large, so answers stay equal."""
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = []
    for scale in (1.0, 4.0):
        layer = nn.Linear(4, 3, bias=False).double()
        start = nn.init.eye_(layer.weight).detach().clone()
        optimizer = DGD(layer.parameters(), layer, lr=0.1, **SETTINGS)
        layer(scale * x).pow(2).mean().backward()
        optimizer.step()
        moved.append(layer.weight.detach() - start)
    torch.testing.assert_close(*moved)


def test_it_is_descent_on_the_map_itself_where_the_loss_is_quadratic_in_its_outputs():
    """``½ E‖W x‖²`` has G = W R, so that G P is W: all directions shrink at one speed, however large their inputs."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 0] *= 30
    layer = nn.Linear(4, 4, bias=False).double()
    start = layer.weight.detach().clone()
    optimizer = DGD(layer.parameters(), layer, lr=0.1, **{**SETTINGS, "damping": 1e-9})
    layer(x).square().sum(-1).mean().div(2).backward()
    assert layer.weight.grad is not None and layer.weight.grad[:, 0].norm() > 100 * layer.weight.grad[:, 1:].norm()
    optimizer.step()
    momentum = optimizer.state[layer.weight]["momentum_buffer"]
    torch.testing.assert_close(momentum / (1 - MOMENTUM), start, rtol=1e-5, atol=1e-6)


def test_the_transposed_layers_of_gpt2():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer, gpt = nn.Linear(4, 3).double(), Conv1D(3, 4).double()
    with torch.no_grad():
        gpt.weight.copy_(layer.weight.T)
        gpt.bias.copy_(layer.bias)
    for module in (layer, gpt):
        optimizer = dgd(module)
        for step in range(5):
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            loss_of(module(x)).backward()
            optimizer.step()
    torch.testing.assert_close(gpt.weight.T, layer.weight)
    torch.testing.assert_close(gpt.bias, layer.bias)


def test_a_map_without_inputs_keeps_its_inverse():
    """At first that is the identity: the rule is Muon then. Later it is the last one made."""
    layer = nn.Linear(3, 2, bias=False).double()
    optimizer = DGD(layer.parameters(), layer, lr=0.1, **{**SETTINGS, "refresh": 1})
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert torch.equal(optimizer.state[layer.weight]["inverse"], torch.eye(3).double())
    optimizer.zero_grad()
    layer(torch.randn(5, 3, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    made_now = optimizer.state[layer.weight]["inverse"].clone()
    assert not torch.equal(made_now, torch.eye(3).double())
    optimizer.zero_grad()
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert torch.equal(optimizer.state[layer.weight]["inverse"], made_now)


def test_inputs_that_are_not_finite_spoil_their_own_weight_only():
    layers = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(2)])
    optimizer = DGD(layers.parameters(), layers, lr=0.1, **SETTINGS)
    x = torch.ones(4, 3)
    x[0, 0] = torch.inf
    (layers[0](torch.ones(4, 3)).sum() + layers[1](x).sum()).backward()
    optimizer.step()
    assert layers[0].weight.isfinite().all() and layers[1].weight.isnan().all()


def test_bad_settings_name_the_cause():
    layer = nn.Linear(3, 2)
    for settings, message in (
        ({"precondition": "root"}, "precondition is 'root'; it must be one of implicit, inverse"),
        ({"refresh": 0}, "refresh is 0; it must be a whole number of at least 1"),
        ({"momentum": 1.0}, r"momentum is 1.0; it must be in \[0, 1\)"),
        ({"damping": 0.0}, "damping is 0.0; it must be positive"),
        ({"form": "sample"}, "precondition is \"inverse\" and form is 'sample'"),
    ):
        with pytest.raises(ValueError, match=message):
            DGD(layer.parameters(), layer, **{**SETTINGS, **settings})
    implicit = DGD(layer.parameters(), layer)
    implicit.param_groups[0]["precondition"] = "inverse"
    layer(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match='precondition became "inverse" after the optimizer was made'):
        implicit.step()
    with pytest.raises(ValueError, match="no backward pass went through the module"):
        bare = DGD(layer.parameters(), layer, **SETTINGS)
        bare.zero_grad()
        layer.weight.grad = torch.ones_like(layer.weight)
        bare.step()
