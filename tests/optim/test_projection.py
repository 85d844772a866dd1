"""The memory of inputs: recursive least squares in float64, ridge regression, and what it does to old answers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nestlearn.optim import InputProjection
from nestlearn.optim.projection import ridge_projection
from nestlearn.optim.sketch import add_rows, closing


def recursive_least_squares(batches: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """The recursion as written, batch by batch from P = I."""
    projection = torch.eye(batches[0].shape[1], dtype=torch.float64)
    for x in batches:
        inner = alpha * torch.eye(len(x), dtype=torch.float64) + x @ projection @ x.T
        projection = projection - projection @ x.T @ torch.linalg.solve(inner, x @ projection)
    return projection


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [[1] * 30, [32], [5, 1, 17]])
@pytest.mark.parametrize("alpha", [1e-3, 1.0, 100.0])
def test_equals_recursive_least_squares(sizes, alpha):
    batches = [random(size, 8, seed=place) for place, size in enumerate(sizes)]
    gram = sum((x.T @ x for x in batches), torch.zeros(8, 8, dtype=torch.float64))
    torch.testing.assert_close(
        ridge_projection(gram, alpha), recursive_least_squares(batches, alpha), rtol=0, atol=1e-9
    )


def test_is_the_error_of_ridge_regression():
    """Ridge regression of targets y on x leaves the error ``y - W x``; P is that map for y = x: ``P = I - W``."""
    x, alpha = random(20, 6), 2.5
    weights = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    objective = (x - x @ weights).square().sum() + alpha * weights.square().sum()
    # Quadratic: one Newton step from anywhere, with gradient and Hessian by autograd, is its minimum.
    gradient = torch.autograd.grad(objective, weights, create_graph=True)[0]
    hessian = torch.stack([torch.autograd.grad(g, weights, retain_graph=True)[0].flatten() for g in gradient.flatten()])
    minimum = -torch.linalg.solve(hessian, gradient.detach().flatten()).view(6, 6)
    torch.testing.assert_close(ridge_projection(x.T @ x, alpha), torch.eye(6, dtype=torch.float64) - minimum)


def test_large_inputs_leave_a_projection():
    """XᵀX / α of 1e8: in float32 the identity is below the rounding errors of the sum, whose signs are any."""
    x = 1000.0 * random(10240, 4) @ random(4, 64, seed=1)  # 60 directions are empty, but for rounding
    for alpha in (100.0, torch.tensor(100.0)):
        projection = ridge_projection((x.T @ x).float(), alpha)
        assert projection.dtype == torch.float32
        values = torch.linalg.eigvalsh(projection.double())
        assert values.min() >= -1e-6 and values.max() <= 1 + 1e-6
        assert int((values < 1e-3).sum()) >= 4 and values.max() > 0.99
    assert int((torch.linalg.eigvalsh(ridge_projection(x.T @ x, 100.0)) > 0.9).sum()) == 60
    full = 1000.0 * random(10240, 64)
    values = torch.linalg.eigvalsh(ridge_projection((full.T @ full).float(), 100.0).double())
    assert values.min() >= -1e-6 and values.max() <= 1 + 1e-6


def test_half_and_single_sums_are_projected_in_float64():
    """In float32 the eigenvectors of a sum whose eigenvalues span 1e8 are wrong in the fourth digit."""
    x = random(200, 16) * torch.logspace(-2, 2, 16, dtype=torch.float64)
    gram = (x.T @ x).float()
    expected = ridge_projection(gram.double(), 0.1)
    torch.testing.assert_close(ridge_projection(gram, 0.1).double(), expected, rtol=0, atol=1e-6)


def test_inputs_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1, bias=False))
    optimizer = InputProjection(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model[1](torch.tensor([[1.0, float("inf"), 0.0]]))
    with pytest.raises(ValueError, match=r"inputs of 1 \(\(1, 3\)\).* not finite.* lower the learning rate"):
        optimizer.refresh()


class Net(nn.Module):
    """An embedding, maps with and without a bias, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.out(self.inner(torch.tanh(self.inner(x))))


