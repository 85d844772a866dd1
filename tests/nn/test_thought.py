"""The Continuous Thought Machine against a loop over ticks, rows, neurons and pairs, written from the formulas."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import Gates, catalog, scan
from nestlearn.nn import ContinuousThought, ContinuousThoughtConfig, certainty_of, ticks_loss
from nestlearn.nn.state import flatten_state, index_rows, reset_rows, unflatten_state
from nestlearn.nn.thought.loss import tick_losses
from nestlearn.nn.thought.synchronization import Synchronization, draw_pairs

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
SIZES: dict[str, Any] = {
    "classes": 3, "answers": 2, "neurons": 7, "ticks": 5, "memory_length": 3, "neuron_width": 2, "query_pairs": 9,
    "output_pairs": 5, "attention_width": 6, "num_heads": 2, "synapse_layers": 2,
}  # fmt: skip


def make(**changes) -> ContinuousThought:
    """A small float64 machine in which every parameter matters."""
    torch.manual_seed(0)
    machine = ContinuousThoughtConfig(**(SIZES | changes)).build(4).double()
    with torch.no_grad():
        for parameter in machine.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return machine


def inputs(rows: int = 3, tokens: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normed(norm: Any, u: Tensor) -> Tensor:
    centered = u - u.mean()
    return centered / (centered.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def gated(u: Tensor) -> Tensor:
    half = len(u) // 2
    return u[:half] * torch.sigmoid(u[half:])


def attend(machine: Any, query: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What one query reads from the tokens ``[t, d]``, and the weights of every head."""
    part, width = machine.attention, machine.config.attention_width
    d = width // machine.config.num_heads
    q = part.q.weight @ query + part.q.bias
    kv = [part.kv.weight @ normed(part.norm, token) for token in x]
    heads, weights = [], []
    for h in range(machine.config.num_heads):
        own = slice(h * d, (h + 1) * d)
        scores = torch.stack([q[own] @ token[:width][own] / math.sqrt(d) for token in kv])
        weights.append(scores.exp() / scores.exp().sum())
        heads.append(sum(w * token[width:][own] for w, token in zip(weights[-1], kv, strict=True)))
    return part.out.weight @ torch.cat(heads), torch.stack(weights)


