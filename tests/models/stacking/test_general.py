"""The memory of general inputs: writes times P, by autograd on the plain model; answers to general text stay."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nestlearn import Level, LevelState, stack_levels
from nestlearn.continual.general import protect
from nestlearn.data import byte_tokenizer
from nestlearn.models.stacking import estimate_general, load_stacked, read_segment, write
from nestlearn.models.stacking.general import leading_directions
from nestlearn.models.stacking.network import times_open

EXACT = {"rtol": 1e-8, "atol": 1e-12}
C0 = 0.03
GENERAL = torch.tensor([[3, 9, 4, 7, 5, 3], [8, 8, 4, 5, 9, 6]])
NEW = torch.tensor([[40, 55, 31, 60, 47, 52, 33, 58]])
MAPS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def dense_projection(model, mlp: int, name: str, units: slice) -> torch.Tensor:
    """P of one map, from the inputs that a hook sees while the plain model reads."""
    seen: list[torch.Tensor] = []
    part = getattr(model.model.layers[mlp].mlp, MAPS[name])
    hook = part.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, 1)))
    model(GENERAL)
    hook.remove()
    x = torch.cat(seen)
    x = x[:, units] if name == "down" else x
    c = x.T @ x
    c = c / (c.trace() / len(c))
    return torch.linalg.inv(torch.eye(len(c), dtype=c.dtype) + c / C0)


@pytest.mark.parametrize("levels", [[Level(8, retain=1.0)], [Level(8, retain=1.0), Level(16, retain=1.0)]])
def test_whole_maps_learn_the_gradient_times_p(make, levels):
    plain, stacked = make("llama", torch.float64), stack_levels(make("llama", torch.float64), levels, mode="split")
    estimate_general(stacked, GENERAL)
    F.cross_entropy(plain(NEW).logits[0, :-1], NEW[0, 1:], reduction="sum").backward()
    state = read_segment(stacked, NEW, protect=C0).state
    size = 24 // len(levels)
    for index in range(len(levels)):
        units = slice(index * size, (index + 1) * size)
        for i, path in enumerate(stacked.stack_plan.paths):
            weights, whole, moved = {}, {}, {}
            for name, attribute in MAPS.items():
                weight = getattr(plain.model.layers[i].mlp, attribute).weight
                part = (slice(None), units) if name == "down" else (units,)
                weights[name] = weight[part].detach()
                whole[name] = weight.grad[part]
                moved[name] = whole[name] @ dense_projection(plain, i, name, units)
            size_of, typical = (sum(w.square().sum() for w in found.values()).sqrt() for found in (weights, whole))
            written = state.networks[path][index].weights.params
            for name, g in moved.items():
                torch.testing.assert_close(written[name][0], -write.STEP * size_of / typical * g, **EXACT)


def test_low_rank_maps_stay_in_the_span_of_p(make):
    plain = make("llama", torch.float64)
    stacked = stack_levels(make("llama", torch.float64), [Level(8, rank=2, lr=50)], mode="split")
    estimate_general(stacked, GENERAL)
    start = stacked.stacked_mlps()
    state = LevelState()
    for _ in range(3):
        state = read_segment(stacked, NEW, state, protect=C0).state
    for i, path in enumerate(stacked.stack_plan.paths):
        held = state.networks[path][0].weights.params
        for name in MAPS:
            p = dense_projection(plain, i, name, slice(24))
            own = torch.linalg.solve(p, held[f"{name}_A"][0], left=False)  # A' with A = A' P
            apart = own - dict(start[path].level(0).named_parameters())[f"{name}_A"]
            # A' moves by its keys alone: small against what an A outside of the span of P would need.
            assert 0 < apart.abs().max() < 1


RULES = ["descent", "momentum", "delta", "orthogonalized"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("mode", "fields"), [("split", {}), ("split", {"rank": 4}), ("add", {"hidden": 8}), ("copy", {})]
)
def test_answers_to_general_text_stay_while_new_text_is_learned(make, rule, mode, fields):
    torch.manual_seed(0)
    stacked = stack_levels(make("llama", torch.float64), [Level(8, rule=rule, lr=100, **fields)], mode=mode)
    estimate_general(stacked, GENERAL)
    moved = {}
    for c0 in (1e-6, None):
        state, losses = LevelState(), []
        for _ in range(4):
            read = read_segment(stacked, NEW, state, protect=c0)
            state, losses = read.state, [*losses, read.loss.item()]
        before, after = (stacked(GENERAL, level_state=s).logits for s in (LevelState(), state))
        moved[c0] = ((after - before).abs().max() / before.abs().max()).item()
        assert losses[-1] < losses[0], (c0, losses)
    assert moved[1e-6] < 1e-4 < 1e-3 < moved[None], moved


def test_without_general_inputs_nothing_changes(make):
    stacked = stack_levels(make("llama", torch.float64), [Level(8, rank=2)], mode="split")
    one, two = (read_segment(stacked, NEW, protect=c0).state for c0 in (C0, None))
    for path in stacked.stack_plan.paths:
        for name, w in one.networks[path][0].weights.params.items():
            assert torch.equal(w, two.networks[path][0].weights.params[name])


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_directions_that_are_left_out_count_by_their_mean(rank):
    """The closed form equals the inverse of C with the smaller eigenvalues replaced by their mean."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 12, dtype=torch.float64, generator=generator) * torch.arange(1.0, 13, dtype=torch.float64)
    c = x.T @ x
    values, vectors = torch.linalg.eigh(c / (c.trace() / 12))
    values[: 12 - rank] = values[: 12 - rank].mean() if rank < 12 else values[:0]
    p = torch.linalg.inv(torch.eye(12, dtype=torch.float64) + (vectors * values) @ vectors.T / C0)
    torch.testing.assert_close(times_open(x, leading_directions(c, rank), C0), x @ p, **EXACT)