def oracle_inputs(net: Net, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of inputs of each map, by hand, with the 1 of the bias; one-hot rows of the embedding."""
    with torch.no_grad():
        x = net.embed(ids).reshape(-1, 4)
        h = torch.tanh(net.inner(x))
        one = torch.ones(len(x), 1, dtype=torch.float64)
        inner = torch.cat([torch.cat([x, one], 1), torch.cat([h, one], 1)])
        return {"embed": nn.functional.one_hot(ids.reshape(-1), 7).double(), "inner": inner, "out": net.inner(h)}


@pytest.mark.parametrize("apply_to", ["update", "gradient"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_is_projected_by_all_inputs_before_the_last_refresh(apply_to, base):
    torch.manual_seed(0)
    net = Net().double()
    twin = Net().double()
    twin.load_state_dict(net.state_dict())
    alpha, period, rate = 0.7, 2, 0.05
    optimizer = InputProjection(
        base(net.parameters(), lr=rate), net, alpha=alpha, period=period, apply_to=apply_to, dtype=torch.float64
    )
    plain = base(twin.parameters(), lr=rate)
    identity = {"embed": 7, "inner": 5, "out": 4}
    applied = {name: torch.eye(size, dtype=torch.float64) for name, size in identity.items()}
    stored: dict[str, list[torch.Tensor]] = {name: [] for name in identity}
    for step in range(1, 6):
        ids = torch.randint(7, (6, 2), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(ids).square().sum().backward()
        optimizer.step()

        for name, rows in oracle_inputs(twin, ids).items():
            stored[name].append(rows)
        twin.zero_grad()
        twin(ids).square().sum().backward()
        before = {name: p.detach().clone() for name, p in twin.named_parameters()}
        change = projected(twin, {n: p.grad for n, p in twin.named_parameters()}, applied)
        if apply_to == "gradient":
            for name, p in twin.named_parameters():
                p.grad = change[name]
            plain.step()
        else:
            plain.step()
            change = projected(twin, {n: p.detach() - before[n] for n, p in twin.named_parameters()}, applied)
            with torch.no_grad():
                for name, p in twin.named_parameters():
                    p.copy_(before[name] + change[name])
        if step % period == 0:
            applied = {name: recursive_least_squares(rows, alpha) for name, rows in stored.items()}
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def projected(net: Net, change: dict[str, torch.Tensor], applied: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``D P`` of every map; the embedding's weight is transposed, as ids are one-hot inputs of ``weightᵀ``."""
    both = torch.cat([change["inner.weight"], change["inner.bias"][:, None]], 1) @ applied["inner"]
    return {
        "embed.weight": (change["embed.weight"].T @ diagonal(applied["embed"])).T,
        "inner.weight": both[:, :-1],
        "inner.bias": both[:, -1],
        "out.weight": change["out.weight"] @ applied["out"],
    }


def diagonal(projection: torch.Tensor) -> torch.Tensor:
    """One-hot inputs never share a direction: P is diagonal."""
    torch.testing.assert_close(projection, torch.diag(projection.diagonal()))
    return projection


def test_old_answers_stay_and_new_ones_are_learned():
    torch.manual_seed(1)
    layer = nn.Linear(16, 2).double()
    old, new = random(5, 16), random(5, 16, seed=1)
    optimizer = InputProjection(torch.optim.SGD(layer.parameters(), lr=0.01), layer, alpha=1e-6, dtype=torch.float64)
    layer(old)
    optimizer.refresh()
    optimizer.recording = False
    answers, targets = layer(old).detach(), random(5, 2, seed=2)
    for _ in range(1500):
        optimizer.zero_grad()
        (layer(new) - targets).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer(old), answers, atol=1e-4, rtol=0)
    assert float((layer(new) - targets).detach().abs().max()) < 1e-3