def loop(machine: Any, x: Tensor, ticks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row ``[t, d]``: logits and attention of every tick, and the state after the last."""
    config, part, sync = machine.config, machine.networks, machine.synchronization
    r = [1 / (1 + torch.exp(-logit)) for logit in sync.decay]
    pairs = draw_pairs(config.neurons, config.query_pairs + config.output_pairs, config.pair_seed)
    z, a = machine.start_z, [list(row) for row in machine.start_history]
    past, outputs, weights = [z], [], []

    def synchronized(p: int) -> Tensor:
        i, j = pairs[p]
        ages = range(len(past) - 1, -1, -1)
        products = sum(r[p] ** age * then[i] * then[j] for age, then in zip(ages, past, strict=True))
        return products / sum(r[p] ** age for age in ages) ** 0.5

    for _ in range(ticks):
        seen, w = attend(machine, torch.stack([synchronized(p) for p in range(config.query_pairs)]), x)
        u = torch.cat([seen, z])
        for linear, norm in zip(machine.synapses.maps, machine.synapses.norms, strict=True):
            u = normed(norm, gated(linear.weight @ u + linear.bias))
        fresh = []
        for d in range(config.neurons):
            a[d] = [*a[d], u[d]]
            hidden = gated(torch.stack(a[d][-config.memory_length :]) @ part.inner[d] + part.inner_bias[d, 0])
            fresh.append(gated(hidden @ part.outer[d] + part.outer_bias[d, 0])[0])
        z = torch.stack(fresh)
        past.append(z)
        s = torch.stack([synchronized(config.query_pairs + p) for p in range(config.output_pairs)])
        outputs.append((machine.head.weight @ s + machine.head.bias).view(config.answers, config.classes))
        weights.append(w)
    return (
        torch.stack(outputs),
        torch.stack(weights),
        z,
        torch.stack([torch.stack(row[len(row) - config.memory_length + 1 :] or [z[:0]]) for row in a]),
    )


def written_loss(outputs: Any, targets: Any) -> Any:
    """The loss of one row from its formula."""
    p = outputs.exp() / outputs.exp().sum(-1, keepdim=True)
    losses = torch.stack([torch.stack([-q[n, c].log() for n, c in enumerate(targets)]).mean() for q in p])
    certainty = [1 + (tick * tick.log()).sum().item() / len(tick) / math.log(p.shape[-1]) for tick in p]
    best, sure = min(range(len(p)), key=lambda k: losses[k].item()), max(range(len(p)), key=lambda k: certainty[k])
    return (losses[best] + losses[sure]) / 2


@pytest.mark.parametrize("changes", [{}, {"synapse_layers": 1, "memory_length": 1, "num_heads": 1, "answers": 1}])
def test_equals_the_loop_over_ticks_with_all_gradients(changes):
    machine, x = make(**changes), inputs().requires_grad_()
    targets = torch.tensor([[0, 2], [1, 1], [2, 0]])[:, : machine.config.answers]
    thoughts, state = machine(x)
    rows = [loop(machine, row, machine.config.ticks) for row in x]
    close(thoughts.outputs, torch.stack([row[0] for row in rows]))
    close(thoughts.attention, torch.stack([row[1] for row in rows]))
    close(state.z, torch.stack([row[2] for row in rows]))
    close(state.history, torch.stack([row[3] for row in rows]).view_as(state.history))
    assert torch.equal(thoughts.activity[:, -1], state.z)
    ours = ticks_loss(thoughts.outputs, targets)
    written = torch.stack([written_loss(row[0], y) for row, y in zip(rows, targets, strict=True)]).mean()
    close(ours, written)
    wanted = [x, *(p for p in machine.parameters() if p.numel())]  # with M = 1 there is no past to start from
    for a, b in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(written, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
        assert a.abs().max() > 0


def synchronization_of(z: Tensor, r: Tensor, pairs: Tensor, engine: Any) -> Tensor:
    """S after every tick from the package's memories: one 1 x 1 memory per pair for A, and one for B."""
    key, value = (z[:, :, places].permute(0, 2, 1).unsqueeze(-1) for places in pairs)
    gates = Gates(lr=torch.ones_like(key[..., 0]), retain=r[:, None].expand(key.shape[:-1]))
    memory, one = catalog["retnet"], torch.ones_like(key)
    products, _ = scan(memory, None, one, key, value, gates, engine=engine)
    ticks, _ = scan(memory, None, one, one, one, gates, engine=engine)
    return (products / ticks.sqrt()).squeeze(-1).mT


@pytest.mark.parametrize("engine", ["reference", "chunked"])
def test_synchronization_is_a_hebbian_memory_with_one_decay_per_pair(engine):
    pairs = draw_pairs(6, 13, seed=2)
    part = Synchronization(pairs, 30.0).double()
    z = torch.randn(2, 17, 6, dtype=torch.float64, requires_grad=True)
    state, read = part.init_state(z[:, 0]), []
    for tick in z.unbind(1):
        s, state = part(state, tick, part.places(z.device))
        read.append(s)
    ours = torch.stack(read, 1)
    expected = synchronization_of(z, part.retained(z.dtype), torch.tensor(pairs).T, engine)
    close(ours, expected)
    weight = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((s * weight).sum(), [z, part.decay]) for s in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert a.abs().sum() > 0


def test_the_synchronization_of_a_machine_is_that_memory_over_its_activity():
    machine, x = make(), inputs()
    thoughts, state = machine(x)
    z = torch.cat([machine.start_z.expand(3, 1, -1), thoughts.activity], 1)
    part = machine.synchronization
    s = synchronization_of(z, part.retained(z.dtype), part.places(z.device), "chunked")
    close(part.read(state.synchronization), s[:, -1])
    y = machine.head(s[:, 1:, machine.config.query_pairs :]).view_as(thoughts.outputs)
    close(thoughts.outputs, y)


def test_a_tick_writes_and_old_ticks_fade():
    part = Synchronization([(0, 1), (0, 0)], 4.0).double()
    z = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    state = part.init_state(z)
    for _ in range(3):
        _, state = part(state, z, part.places(z.device))
    r = part.retained(z.dtype).detach()
    torch.testing.assert_close(state.products[0], (1 + r + r**2) * torch.tensor([6.0, 4.0]).double())
    assert r.tolist() == pytest.approx([0.5, 0.75])  # horizons of 2 and of 4 ticks


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 4], [6, 1]])
def test_any_split_of_the_ticks(sizes):
    machine, x = make(), inputs()
    whole, end = machine(x, ticks=7)
    parts, state = [], None
    for size in sizes:
        thoughts, state = machine(x, state, ticks=size)
        parts.append(thoughts)
    for name in ("outputs", "certainty", "attention", "activity"):
        joined = torch.cat([getattr(part, name) for part in parts], 1)
        close(joined, getattr(whole, name))
    tensors, spec = flatten_state(state)
    again = unflatten_state(tensors, spec)
    for a, b in zip(tensors.values(), flatten_state(end)[0].values(), strict=True):
        close(a, b)
    close(machine(x, again, ticks=1)[0].outputs, machine(x, end, ticks=1)[0].outputs)