@pytest.mark.parametrize("rank", [None, 4])
def test_a_folder_keeps_the_memory(make, tmp_path, rank):
    stacked = stack_levels(make("llama"), [Level(8, rank=2), Level(16)], mode="split")
    estimate_general(stacked, GENERAL, rank=rank)
    stacked.save_pretrained(tmp_path)
    loaded = load_stacked(tmp_path).eval()
    for c0 in (C0, 0.3, None):  # c_0 is no part of the folder
        one, two = (read_segment(m, NEW, protect=c0).state for m in (stacked, loaded))
        for path, levels in one.networks.items():
            for a, b in zip(levels, two.networks[path], strict=True):
                assert all(torch.equal(w, b.weights.params[name]) for name, w in a.weights.params.items())
    unprotected = read_segment(loaded, NEW, protect=None).state
    assert not torch.equal(*(s.networks[path][1].weights.params["up"] for s in (one, read_segment(loaded, NEW).state)))
    assert torch.equal(*(s.networks[path][1].weights.params["up"] for s in (one, unprotected)))


def test_general_text_of_the_caller_or_of_the_model(make):
    """Tokens come from all of a text; without one the model writes it, the same for a seed."""
    tokenizer = byte_tokenizer()
    stacked = stack_levels(make("llama", vocab_size=len(tokenizer)), [Level(8)], mode="split")
    found = []
    for text, seed in (("one two three " * 40, 0), ("four five six " * 40, 0), (None, 0), (None, 0), (None, 1)):
        protect(stacked, tokenizer, text, tokens=64, length=16, seed=seed)
        found.append(stacked.stacked_mlps()["model.layers.0.mlp"].level(0).general_up.clone())
    assert torch.equal(found[2], found[3])
    assert all(not torch.equal(a, b) for a, b in ((found[0], found[1]), (found[1], found[2]), (found[3], found[4])))


def test_bad_general_text(make):
    stacked, tokenizer = stack_levels(make("llama"), [Level(8)], mode="split"), byte_tokenizer()
    with pytest.raises(ValueError, match="no tokens"):
        protect(stacked, tokenizer, "")
    with pytest.raises(ValueError, match="has no levels"):
        protect(make("llama"), tokenizer, "some text")
    with pytest.raises(ValueError, match="no tokens"):
        estimate_general(stacked, GENERAL[:, :0])
    with pytest.raises(ValueError, match="0 directions"):
        estimate_general(stacked, GENERAL, rank=0)
