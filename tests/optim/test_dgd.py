"""Delta gradient descent: the minimizer of its objective, a loop over rows in float64, and the memory's own write."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from nestlearn.memory import AssociativeMemory, Delta, Factor, Gates, Matrix, absorb
from nestlearn.optim import DGD, InputProjection, MultiTimescale, NestedTransfer, param_groups
from nestlearn.optim.dgd import PERIOD_SUMS
from nestlearn.optim.minimizers import batch_step

FORMS = ("batch", "sample")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def joined(layer: nn.Linear) -> Tensor:
    """``[W b]``."""
    return layer.weight.detach().clone() if layer.bias is None else with_bias(layer.weight, layer.bias)


def with_bias(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight, bias[:, None]], 1).detach().clone()


def minimizer(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Of a quadratic: one Newton step, with gradient and Hessian by autograd of the written objective."""
    w = start.clone().requires_grad_()
    gradient = torch.autograd.grad(objective(w), w, create_graph=True)[0].flatten()
    hessian = torch.stack([torch.autograd.grad(g, w, retain_graph=True)[0].flatten() for g in gradient])
    return start - torch.linalg.solve(hessian, gradient.detach()).view_as(start)


def objective_of(start: Tensor, x: Tensor, e: Tensor, lr: float, erase: float) -> Callable[[Tensor], Tensor]:
    """``½ E‖W x + e - (1 - λ) Wₜ x‖² + ‖W - Wₜ‖² / 2η``, e the errors of a mean loss."""

    def objective(w: Tensor) -> Tensor:
        fit = (x @ w.T + e - (1 - erase) * x @ start.T).square().sum(-1).mean() / 2
        return fit + (w - start).square().sum() / (2 * lr)

    return objective


