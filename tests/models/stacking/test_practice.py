"""Practice steps: gradients of the plain model by autograd, one memory for all rows, and every rule learns."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nestlearn import Level, LevelState, stack_levels
from nestlearn.models.stacking import estimate_general, read_segment, write
from nestlearn.models.stacking.practice import PracticeRows, end_practice, practise

from .test_general import C0, GENERAL, MAPS, dense_projection

EXACT = {"rtol": 1e-8, "atol": 1e-12}
IDS = torch.tensor([[40, 55, 31, 60, 47, 52], [33, 58, 21, 44, 0, 0]])
LEARNED = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]], dtype=torch.bool)
SHORT = PracticeRows(torch.tensor([[9, 30, 12]]), torch.tensor([[False, False, True]]), 0.5)
ROWS = PracticeRows(IDS, LEARNED)


def plain_gradients(model, batches):
    """``{(layer, map): [out, in]}`` of the weighted mean losses."""
    total = torch.zeros(())
    for ids, learned, weight in batches:
        nats = []
        for row, marks in zip(ids, learned, strict=True):
            logs = F.log_softmax(model(row[None]).logits[0], -1)
            nats += [-logs[t - 1, row[t]] for t in range(1, len(row)) if marks[t]]
        total = total + weight * torch.stack(nats).mean()
    total.backward()
    return {
        (i, name): getattr(layer.mlp, attribute).weight.grad
        for i, layer in enumerate(model.model.layers)
        for name, attribute in MAPS.items()
    }


@pytest.mark.parametrize("protect", [None, C0])
def test_a_step_is_the_gradient_of_the_weighted_losses(make, protect):
    plain = make("llama", torch.float64)
    stacked = stack_levels(make("llama", torch.float64), [Level(8, lr=2.0)], mode="split")
    estimate_general(stacked, GENERAL)
    gradients = plain_gradients(plain, [ROWS, SHORT])
    state, losses = practise(stacked, [ROWS, SHORT], lr=3.0, protect=protect)
    assert len(losses) == 2
    for i, path in enumerate(stacked.stack_plan.paths):
        maps = {name: getattr(plain.model.layers[i].mlp, attribute).weight for name, attribute in MAPS.items()}
        opened = {}
        for name in MAPS:
            opened[name] = gradients[i, name]
            if protect is not None:
                opened[name] = opened[name] @ dense_projection(plain, i, name, slice(24))
        size = sum(w.detach().square().sum() for w in maps.values()).sqrt()
        norm = sum(g.square().sum() for g in opened.values()).sqrt()
        written = state.networks[path][0].weights
        for name, g in opened.items():
            torch.testing.assert_close(written.params[name][0], -6.0 * write.STEP * size / norm * g, **EXACT)
            assert torch.equal(written.params[name], written.anchor[name])


RULES = ["descent", "momentum", "orthogonalized"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("mode", "fields"), [("split", {}), ("split", {"rank": 4}), ("add", {"hidden": 40})])
def test_every_rule_learns_and_leaves_general_text_alone(make, rule, mode, fields):
    levels = [Level(8, rule=rule, lr=100, retain=1.0, **fields)]
    stacked = stack_levels(make("llama", torch.float64), levels, mode=mode)
    estimate_general(stacked, GENERAL)
    moved = {}
    for c0 in (1e-6, None):
        state, found = LevelState(), []
        for _ in range(6):
            state, losses = practise(stacked, [ROWS], state, protect=c0)
            found += losses
        before, after = (stacked(GENERAL, level_state=s).logits for s in (LevelState(), state))
        moved[c0] = ((after - before).abs().max() / before.abs().max()).item()
        assert found[-1] < found[0] - 0.05, found
    assert moved[1e-6] < 1e-3 < moved[None], moved


@pytest.mark.parametrize("rule", RULES)
def test_padding_and_the_order_of_rows_change_nothing(make, rule):
    stacked = stack_levels(make("llama", torch.float64), [Level(8, rule=rule, rank=2)], mode="split")
    state, _ = practise(stacked, [ROWS])
    padded = PracticeRows(F.pad(IDS, (0, 3), value=5).flip(0), F.pad(LEARNED, (0, 3)).flip(0))
    for before in (None, state):
        one, first = practise(stacked, [ROWS], before)
        two, second = practise(stacked, [padded], before)
        assert first == pytest.approx(second, rel=1e-12)
        for path in stacked.stack_plan.paths:
            for name, w in one.networks[path][0].weights.params.items():
                torch.testing.assert_close(two.networks[path][0].weights.params[name], w, **EXACT)


def test_retention_acts_once_and_the_given_state_stays(make):
    stacked = stack_levels(make("llama", torch.float64), [Level(8, retain=0.25, lr=100)], mode="split")
    state = read_segment(stacked, torch.arange(20, 28)[None]).state
    path = stacked.stack_plan.paths[0]
    held = {name: w.clone() for name, w in state.networks[path][0].weights.params.items()}
    after, _ = practise(stacked, [ROWS], state, lr=1e-9)
    for name, w in held.items():
        assert torch.equal(state.networks[path][0].weights.params[name], w)
        torch.testing.assert_close(after.networks[path][0].weights.params[name], 0.25 * w, rtol=1e-6, atol=1e-9)
    assert after.tokens == state.tokens


def test_a_level_goes_on_reading_after_practice(make):
    stacked = stack_levels(make("llama", torch.float64), [Level(8, lr=50), Level(16, lr=50)], mode="split")
    state, _ = practise(stacked, [ROWS])
    read = read_segment(stacked, torch.arange(20, 28)[None], state)
    assert read.state.tokens == 8 and read.loss.isfinite().all()


def test_the_rest_of_a_momentum_is_written_at_the_end(make):
    """What steps without a gradient would write, for ever."""
    levels = [Level(8, rule="momentum", momentum=0.5, retain=1.0, rank=2), Level(16, rule="orthogonalized", rank=2)]
    stacked = stack_levels(make("llama", torch.float64), levels, mode="split")
    state, _ = practise(stacked, [ROWS], read_segment(stacked, torch.arange(20, 28)[None]).state)
    path = stacked.stack_plan.paths[0]
    (one, two), (ended, other) = (s.networks[path] for s in (state, end_practice(state, levels)))
    algorithm, beta = stacked.stacked_mlps()[path].level(0).memory.algorithm, torch.tensor(0.5)
    for name, w in one.weights.params.items():
        carried = (one.weights.momentum[name],)
        for _ in range(60):
            change, carried = algorithm.step(carried, torch.zeros_like(w), torch.ones(()), beta)
            w = w + change
        torch.testing.assert_close(ended.weights.params[name], w, **EXACT)
        assert not torch.equal(w, one.weights.params[name])
        assert torch.equal(two.weights.params[name], other.weights.params[name])
    assert not any(s.any() for level in (ended, other) for s in level.weights.momentum.values())


def test_what_cannot_be_practised_is_refused(make):
    stacked = stack_levels(make("llama"), [Level(8)], mode="split")
    with pytest.raises(ValueError, match="no learned token"):
        practise(stacked, [PracticeRows(IDS, torch.zeros_like(LEARNED))])
    two = read_segment(stacked, torch.arange(20, 36).view(2, 8)).state
    with pytest.raises(ValueError, match="holds 2 rows"):
        practise(stacked, [ROWS], two)
    with pytest.raises(ValueError, match="training mode"):
        practise(stacked.train(), [ROWS])
    erasing = stack_levels(make("llama"), [Level(8, rule="delta")], mode="split")
    with pytest.raises(ValueError, match="cannot practise"):
        practise(erasing, [ROWS])


def test_rows_of_a_keep_their_norm_under_general_inputs(make):
    stacked = stack_levels(make("llama", torch.float64), [Level(8, rank=3)], mode="split")
    estimate_general(stacked, GENERAL)
    for module in stacked.stacked_mlps().values():
        level = module.level(0)
        for name, a in level().items():
            start = level.initial(a, C0)[name]
            torch.testing.assert_close(start.norm(dim=1), a.norm(dim=1))
            opened = level.open_part(name, a, C0)
            torch.testing.assert_close(F.cosine_similarity(start, opened), torch.ones(3, dtype=a.dtype))
            assert (opened.norm(dim=1) < 0.9 * a.norm(dim=1)).any()