def test_stores_only_while_training():
    layer = nn.Linear(3, 1, bias=False)
    optimizer = InputProjection(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    layer.eval()(torch.ones(1, 3))
    with torch.no_grad():
        layer.train()(torch.ones(1, 3))
    optimizer.recording = False
    layer(torch.ones(1, 3))
    assert float(optimizer.state_dict()["param_groups"][0]["wrappers"][0]["maps"][0]["seen"].sum()) == 0.0
    optimizer.recording = True
    layer(torch.ones(1, 3))
    assert float(optimizer.state_dict()["param_groups"][0]["wrappers"][0]["maps"][0]["seen"].sum()) == 9.0
    optimizer.close()
    layer(torch.ones(1, 3))
    assert float(optimizer.state_dict()["param_groups"][0]["wrappers"][0]["maps"][0]["seen"].sum()) == 9.0


def test_what_a_copy_of_the_model_reads_is_not_stored():
    layer = nn.Linear(3, 1, bias=False)
    optimizer = InputProjection(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    copy.deepcopy(layer)(torch.ones(1, 3))
    assert float(optimizer.own_state()["maps"][0]["seen"].sum()) == 0.0
    layer(torch.ones(1, 3))
    assert float(optimizer.own_state()["maps"][0]["seen"].sum()) == 9.0


def test_alpha_in_steps_means_the_same_for_inputs_of_any_size_and_number():
    """α steps of average inputs: P is that of `alpha * mean square per step`, so scaling the inputs changes nothing."""
    applied = []
    for scale, rows in ((1.0, 3), (100.0, 12)):
        layer = nn.Linear(5, 2, bias=False).double()
        optimizer = InputProjection(
            torch.optim.SGD(layer.parameters(), lr=0.0), layer, alpha=7.0, unit="steps", dtype=torch.float64
        )
        x = random(3, 5, seed=4).repeat(rows // 3, 1) * scale
        for _ in range(4):
            layer(x).sum().backward()
            optimizer.step()
        optimizer.refresh()
        gram = 4 * x.T @ x
        expected = ridge_projection(gram, 7.0 * float(gram.trace()) / 5 / 4)
        applied.append(optimizer.state_dict()["param_groups"][0]["wrappers"][0]["maps"][0]["applied"])
        torch.testing.assert_close(applied[-1], expected)
    torch.testing.assert_close(*applied)
    fresh = nn.Linear(2, 2)
    empty = InputProjection(torch.optim.SGD(fresh.parameters(), lr=0.1), fresh, alpha=1.0, unit="steps")
    empty.refresh()
    torch.testing.assert_close(empty.own_state()["maps"][0]["applied"], torch.eye(3))
    with pytest.raises(ValueError, match="unit is 'rows'"):
        InputProjection(torch.optim.SGD(fresh.parameters(), lr=0.1), fresh, unit="rows")


def test_a_frozen_bias_stays():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    bias = layer.bias.clone()
    optimizer = InputProjection(torch.optim.SGD([layer.weight], lr=0.1), layer, alpha=1.0, period=1)
    for _ in range(3):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert torch.equal(layer.bias, bias)


def test_bad_settings_name_the_cause():
    layer = nn.Linear(3, 2)
    base = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"alpha is 0\.0; it must be positive"):
        InputProjection(base, layer, alpha=0.0)
    with pytest.raises(ValueError, match="apply_to is 'both'"):
        InputProjection(base, layer, apply_to="both")
    with pytest.raises(ValueError, match=r"no nn.Linear or nn.Embedding .*modules: ReLU"):
        InputProjection(base, nn.ReLU())
    with pytest.raises(ValueError, match="period is 2.5"):
        InputProjection(base, layer, period=2.5)
    optimizer, other = InputProjection(base, layer), nn.Linear(4, 2)
    bigger = InputProjection(torch.optim.SGD(other.parameters(), lr=0.1), other)
    with pytest.raises(ValueError, match=r"maps with inputs \[\(5, 5\)\]"):
        optimizer.load_own_state(bigger.own_state())


def test_leading_directions_are_exact_while_they_are_all():
    """Inputs of rank r, in batches of any size, in float64: the same projection as with the whole matrix."""
    mixing = random(5, 40, seed=9)
    sketch, gram = torch.zeros(5, 40, dtype=torch.float64), torch.zeros(40, 40, dtype=torch.float64)
    for place, size in enumerate((1, 3, 5, 23, 2)):
        rows = random(size, 5, seed=place) @ mixing
        sketch, gram = add_rows(sketch, rows), gram + rows.T @ rows
        torch.testing.assert_close(sketch.T @ sketch, gram, rtol=1e-9, atol=1e-9)
    products = sketch @ sketch.T
    assert (products - products.diagonal().diag()).abs().max() < 1e-9 * products.max()
    for alpha in (1e-3, 10.0, torch.tensor(100.0, dtype=torch.float64)):
        a = closing(sketch, alpha)
        expected = torch.linalg.inv(torch.eye(40, dtype=torch.float64) + gram / alpha)
        torch.testing.assert_close(torch.eye(40, dtype=torch.float64) - a.T @ a, expected, rtol=1e-6, atol=1e-8)


def test_leading_directions_of_more_are_those_of_the_decomposition():
    """One batch of full rank: the sketch is the truncated singular value decomposition; it never holds too much."""
    rows = random(8, 30)
    _, s, v = torch.linalg.svd(rows, full_matrices=False)
    sketch = add_rows(torch.zeros(8, 30, dtype=torch.float64), rows)
    torch.testing.assert_close(sketch.T @ sketch, v.T @ (s.square()[:, None] * v), rtol=1e-9, atol=1e-9)
    both = torch.cat([rows, random(8, 30, seed=1)])
    _, s, v = torch.linalg.svd(both, full_matrices=False)
    more = add_rows(sketch, both[8:])
    torch.testing.assert_close(more.T @ more, v[:8].T @ (s[:8].square()[:, None] * v[:8]), rtol=1e-8, atol=1e-8)
    assert torch.linalg.eigvalsh(both.T @ both - more.T @ more).min() > -1e-9


@pytest.mark.parametrize("apply_to", ["update", "gradient"])
@pytest.mark.parametrize("unit", ["squares", "steps"])
def test_low_rank_equals_the_whole_matrix_where_inputs_have_that_rank(apply_to, unit):
    def train(rank):
        torch.manual_seed(1)
        net = nn.ModuleList([nn.Linear(12, 3), nn.Linear(12, 3, bias=False)]).double()
        base = torch.optim.Adam(net.parameters(), lr=0.02)
        optimizer = InputProjection(
            base, net, alpha=0.3, period=2, unit=unit, apply_to=apply_to, rank=rank, dtype=torch.float64
        )
        for step in range(7):
            x = random(6, 3, seed=step) @ random(3, 12, seed=50)  # with the 1 of the bias of rank 4
            optimizer.zero_grad()
            (net[0](x) + net[1](x)).square().sum().backward()
            optimizer.step()
        return net, optimizer

    (whole, full), (low, optimizer) = train(None), train(4)
    for x, y in zip(whole.parameters(), low.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)
    sizes = [[m["seen"].numel() for m in o.own_state()["maps"]] for o in (full, optimizer)]
    assert sizes == [[13 * 13, 12 * 12], [4 * 13, 4 * 12]]
    assert optimizer.settings()["rank"] == 4
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="maps with inputs"):
        full.load_state_dict(state)
    again = train(4)[1]
    again.refresh()
    again.load_state_dict(state)
    for old, new in zip(optimizer.own_state()["maps"], again.own_state()["maps"], strict=True):
        assert old.keys() == new.keys() and old["refreshed"] and new["refreshed"]
        assert all(torch.equal(old[name], new[name]) for name in old if name != "refreshed")


def test_low_rank_names_inputs_that_are_not_finite_and_keeps_narrow_maps_whole():
    net = nn.Sequential(nn.Linear(9, 4), nn.Linear(4, 1))
    optimizer = InputProjection(torch.optim.SGD(net.parameters(), lr=0.1), net, rank=4)
    assert [m["seen"].shape for m in optimizer.own_state()["maps"]] == [(4, 10), (5, 5)]
    net(torch.full((2, 9), float("nan")))
    with pytest.raises(ValueError, match=r"inputs of 0 .* not finite"):
        optimizer.refresh()
    with pytest.raises(ValueError, match="rank is 0"):
        InputProjection(torch.optim.SGD(net.parameters(), lr=0.1), net, rank=0)