def one_step(layer: nn.Linear, x: Tensor, y: Tensor, **settings) -> tuple[Tensor, Tensor, Tensor]:
    """``[W b]`` before and after one step on a mean loss that is not quadratic, and the errors of its rows."""
    start = joined(layer)
    optimizer = DGD(layer.parameters(), layer, **settings)
    output = layer(x)
    output.retain_grad()
    (output - y).pow(4).sum(-1).mean().backward()
    assert output.grad is not None
    errors = output.grad * len(x)
    optimizer.step()
    optimizer.close()
    return start, joined(layer), errors


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("erase", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("lr", [0.05, 40.0])
def test_the_batch_form_is_the_minimizer(lr, erase, bias):
    layer, x, y = nn.Linear(4, 3, bias=bias).double(), random(9, 4), random(9, 3, seed=1)
    start, end, errors = one_step(layer, x, y, lr=lr, erase=erase)
    inputs = with_one(x) if bias else x
    torch.testing.assert_close(end, minimizer(objective_of(start, inputs, errors, lr, erase), start))


@pytest.mark.parametrize("erase", [1.0, 0.3])
@pytest.mark.parametrize("lr", [0.05, 40.0])
def test_the_sample_form_is_the_mean_of_the_minimizers_of_single_rows(lr, erase):
    layer, x, y = nn.Linear(4, 3).double(), random(9, 4), random(9, 3, seed=1)
    start, end, errors = one_step(layer, x, y, lr=lr, erase=erase, form="sample")
    rows = zip(with_one(x).split(1), errors.split(1), strict=True)
    each = [minimizer(objective_of(start, row, error, lr, erase), start) for row, error in rows]
    torch.testing.assert_close(end, torch.stack(each).mean(0))


@pytest.mark.parametrize("lr", [0.1, 100.0])
def test_one_row_is_the_write_of_the_delta_memory(lr):
    """The step of both forms on one sample, and the proximal write of a matrix memory with delta retention."""
    x, y = random(1, 5), random(1, 3, seed=1)
    memory = AssociativeMemory(Matrix(), retention=Delta(), step_size="proximal", chunk_size=1)
    for form in FORMS:
        layer = nn.Linear(5, 3, bias=False).double()
        start, end, errors = one_step(layer, x, y, lr=lr, form=form)
        state = memory.init_state((), 5, 3, params={"W": start}, dtype=torch.float64)
        gates = Gates(lr=torch.full((1,), lr).double(), retain=torch.ones(1).double())
        torch.testing.assert_close(end, absorb(memory, state, {"W": Factor(x, errors)}, gates).params["W"])


def test_small_steps_are_descent_with_a_decay_along_the_inputs():
    x, y = random(9, 4), random(9, 3, seed=1)
    for form in FORMS:
        for erase in (1.0, 0.0):
            layer = nn.Linear(4, 3).double()
            start, end, errors = one_step(layer, x, y, lr=1e-7, form=form, erase=erase)
            inputs = with_one(x)
            expected = errors.T @ inputs / 9 + erase * start @ inputs.T @ inputs / 9
            torch.testing.assert_close((start - end) / 1e-7, expected, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    """Tokens through two linear maps, one without bias and used twice, a norm, and a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.inner = nn.Linear(5, 5, bias=False)
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.inner(self.embed(ids)))
        return self.out(self.norm(torch.relu_(self.inner(x))))


def loss_of(output: Tensor) -> Tensor:
    return (output - torch.linspace(-1, 1, 3).to(output)).square().sum(-1).mean()


def batches(steps: int) -> list[Tensor]:
    return [torch.randint(7, (4, 3), generator=torch.Generator().manual_seed(s)) for s in range(steps)]


class Oracle:
    """Every step row by row, from inputs and errors that a forward pass written out here yields."""

    def __init__(self, net: Net, form: str, lr: float, erase: float, decay: float) -> None:
        self.net, self.form, self.lr, self.erase, self.decay = net, form, lr, erase, decay
        self.rest = torch.optim.AdamW(
            [net.embed.weight, net.norm.weight, net.norm.bias], lr=0.01, betas=(0.9, 0.95), weight_decay=decay
        )

    def step(self, ids: Tensor) -> None:
        net = self.net
        net.zero_grad()
        x1 = net.embed(ids).reshape(-1, 5)
        y1 = x1 @ net.inner.weight.T
        x2 = torch.tanh(y1)
        y2 = x2 @ net.inner.weight.T
        x3 = nn.functional.layer_norm(torch.relu(y2), (5,), net.norm.weight, net.norm.bias)
        y3 = x3 @ net.out.weight.T + net.out.bias
        outputs = (y1, y2, y3)
        for y in outputs:
            y.retain_grad()
        loss_of(y3).backward()
        e1, e2, e3 = (y.grad for y in outputs)
        with torch.no_grad():
            net.inner.weight.mul_(1 - self.lr * self.decay)
            net.out.weight.mul_(1 - self.lr * self.decay)
            net.inner.weight.copy_(self.changed(net.inner.weight, torch.cat([x1, x2]), torch.cat([e1, e2])))
            both = self.changed(with_bias(net.out.weight, net.out.bias), with_one(x3), e3)
            net.out.weight.copy_(both[:, :-1])
            net.out.bias.copy_(both[:, -1])
        self.rest.step()

    def changed(self, w: Tensor, x: Tensor, e: Tensor) -> Tensor:
        if self.form == "sample":
            total = torch.zeros_like(w)
            for row, error in zip(x, e * len(x), strict=True):
                step = self.lr / (1 + self.lr * row.dot(row))
                total += w - step * torch.outer(self.erase * w @ row + error, row)
            return total / len(x)
        eye, moment = torch.eye(x.shape[1]).double(), sum(torch.outer(r, r) for r in x) / len(x)
        gradient = sum(torch.outer(error, row) for row, error in zip(x, e, strict=True))
        change = (self.erase * w @ moment + gradient) @ torch.linalg.inv(eye + self.lr * moment)
        return w - self.lr * change


def groups_of(net: nn.Module) -> list[dict]:
    """What `Oracle` does: the rule for linear maps, AdamW with decay for the rest."""
    return [{"params": list(net.parameters())}]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("erase", [1.0, 0.2])
@pytest.mark.parametrize("form", FORMS)
def test_twenty_steps_equal_the_loop_over_rows(form, erase, parts):
    torch.manual_seed(0)
    net, twin = Net().double(), Net().double()
    twin.load_state_dict(net.state_dict())
    settings = {"lr": 0.3, "erase": erase, "weight_decay": 0.02}
    optimizer = DGD(groups_of(net), net, form=form, adamw_lr=0.01, **settings)
    oracle = Oracle(twin, form, 0.3, erase, 0.02)
    for ids in batches(20):
        optimizer.zero_grad()
        for part in ids.chunk(parts):  # accumulated: the same as the large batch
            (loss_of(net(part)) / parts).backward()
        optimizer.step()
        oracle.step(ids)
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def steps(optimizer: torch.optim.Optimizer, losses: Iterator[Tensor] | list[Callable[[], Tensor]]) -> None:
    for loss in losses:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def weights_after(change: Callable[[nn.Module, Tensor], Tensor], form: str = "batch", **settings) -> list[Tensor]:
    """The parameters of a small network after four steps on outputs that `change` makes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    optimizer = DGD(net.parameters(), net, lr=0.5, form=form, **settings)
    x = random(8, 4).requires_grad_()
    steps(optimizer, [lambda: loss_of(change(net, x))] * 4)
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_rows_count_once_under_activation_checkpointing(form, reentrant):
    plain = weights_after(lambda net, x: net(x), form)
    twice = weights_after(lambda net, x: checkpoint(net, x, use_reentrant=reentrant), form)
    assert all(torch.equal(p, q) for p, q in zip(plain, twice, strict=True))


def test_checkpointing_drops_the_inputs():
    """What backward needs of a layer's input is freed after the forward pass, as the layer's other saved tensors."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    DGD(net.parameters(), net)
    stored: list[StorageWeakRef] = []
    net[1].register_forward_hook(lambda module, args, output: stored.append(StorageWeakRef(output.untyped_storage())))
    output = checkpoint(net, torch.ones(8, 4), use_reentrant=False)
    assert len(stored) == 1 and stored[0].expired()
    plain = net(torch.ones(8, 4))
    assert not stored[1].expired()
    (output + plain).sum().backward()


# Dynamo itself looks at `.grad` of the tensors between two graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_model_is_observed(form):
    def compiled(net, x):
        return torch.compile(net, backend="aot_eager")(x)

    plain, other = weights_after(lambda net, x: net(x), form), weights_after(compiled, form)
    torch._dynamo.reset()
    for p, q in zip(plain, other, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_rows_behind_a_dead_relu_count(form, bias):
    """6 of 8 rows have an error of exactly 0, and the loss averages over all 8: so does the minimizer."""
    x, lr = random(8, 4, seed=1), 0.7
    layer = nn.Linear(4, 1, bias=bias, dtype=torch.float64)
    order = layer(x).squeeze(1).argsort()
    with torch.no_grad():
        shift = layer(x).squeeze(1)[order[5:7]].mean()  # the outputs of two rows are above it
    start = joined(layer)
    optimizer = DGD(layer.parameters(), layer, lr=lr, form=form)
    out = layer(x)
    out.retain_grad()
    torch.relu(out - shift).square().sum(1).mean().backward()
    e = out.grad * 8  # of the sum, as the objective's mean takes it
    assert int((e == 0).sum()) == 6
    optimizer.step()
    rows = with_one(x) if bias else x
    if form == "batch":
        expected = minimizer(objective_of(start, rows, e, lr, 1.0), start)
    else:
        single = [minimizer(objective_of(start, rows[i : i + 1], e[i : i + 1], lr, 1.0), start) for i in range(8)]
        expected = torch.stack(single).mean(0)
    torch.testing.assert_close(joined(layer), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("period", [3, 5])
def test_a_period_is_one_large_batch(form, period):
    """All steps of a period count, not only the last or the first ones."""
    x, y = random(4 * period, 4, seed=1), random(4 * period, 2, seed=2)
    ends = []
    for steps in (1, period):
        layer = nn.Linear(4, 2, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(random(2, 4, seed=3))
            layer.bias.copy_(random(2, seed=4))
        groups = [{"params": layer.parameters(), "update_period": steps}]
        optimizer = MultiTimescale(DGD(groups, layer, lr=0.3, form=form), reduction="sum")
        for part in range(steps):
            optimizer.zero_grad()
            here = slice(None) if steps == 1 else slice(4 * part, 4 * part + 4)
            ((layer(x[here]) - y[here]).square().sum() / (2 * len(x))).backward()
            optimizer.step()
        ends.append(joined(layer))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_the_sample_form_has_no_mean_over_a_period():
    layer = nn.Linear(4, 2)
    groups = [{"params": list(layer.parameters()), "update_period": 3}]
    with pytest.raises(ValueError, match=r'period 3 with form="sample".* reduction="sum"'):
        MultiTimescale(DGD(groups, layer, form="sample"))
    optimizer = MultiTimescale(DGD(groups, layer))
    for group in optimizer.param_groups:
        group["form"] = "sample"
    with pytest.raises(ValueError, match=r'period 3 with form="sample"'):
        optimizer.step()


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing(form):
    """Rows on which the loss does not depend, whatever they hold."""

    def padded(net, x):
        more = torch.cat([x, torch.full((3, 4), 1e30).double()])
        return net(more)[:8]

    left_out = {"skip_rows_without_gradient": True}
    plain, other = (weights_after(change, form, **left_out) for change in (lambda net, x: net(x), padded))
    for p, q in zip(plain, other, strict=True):
        torch.testing.assert_close(p, q)


def test_inputs_by_name_and_of_any_dimensions():
    class Named(nn.Module):
        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            first, _, second = self.net
            return second(input=torch.relu(first(input=x.view(2, 4, 4)))).view(8, 3)

    plain, named = weights_after(lambda net, x: net(x)), weights_after(lambda net, x: Named(net)(x))
    for p, q in zip(plain, named, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("form", FORMS)
def test_the_scale_of_a_grad_scaler_changes_nothing(form):
    results = []
    for enabled in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        optimizer = DGD(net.parameters(), net, lr=0.5, form=form)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for seed in range(4):
            optimizer.zero_grad()
            if enabled and seed == 2:  # a step that is left out, and all that belongs to it
                scaler.scale(net(torch.full((3, 4), torch.inf)).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
            if enabled:  # without zero_grad after the step that was left out
                net.zero_grad()
            scaler.scale(loss_of(net(random(5, 4, seed=seed).float()))).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach() for p in net.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q)


def test_unscaling_before_the_step_needs_the_batch_form():
    layer = nn.Linear(4, 3)
    for form in FORMS:
        optimizer, scaler = DGD(layer.parameters(), layer, form=form), torch.amp.GradScaler("cpu")
        scaler.scale(layer(torch.ones(2, 4)).sum()).backward()
        scaler.unscale_(optimizer)
        if form == "batch":
            scaler.step(optimizer)
        else:
            with pytest.raises(ValueError, match=r"unscale_ was called .* use form=\"batch\""):
                scaler.step(optimizer)


def test_zero_grad_and_a_step_forget_what_was_collected():
    def after(prepare: Callable[[nn.Linear, DGD], None]) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(4, 3).double()
        optimizer = DGD(layer.parameters(), layer, lr=0.7)
        prepare(layer, optimizer)
        start = joined(layer)
        layer(random(5, 4)).square().mean().backward()
        optimizer.step()
        return start, joined(layer)

    def abandoned(layer, optimizer):
        layer(random(5, 4, seed=3)).sum().backward()
        optimizer.zero_grad()

    def stepped(layer, optimizer):
        start = joined(layer)
        layer(random(5, 4, seed=3)).sum().backward()
        optimizer.step()
        layer.zero_grad()  # the model's: the optimizer does not hear of it
        with torch.no_grad():
            layer.weight.copy_(start[:, :-1])
            layer.bias.copy_(start[:, -1])

    plain = after(lambda layer, optimizer: None)
    for prepare in (abandoned, stepped):
        for p, q in zip(plain, after(prepare), strict=True):
            assert torch.equal(p, q)


def test_a_weight_that_is_used_without_its_module_is_named():
    attention = nn.MultiheadAttention(4, 2)
    optimizer = DGD(attention.parameters(), attention)
    x = torch.ones(3, 1, 4)
    attention(x, x, x)[0].square().sum().backward()
    before = attention.out_proj.weight.clone()
    with pytest.raises(ValueError, match=r"out_proj \(\(4, 4\)\) has a gradient, but no backward.*rule=\"adamw\""):
        optimizer.step()
    assert torch.equal(attention.out_proj.weight, before)

    layer = nn.Linear(4, 3)
    optimizer = DGD(layer.parameters(), layer)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    before = joined(layer)
    optimizer.step()  # a gradient of 0 and nothing seen: nothing happens
    assert torch.equal(joined(layer), before)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_step_on_the_same_gradient(form):
    layer, x, y = nn.Linear(4, 3).double(), random(9, 4), random(9, 3, seed=1)
    optimizer = DGD(layer.parameters(), layer, lr=0.7, form=form)
    output = layer(x)
    output.retain_grad()
    (output - y).pow(4).sum(-1).mean().backward()
    for _ in range(2):
        start = joined(layer)
        optimizer.step()
        rows = [(with_one(x), output.grad * 9)]
        if form == "sample":
            rows = list(zip(rows[0][0].split(1), rows[0][1].split(1), strict=True))
        each = [minimizer(objective_of(start, *row, 0.7, 1.0), start) for row in rows]
        torch.testing.assert_close(joined(layer), torch.stack(each).mean(0))


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_is_not_finite_spoils_its_own_weight_only(form):
    results = []
    for spoiled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        optimizer = DGD(net.parameters(), net, form=form)
        x = random(5, 4).float()
        net(x).square().mean().backward()
        if spoiled:
            if form == "batch":
                net[1].weight.grad[0, 0] = torch.nan
            else:
                optimizer._layers[net[1].weight].writes[0, 0] = torch.nan
        optimizer.step()
        results.append([joined(layer) for layer in net])
    (a, _, c), (a2, b2, c2) = results
    assert torch.equal(a, a2) and torch.equal(c, c2)
    assert b2[0].isnan().any() and b2[1:].isfinite().all()


def test_state_goes_through_distributed_checkpoint():
    torch.manual_seed(0)
    net = Net()
    optimizer = DGD(net.parameters(), net, lr=0.3)
    ids = batches(4)
    steps(optimizer, [lambda b=b: loss_of(net(b)) for b in ids[:2]])
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    weights = copy.deepcopy(net.state_dict())
    steps(optimizer, [lambda b=b: loss_of(net(b)) for b in ids[2:]])

    other = Net()
    other.load_state_dict(weights)
    resumed = DGD(other.parameters(), other, lr=0.3)
    set_optimizer_state_dict(other, resumed, saved)  # steps once with lr = 0 and gradients of 0
    assert all(torch.equal(p, q) for p, q in zip(other.state_dict().values(), weights.values(), strict=True))
    steps(resumed, [lambda b=b: loss_of(other(b)) for b in ids[2:]])
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_resumes_to_the_bit(form):
    torch.manual_seed(0)
    net = Net()
    optimizer = DGD(param_groups(net), net, lr=0.3, form=form)
    ids = batches(6)
    steps(optimizer, [lambda b=b: loss_of(net(b)) for b in ids[:3]])
    other = copy.deepcopy(net)
    resumed = DGD(param_groups(other), other, lr=0.1, form=form)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, opt in ((net, optimizer), (other, resumed)):
        steps(opt, [lambda b=b, model=model: loss_of(model(b)) for b in ids[3:]])
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    m3 = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="This state is of another optimizer, not of DGD"):
        optimizer.load_state_dict(m3.state_dict())


def test_half_precision_is_updated_in_float32():
    torch.manual_seed(0)
    half = nn.Linear(8, 4, dtype=torch.bfloat16)
    full = copy.deepcopy(half).float()
    x = random(16, 8).bfloat16()
    for layer in (half, full):
        optimizer = DGD(layer.parameters(), layer, lr=0.5)
        output = layer(x.to(layer.weight.dtype))
        output.backward(torch.ones_like(output) / 16)
        optimizer.step()
        assert layer.weight.dtype == output.dtype
    torch.testing.assert_close(half.weight.float(), full.weight, rtol=8e-3, atol=2e-3)
    torch.testing.assert_close(half.bias.float(), full.bias, rtol=8e-3, atol=2e-3)


def test_groups_are_divided_and_have_their_own_learning_rates():
    net = Net()
    (linear, rest) = DGD(net.named_parameters(), net, lr=0.3, adamw_lr=0.01).param_groups
    assert linear["param_names"] == ["inner.weight", "out.weight"]
    assert (linear["rule"], linear["lr"], rest["rule"], rest["lr"]) == ("matrix", 0.3, "adamw", 0.01)
    groups = DGD(param_groups(net), net, lr=0.3, adamw_lr=0.01).param_groups
    assert [(g["rule"], g["lr"]) for g in groups] == [("matrix", 0.3), ("adamw", 0.01), ("adamw", 0.01)]
    groups = DGD(param_groups(net, lr=0.2, adamw_lr=0.03), net, lr=0.3, adamw_lr=0.01).param_groups
    assert [(g["rule"], g["lr"]) for g in groups] == [("matrix", 0.2), ("adamw", 0.03), ("adamw", 0.03)]
    mixed = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Linear(4, 3))
    groups = DGD(param_groups(mixed, lr=0.2, adamw_lr=0.03), mixed, adamw_lr=0.01).param_groups
    assert [(g["rule"], g["lr"]) for g in groups] == [("matrix", 0.2), ("adamw", 0.01), ("adamw", 0.03)]


def test_a_layer_that_is_added_later_is_observed():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    optimizer = DGD(net[0].parameters(), net, lr=0.1)
    optimizer.add_param_group({"params": net[1].parameters(), "lr": 0.2})
    start = joined(net[1])
    x = random(5, 4)
    output = net(x)
    output.retain_grad()
    hidden = net[0](x).detach()
    output.square().sum(-1).mean().backward()
    optimizer.step()
    expected = minimizer(objective_of(start, with_one(hidden), output.grad * 5, 0.2, 1.0), start)
    torch.testing.assert_close(joined(net[1]), expected)


def test_a_learning_rate_in_a_tensor_and_a_scheduler():
    results = []
    for in_tensor in (False, True):
        for form in FORMS:
            lr = torch.tensor(0.5) if in_tensor else 0.5
            torch.manual_seed(0)
            layer = nn.Linear(4, 3)
            optimizer = DGD(layer.parameters(), layer, lr=lr, form=form)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            for seed in range(3):
                steps(optimizer, [lambda seed=seed, layer=layer: loss_of(layer(random(5, 4, seed=seed).float()))])
                schedule.step()
            results.append(joined(layer))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])


def test_the_transposed_layers_of_gpt2():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    for form in FORMS:
        layer, gpt = nn.Linear(4, 3).double(), Conv1D(3, 4).double()
        with torch.no_grad():
            gpt.weight.copy_(layer.weight.T)
            gpt.bias.copy_(layer.bias)
        for module in (layer, gpt):
            optimizer = DGD(module.parameters(), module, lr=0.4, form=form, weight_decay=0.1)
            steps(optimizer, [lambda m=module, s=s: loss_of(m(random(5, 4, seed=s))) for s in range(3)])
        torch.testing.assert_close(gpt.weight.T, layer.weight)
        torch.testing.assert_close(gpt.bias, layer.bias)


def test_inside_wrappers():
    """A slow group steps on the inputs of its whole period; the change can be projected as any other."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    base = DGD([{"params": net[0].parameters()}, {"params": net[1].parameters()}], net, lr=0.3)
    optimizer = MultiTimescale(base, [1, 2])
    start, inputs, errors = joined(net[1]), [], []
    for seed in range(2):
        x = random(5, 4, seed=seed)
        optimizer.zero_grad()
        hidden = net[0](x)
        output = net[1](hidden)
        output.retain_grad()
        output.square().sum(-1).mean().backward()
        inputs.append(hidden.detach())
        errors.append(output.grad * 5)
        optimizer.step()
    rows = torch.cat(inputs), torch.cat(errors)
    torch.testing.assert_close(joined(net[1]), minimizer(objective_of(start, *rows, 0.3, 1.0), start))
    projected = InputProjection(base, net, period=1)
    steps(projected, [lambda: net(random(5, 4)).square().mean()] * 2)


def test_no_step_overshoots():
    """λ = 0 is stable at any learning rate, where descent diverges from 2 / λmax(R) on."""
    x, y = random(40, 6) @ random(6, 6, seed=2), random(40, 2, seed=1)
    for lr in (1.0, 1e3, 1e6):
        layer = nn.Linear(6, 2).double()
        optimizer, losses = DGD(layer.parameters(), layer, lr=lr, erase=0.0), []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (layer(x) - y).square().sum(-1).mean() / 2
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize(("size", "tolerance"), [(1e2, 1e-4), (1e4, 1e-2)])
def test_the_solve_in_float32_at_large_second_moments(size, tolerance):
    """Relative to the change, with half of the directions unseen: the rounding of R, whatever the solve."""
    x, w, e = (random(*shape).float() for shape in ((32, 64), (16, 64), (32, 16)))
    moment, gradient = x.T @ x / 32, e.T @ x / 32
    lr = size / float(torch.linalg.eigvalsh(moment)[-1])
    exact = x.double().T @ x.double() / 32
    eye = torch.eye(64, dtype=torch.float64)
    expected = -lr * (e.double().T @ x.double() / 32 + w.double() @ exact) @ torch.linalg.inv(eye + lr * exact)

    def distance(dtype: torch.dtype) -> float:
        weight, slope, second = (tensor[None].to(dtype) for tensor in (w, gradient, moment))
        changed = batch_step(weight, slope, second, lr, 1.0)[0].double()
        return float((changed - w.double() - expected).norm() / expected.norm())

    assert distance(torch.float32) < tolerance
    # A solve in float64 of the same sums is hardly closer: their own rounding is what is left.
    assert distance(torch.float32) < 2 * distance(torch.float64)
    assert bool(batch_step(w[None], gradient[None], -moment[None], lr, 1.0).isnan().all())


def test_inputs_orthogonal_to_the_old_ones_leave_old_answers():
    """One linear map and tasks without a common direction: DGD forgets nothing, and neither does descent (NL §4.3).

    Where inputs have a direction in common, DGD erases along it what descent would leave: the opposite of a protection.
    """
    basis = torch.linalg.qr(random(8, 8))[0]
    old, new = random(6, 4, seed=1) @ basis[:4], random(6, 4, seed=2) @ basis[4:]
    overlapping = new + 0.5 * old
    forgotten = {}
    for name in ("dgd", "keep", "sgd"):
        for inputs, label in ((new, "orthogonal"), (overlapping, "overlapping")):
            torch.manual_seed(0)
            layer = nn.Linear(8, 2, bias=False).double()
            optimizer = (
                torch.optim.SGD(layer.parameters(), lr=0.1)
                if name == "sgd"
                else DGD(layer.parameters(), layer, lr=0.1, erase=float(name == "dgd"))
            )
            answers = layer(old).detach()
            # Their own answers: the loss is content with everything the layer says.
            targets = layer(inputs).detach() + 1e-9
            steps(optimizer, [lambda x=inputs, y=targets, m=layer: (m(x) - y).square().mean()] * 30)
            forgotten[name, label] = float((layer(old) - answers).detach().norm() / answers.norm())
    assert all(forgotten[name, "orthogonal"] < 1e-8 for name in ("dgd", "keep", "sgd"))
    assert forgotten["sgd", "overlapping"] < 1e-6 and forgotten["keep", "overlapping"] < 1e-6
    assert forgotten["dgd", "overlapping"] > 0.05


def test_what_a_copy_of_the_model_does_is_not_counted_and_hooks_can_be_taken_off():
    layer = nn.Linear(3, 2)
    optimizer = DGD(layer.parameters(), layer)
    other = copy.deepcopy(layer)
    other(torch.ones(2, 3)).sum().backward()
    layer.eval()
    with torch.no_grad():
        layer(torch.ones(2, 3))
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(ValueError, match="no backward pass went through"):
        optimizer.step()
    optimizer.close()
    assert not layer._forward_hooks
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled.*load_state_dict"):
            attempt(optimizer)


def test_a_weight_that_is_replaced_or_frozen():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = DGD(net.parameters(), net)
    net[0].weight.requires_grad_(False)
    frozen = joined(net[0])[:, :-1]
    net(torch.ones(2, 3)).sum().backward()
    assert optimizer._layers[net[0].weight].rows is None
    optimizer.step()
    assert torch.equal(net[0].weight, frozen)
    optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.ones(2, 4))
    optimizer.param_groups[0]["params"][1].grad = torch.ones(2, 4)
    with pytest.raises(ValueError, match="put into the optimizer in the place of another one"):
        optimizer.step()


def test_many_layers_with_few_outputs():
    """Updated in portions, since second moments and not weights are what is large."""
    net = nn.ModuleList([nn.Linear(512, 1) for _ in range(6)]).double()
    starts, x = [joined(layer) for layer in net], random(3, 512)
    optimizer = DGD(net.parameters(), net, lr=2.0)
    torch.stack([layer(x)[:, 0] for layer in net]).mean(1).sum().backward()
    optimizer.step()
    inputs = with_one(x)
    system = torch.eye(513).double() + 2.0 * inputs.T @ inputs / 3
    for layer, start in zip(net, starts, strict=True):
        torch.testing.assert_close(joined(layer) @ system, start - 2.0 * inputs.mean(0)[None])


def test_layers_it_cannot_train_are_refused_by_name():
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"shape \(5, 4\): 0 and 1 share a parameter .*param_groups"):
        DGD(tied.parameters(), tied)
    twins = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    twins[1].bias = twins[0].bias
    with pytest.raises(ValueError, match="0 and 1 share a parameter"):
        DGD(twins.parameters(), twins)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="0 computes its weight from other parameters"):
        DGD(normed.parameters(), normed)
    both = nn.Sequential(tied, nn.Linear(5, 2))
    optimizer = DGD(param_groups(both), both)
    assert [g["rule"] for g in optimizer.param_groups] == ["matrix", "adamw", "adamw"]
    steps(optimizer, [lambda: both(torch.tensor([1, 2])).square().mean()] * 2)
    with pytest.raises(ValueError, match=r"No nn.Linear of the model .*modules: Conv1d"):
        DGD(nn.Conv1d(2, 2, 3).parameters(), nn.Conv1d(2, 2, 3))