def test_rows_are_independent_and_padding_changes_nothing():
    machine, x = make(), inputs()
    lengths = torch.tensor([5, 2, 4])
    mask = torch.arange(5) < lengths[:, None]
    padded = torch.where(mask[..., None], x, torch.nan)
    thoughts, state = machine(padded, mask=mask)
    for row, length in enumerate(lengths.tolist()):
        alone, end = machine(x[row : row + 1, :length])
        close(thoughts.outputs[row], alone.outputs[0])
        close(thoughts.attention[row, ..., :length], alone.attention[0])
        assert (thoughts.attention[row, ..., length:] == 0).all()
        close(state.z[row], end.z[0])


def test_a_row_without_tokens_reads_nothing_and_has_finite_gradients():
    machine, x = make(), inputs(2)
    mask = torch.tensor([[True] * 5, [False] * 5])
    thoughts, _ = machine(x, mask=mask)
    assert (thoughts.attention[1] == 0).all()
    thoughts.outputs.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in machine.parameters())


def test_rows_can_be_reset_and_reordered():
    machine, x = make(), inputs()
    _, state = machine(x)
    rows = torch.tensor([False, True, False])
    mixed, _ = machine(x, reset_rows(state, machine.init_state(1), rows))
    close(mixed.outputs[1], machine(x)[0].outputs[1])
    close(mixed.outputs[0], machine(x, state)[0].outputs[0])
    order = torch.tensor([2, 0])
    turned, _ = machine(x[order], index_rows(state, order))
    close(turned.outputs, machine(x, state)[0].outputs[order])


def test_a_thought_goes_on_over_another_input():
    machine, x = make(), inputs()
    _, state = machine(x)
    other = inputs(tokens=2, seed=8)
    assert not torch.allclose(machine(other, state)[0].outputs, machine(other)[0].outputs)


def test_half_precision_keeps_the_synchronization_wide():
    machine = make().bfloat16()
    thoughts, state = machine(inputs().bfloat16())
    assert thoughts.outputs.dtype == torch.bfloat16 and thoughts.outputs.isfinite().all()
    assert state.synchronization.products.dtype == torch.float32


# -- loss and halting ------------------------------------------------------------------------------------------------