def test_bad_settings_name_the_cause():
    layer = nn.Linear(3, 2)
    for settings, message in (
        ({"form": "mean"}, "form is 'mean'; it must be one of batch, sample"),
        ({"erase": 1.5}, "erase is 1.5; it must be at most 1"),
        ({"erase": -0.1}, "erase is -0.1; it must be 0 or more"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            DGD(layer.parameters(), layer, **settings)
    with pytest.raises(ValueError, match="rule is 'dgd'"):
        DGD([{"params": layer.parameters(), "rule": "dgd"}], layer)
    with pytest.raises(TypeError, match="ordered collections"):
        DGD([{"params": set(layer.parameters())}], layer)
    optimizer = DGD(layer.parameters(), layer)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.param_groups[0]["form"] = "sample"
    with pytest.raises(ValueError, match="form is 'sample', but the model itself was observed for another"):
        optimizer.step()


@pytest.mark.parametrize("wrap", [lambda o, m: NestedTransfer(o, period=9), InputProjection])
def test_zero_grad_of_a_wrapper_forgets_what_was_collected(wrap):
    ends = []
    for discarded in (False, True):
        layer = nn.Linear(4, 2, bias=False, dtype=torch.float64)
        layer.weight.data.copy_(random(2, 4))
        optimizer = wrap(DGD(layer.parameters(), layer), layer)
        if discarded:
            layer(random(7, 4, seed=1)).square().mean().backward()
        optimizer.zero_grad()
        layer(random(5, 4, seed=2)).square().mean().backward()
        optimizer.step()
        ends.append(layer.weight.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("stop", range(1, 6))
@pytest.mark.parametrize("form", FORMS)
def test_a_period_is_resumed_in_its_middle(form, stop):
    """The inputs of the steps before are in the state; a step of the period that had no gradient adds none."""
    reduction = "mean" if form == "batch" else "sum"

    def made() -> tuple[nn.Sequential, MultiTimescale]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)).double()
        groups = [{"params": net[0].parameters(), "update_period": 3}, {"params": net[2].parameters()}]
        return net, MultiTimescale(DGD(groups, net, lr=0.3, form=form), reduction=reduction)

    def train(net: nn.Sequential, optimizer: MultiTimescale, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            loss_of_two(net(random(5, 4, seed=seed))).backward()
            if seed == 1:
                net[0].weight.grad = net[0].bias.grad = None
            optimizer.step()

    def loss_of_two(output: Tensor) -> Tensor:
        return (output - 0.5).square().sum(1).mean()

    net, optimizer = made()
    train(net, optimizer, range(stop))
    again, resumed = made()
    train(again, resumed, range(20, 22))
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(stop, 9))
    train(again, resumed, range(stop, 9))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


def test_the_form_cannot_change_within_a_period():
    layer = nn.Linear(4, 2)
    groups = [{"params": layer.parameters(), "update_period": 2}]
    optimizer = MultiTimescale(DGD(groups, layer), reduction="sum")
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    optimizer.param_groups[0]["form"] = "sample"  # where a period begins
    layer(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["form"] = "batch"
    layer(torch.ones(3, 4)).sum().backward()
    with pytest.raises(ValueError, match="where a period begins"):
        optimizer.step()


@pytest.mark.parametrize(("frozen", "steps"), [(False, 1), (True, 1), (True, 0)])
def test_a_bias_cannot_be_frozen_or_thawed_within_a_period_or_thawed_after_the_backward_pass(frozen, steps):
    layer = nn.Linear(4, 2)
    optimizer = MultiTimescale(DGD(layer.parameters(), layer), periods=[2, 2])
    layer.bias.requires_grad_(not frozen)
    for _ in range(steps):
        layer(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if steps == 0:
        layer(torch.ones(3, 4)).sum().backward()
    layer.bias.requires_grad_(frozen)
    if steps > 0:
        layer(torch.ones(3, 4)).sum().backward()
    with pytest.raises(ValueError, match="the model itself was observed .* its bias was frozen or thawed since"):
        optimizer.step()


def test_form_and_period_change_where_a_period_begins():
    """A run that goes on, one that resumes there, and a state without sums (of an older version) end alike."""
    ends = []
    for way in ("goes on", "resumes", "without sums"):
        layer = nn.Linear(4, 2).double()
        layer.load_state_dict({"weight": random(2, 4, seed=8), "bias": random(2, seed=9)})
        optimizer = MultiTimescale(DGD(layer.parameters(), layer, lr=0.3), periods=[2, 2], reduction="sum")
        changes = [("batch", 2), ("sample", 2), ("batch", 2), ("batch", 1), ("batch", 4), ("sample", 1)]
        for place, (form, period) in enumerate(changes):
            for group in optimizer.param_groups:
                group["form"], group["update_period"] = form, period
            if way != "goes on":
                state = copy.deepcopy(optimizer.state_dict())
                for saved in state["state"].values() if way == "without sums" else ():
                    assert not any(x.any() for x in (saved.pop(name, torch.zeros(1)) for name in PERIOD_SUMS))
                optimizer.load_state_dict(state)
            for step in range(4):
                optimizer.zero_grad()
                layer(random(3, 4, seed=10 * place + step)).square().sum(1).mean().backward()
                optimizer.step()
        ends.append(joined(layer))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_sums_of_another_shape_are_refused():
    def made(inputs: int) -> tuple[nn.Linear, MultiTimescale]:
        layer = nn.Linear(inputs, 2, bias=False)
        return layer, MultiTimescale(DGD(layer.parameters(), layer), periods=[2])

    wide, optimizer = made(5)
    wide(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"has \{'rows': \(\), 'moment': \(5, 5\)\}; it must have"):
        made(4)[1].load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(("weight", "bias", "steps"), [(False, True, 3), (True, False, 4), (False, False, 3)])
def test_a_state_is_read_where_parameters_were_frozen_after_it_began(weight, bias, steps):
    """A weight anywhere in a period, which goes on when it is thawed; a bias where a period begins."""
    ends = []
    for resumed in (False, True):
        layer = nn.Linear(4, 2).double()
        layer.load_state_dict({"weight": random(2, 4, seed=8), "bias": random(2, seed=9)})
        optimizer = MultiTimescale(DGD(layer.parameters(), layer, lr=0.3), periods=[2, 2])
        for step in range(2 * steps):
            frozen = 0 <= step - steps < 2
            layer.weight.requires_grad_(weight or not frozen)
            layer.bias.requires_grad_(bias or not frozen)
            if resumed:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.zero_grad()
            loss = layer(random(3, 4, seed=step).requires_grad_()).square().sum(1).mean()
            loss.backward()
            optimizer.step()
        ends.append(joined(layer))
    assert torch.equal(*ends)


@pytest.mark.parametrize("early", [False, True])
def test_frozen_biases_stay_and_biases_of_frozen_weights_are_trained_by_adamw(early):
    """Whether they were frozen before the optimizer was made or after; and thawed, all of a layer is the rule's."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = None if early else DGD(net.parameters(), net, lr=0.3, adamw_lr=0.01)
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    optimizer = optimizer or DGD(net.parameters(), net, lr=0.3, adamw_lr=0.01)
    starts, x = [joined(layer) for layer in (net[0], net[2])], random(5, 3)
    loss = net(x).square().sum(1).mean()
    loss.backward()
    slope = net[0].bias.grad.clone()
    hidden = torch.tanh(net[0](x)).detach()
    system = torch.eye(4).double() + 0.3 * hidden.T @ hidden / 5
    expected = (starts[1][:, :4] - 0.3 * net[2].weight.grad) @ torch.linalg.inv(system)
    optimizer.step()
    assert torch.equal(net[0].weight, starts[0][:, :3])
    torch.testing.assert_close(net[0].bias.detach(), starts[0][:, 3] - 0.01 * slope.sign())
    torch.testing.assert_close(net[2].weight.detach(), expected)
    assert torch.equal(net[2].bias, starts[1][:, 4])

    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    net.requires_grad_(True)
    optimizer.zero_grad()
    start, x = joined(net[0]), random(5, 3, seed=1)
    net(x).square().sum(1).mean().backward()
    gradient, inputs = with_bias(net[0].weight.grad, net[0].bias.grad), with_one(x)
    optimizer.step()
    system = torch.eye(4).double() + 0.3 * inputs.T @ inputs / 5
    torch.testing.assert_close(joined(net[0]), (start - 0.3 * gradient) @ torch.linalg.inv(system))

    net[2].weight.requires_grad_(False)
    optimizer.zero_grad()
    net(x).square().sum(1).mean().backward()
    start, slope = net[2].bias.detach().clone(), net[2].bias.grad.sign()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    torch.testing.assert_close(net[2].bias.detach(), start - 0.01 * slope)  # AdamW begins with it


@pytest.mark.parametrize("periods", [(2, 1), (1, 2)])
def test_a_bias_needs_the_period_of_its_weight(periods):
    layer = nn.Linear(4, 2)
    groups = [{"params": [p], "update_period": n} for p, n in zip(layer.parameters(), periods, strict=True)]
    optimizer, start = MultiTimescale(DGD(groups, layer)), joined(layer)
    layer(torch.ones(3, 4)).sum().backward()
    said = r"weight of the model itself \(\(2, 4\)\) steps every {} steps, its bias every {}; .*same update_period"
    with pytest.raises(ValueError, match=said.format(*periods)):
        optimizer.step()
    assert torch.equal(joined(layer), start)
    optimizer.zero_grad()
    layer.bias.requires_grad_(False)
    optimizer = MultiTimescale(DGD(groups, layer))
    layer(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.bias, start[:, 4])


@pytest.mark.parametrize("erase", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count, bias", [(1, False), (1, True), (3, False)])
def test_a_rate_that_is_a_tensor_steps_as_the_number(erase: float, count: int, bias: bool) -> None:
    """One matrix alone is updated in place, several of a shape together; a number as rate is left to the last pass."""

    def trained(lr: float | Tensor) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(6, 6, bias=bias) for _ in range(count))).double()
        optimizer = DGD(model.parameters(), model, lr=lr, erase=erase, weight_decay=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(9, 6, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    torch.testing.assert_close(trained(torch.tensor(0.5, dtype=torch.float64)), trained(0.5), rtol=1e-12, atol=1e-14)