def test_certainty_is_one_minus_normalized_entropy():
    p = torch.tensor([[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    entropy = 1.5 * math.log(2)  # of the first answer; that of the second is 0
    expected = torch.tensor([1 - entropy / 2 / math.log(3)], dtype=torch.float64)
    torch.testing.assert_close(certainty_of(p.clamp(min=1e-300).log()), expected)


def test_the_loss_takes_two_ticks_of_each_row():
    """Row 0: least loss at tick 0, most certain at 1. Row 1: both at tick 2."""
    outputs = torch.tensor(
        [[[[0.5, 0.0]], [[0.0, 4.0]], [[0.0, 1.0]]], [[[0.0, 1.0]], [[0.0, 0.0]], [[3.0, 0.0]]]], requires_grad=True
    )
    targets = torch.zeros(2, 1, dtype=torch.long)
    losses = F.cross_entropy(outputs[:, :, 0].flatten(0, 1), torch.zeros(6, dtype=torch.long), reduction="none")
    expected = (losses[0] + losses[1] + 2 * losses[5]) / 4
    loss = ticks_loss(outputs, targets)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert (gradient.abs().sum((2, 3)) > 0).tolist() == [[True, True, False], [False, False, True]]


def test_ignored_answers_do_not_count():
    outputs = torch.randn(2, 4, 3, 5)
    targets = torch.tensor([[1, -100, 4], [-100, -100, -100]])
    losses = tick_losses(outputs, targets)
    torch.testing.assert_close(losses[0], tick_losses(outputs[:1, :, ::2], targets[:1, ::2])[0])
    assert (losses[1] == 0).all()


def halting_machine() -> ContinuousThought:
    """A machine whose rows are certain at different ticks."""
    machine = make(ticks=12)
    with torch.no_grad():
        for weight in (machine.head.weight, machine.networks.inner, machine.networks.outer):
            weight.mul_(3)
    return machine


@pytest.mark.parametrize("share", [None, 0.8, 1.0])
def test_a_row_stops_when_it_is_certain_and_keeps_its_answer(share):
    """The threshold is such that this share of all ticks is below it; None is a threshold of 0."""
    machine, x = halting_machine(), inputs(rows=9)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 5, 4, 4, 5, 2])[:, None]
    with torch.no_grad():
        thoughts, _ = machine(x, mask=mask)
    threshold = 0.0 if share is None else 1.0 if share == 1 else thoughts.certainty.quantile(share).item()
    found = machine.answer(x, mask, threshold=threshold)
    stops = []
    for row in range(9):
        certain = (thoughts.certainty[row] >= threshold).nonzero()
        stop = int(certain[0]) if len(certain) else 11
        chosen = stop if len(certain) else int(thoughts.certainty[row].argmax())
        stops.append(stop + 1)
        close(found.outputs[row], thoughts.outputs[row, chosen])
        close(found.certainty[row], thoughts.certainty[row, chosen])
    assert found.ticks.tolist() == stops
    assert set(stops) == {1} if share is None else max(stops) == 12
    assert share != 0.8 or len(set(stops)) > 2


def test_a_stopped_row_is_not_computed_further(monkeypatch):
    machine, x, seen = halting_machine(), inputs(rows=9), []
    threshold = machine(x)[0].certainty.quantile(0.8).item()
    forward = machine.networks.forward
    monkeypatch.setattr(machine.networks, "forward", lambda h: seen.append(len(h)) or forward(h))
    found = machine.answer(x, threshold=threshold)
    assert seen == [int((found.ticks >= tick).sum()) for tick in range(1, len(seen) + 1)]
    assert seen[-1] < 9


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ticks": 0}, "ticks=0 must be an integer of at least 1"),
        ({"memory_length": 0}, "memory_length=0 must be"),
        ({"query_pairs": 0}, "query_pairs=0 must be"),
        ({"output_pairs": 2.5}, "output_pairs=2.5 must be"),
        ({"query_pairs": 24}, r"query_pairs=24 \+ output_pairs=5 are more than the 28 pairs of neurons=7"),
        ({"num_heads": 4}, "attention_width=6 is not divisible by num_heads=4"),
        ({"classes": 1}, "classes=1 must be an integer of at least 2"),
        ({"neurons": True}, "neurons=True must be"),
    ],
)
def test_bad_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        ContinuousThoughtConfig(**(SIZES | changes))


def test_an_odd_number_of_pairs_and_all_pairs_fit():
    machine = make(query_pairs=23, output_pairs=5)
    part = machine.synchronization
    assert len(set(zip(part.left, part.right, strict=True))) == 28
    assert machine(inputs())[0].outputs.isfinite().all()


def test_pairs_are_drawn_from_the_seed():
    assert draw_pairs(50, 20, 3) == draw_pairs(50, 20, 3) != draw_pairs(50, 20, 4)


def test_bad_calls():
    machine: Any = make()
    x = inputs()
    _, state = machine(x)
    with pytest.raises(TypeError, match="list.*unequal length.*pad_sequence"):
        machine([x[0], x[1, :2]])
    with pytest.raises(TypeError, match="floating-point"):
        machine(torch.ones(1, 2, 4, dtype=torch.long))
    for wrong in (x[..., :3], x[:, :0], x[0]):
        with pytest.raises(ValueError, match=r"expected x of shape \[batch, tokens >= 1, 4\]"):
            machine(wrong)
    for mask in (torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 5)):
        with pytest.raises(ValueError, match=r"mask must be bool of shape \(3, 5\)"):
            machine(x, mask=mask)
    for ticks in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="ticks=.*at least 1"):
            machine(x, ticks=ticks)
        with pytest.raises(ValueError, match="ticks=.*at least 1"):
            machine.answer(x, ticks=ticks)
    with pytest.raises(ValueError, match="the state has 3 rows.*x has 2 rows"):
        machine(x[:2], state)
    with pytest.raises(ValueError, match=r"history of \(7, 2\).*history of \(7, 3\)"):
        make(memory_length=4)(x, state)
    for threshold in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="must be a certainty"):
            machine.answer(x, threshold=threshold)
    with pytest.raises(ValueError, match="d_input=0 must be the width"):
        ContinuousThoughtConfig(classes=2).build(0)
    with pytest.raises(ValueError, match=r"targets \[rows, answers\], got \(3, 5, 2, 3\) and \(3, 5\)"):
        ticks_loss(machine(x)[0].outputs, torch.zeros(3, 5, dtype=torch.long))
