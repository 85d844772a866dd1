"""What levels learn from the loss: equality with dense autograd, independent rows, clocks, and outer gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from nestlearn import Level, LevelState, stack_levels
from nestlearn.memory import Factor
from nestlearn.models.stacking import SegmentRow, estimate_general, read_segment, read_segments, write
from nestlearn.nn.cms.tape import write as write_dense
from nestlearn.nn.state import tensors_of

EXACT = {"rtol": 1e-9, "atol": 1e-11}
LEVELS = [Level(4, lr=28, retain=1.0), Level(8, lr=12, retain=1.0), Level(None)]
UNITS = {"split": [range(8), range(8, 16), range(16, 24)], "copy": [range(24)] * 3}
NAMES = {"llama": ("gate_proj", "up_proj", "down_proj"), "gpt2": (None, "c_fc", "c_proj")}


# ---------------------------------------------------------------------------------------------------- the oracle


class Oracle:
    """One row of a plain model whose MLPs are replaced by formulas over dense level weights, learned by autograd.

    It shares nothing with the library: whole gradients of all level weights, one level after the other.
    """

    def __init__(self, model, stacked, family: str, mode: str) -> None:
        self.model, self.mode, self.keys = model, mode, None
        self.mlps = [layer.mlp for layer in (model.model.layers if family == "llama" else model.transformer.h)]
        own = [layer.mlp for layer in (stacked.model.layers if family == "llama" else stacked.transformer.h)]
        self.gate, self.up, self.down = NAMES[family]
        self.initial = [[self._start(i, level, own[i]) for level in range(3)] for i in range(len(self.mlps))]
        self.params = copy.deepcopy(self.initial)  # with everything written
        self.anchor = copy.deepcopy(self.initial)  # what is read
        self.squares: list[list[list[Tensor]]] = [[[], [], []] for _ in self.mlps]
        self.clock = 0
        for i, mlp in enumerate(self.mlps):
            mlp.register_forward_hook(lambda module, args, output, i=i: self._formula(i, args[0], output))

    def _weight(self, mlp, name: str) -> Tensor:
        weight = getattr(mlp, name).weight.detach()
        return weight.T if type(getattr(mlp, name)).__name__ == "Conv1D" else weight

    def _bias(self, mlp, name: str) -> Tensor:
        bias = getattr(mlp, name).bias
        return torch.zeros(()) if bias is None else bias.detach()

    def _start(self, i: int, level: int, own) -> dict[str, Tensor]:
        if self.mode == "add":
            return {name: p.detach().clone() for name, p in own.levels[level].named_parameters()}
        part, names = UNITS[self.mode][level], {"gate": self.gate, "up": self.up, "down": self.down}
        whole = {name: self._weight(self.mlps[i], attribute) for name, attribute in names.items() if attribute}
        return {name: (w[:, part] if name == "down" else w[part]).clone() for name, w in whole.items()}

    def _formula(self, i: int, x: Tensor, output: Tensor) -> Tensor:
        mlp, total = self.mlps[i], 0
        act = mlp.act_fn if self.gate else mlp.act
        for level, w in enumerate(self.now[i]):
            part = UNITS.get(self.mode, [()] * 3)[level]
            biases = {
                name: 0 if self.mode == "add" or not attribute else self._bias(mlp, attribute)
                for name, attribute in (("gate", self.gate), ("up", self.up))
            }
            cut = {n: b[part] if isinstance(b, Tensor) and b.dim() else b for n, b in biases.items()}
            h = x @ w["up"].T + cut["up"]
            h = act(x @ w["gate"].T + cut["gate"]) * h if self.gate else act(h)
            total = total + h @ w["down"].T
        if self.mode == "add":
            return output + total
        return total / (3 if self.mode == "copy" else 1) + self._bias(mlp, self.down)

    def read(self, ids: Tensor, period_of_segment: int = 4) -> Tensor:
        """Logits of a segment ``[t]``, which is then learned from."""
        self.now = [[{n: w.clone().requires_grad_() for n, w in level.items()} for level in mlp] for mlp in self.anchor]
        cache = DynamicCache(self.keys) if self.keys else DynamicCache()
        logits = self.model(ids[None], past_key_values=cache, use_cache=True).logits[0]
        self.keys = tuple((layer.keys.detach(), layer.values.detach()) for layer in cache.layers)
        if len(ids) > 1:
            loss = F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
            for i in range(len(self.mlps)):
                for level, spec in enumerate(LEVELS):
                    if spec.period is not None:
                        self._learn(i, level, spec, loss)
            self.clock += period_of_segment
            for i in range(len(self.mlps)):
                for level, spec in enumerate(LEVELS):
                    if spec.period is not None and self.clock % spec.period == 0:
                        self.anchor[i][level] = dict(self.params[i][level])
        return logits.detach()

    def _learn(self, i: int, level: int, spec: Level, loss: Tensor) -> None:
        weights = self.now[i][level]
        gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        history = self.squares[i][level]
        history.append(sum((g * g).sum() for g in gradients))
        decay = write.ENERGY_DECAY
        ages = [decay ** (len(history) - 1 - k) for k in range(len(history))]
        typical = (sum(a * s for a, s in zip(ages, history, strict=True)) / sum(ages)) ** 0.5
        size = 0
        for name, w in self.initial[i][level].items():
            if self.mode == "add" and name == "down":
                size = size + (self._weight(self.mlps[i], self.down) ** 2).mean() * w.numel()
            else:
                size = size + (w**2).sum()
        step = spec.lr * write.STEP * size**0.5 / typical
        for (name, w), g in zip(list(self.params[i][level].items()), gradients, strict=True):
            self.params[i][level][name] = w - step * g


@pytest.mark.parametrize("mode", ["split", "copy", "add"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_dense_autograd_row_by_row(make, ids, family, mode):
    model = make(family, torch.float64)
    stacked = stack_levels(make(family, torch.float64), LEVELS, mode=mode)
    oracles = [Oracle(copy.deepcopy(model), stacked, family, mode) for _ in ids]
    parts = [ids[:, a:b] for a, b in ((0, 4), (4, 8), (8, 12), (12, 14), (12, 16), (2, 6))]  # one of them short
    state, keys = LevelState(), ()
    for part in parts:
        expected = torch.stack([oracle.read(row) for oracle, row in zip(oracles, part, strict=True)])
        logits, keys, state, _ = read_segment(stacked, part, state, keys)
        torch.testing.assert_close(logits, expected, **EXACT)
    for row, oracle in enumerate(oracles):
        for i, path in enumerate(stacked.stack_plan.paths):
            for level, held in enumerate(state.networks[path]):
                if held is None:
                    continue
                for name, change in held.weights.params.items():
                    start = oracle.initial[i][level][name]
                    torch.testing.assert_close(start + change[row], oracle.params[i][level][name], **EXACT)
                    read = start + held.weights.anchor[name][row]
                    torch.testing.assert_close(read, oracle.anchor[i][level][name], **EXACT)
    start, end = oracles[0].initial[0][0], oracles[0].params[0][0]
    assert min((end[name] - w).abs().max() for name, w in start.items()) > 1e-4


# ------------------------------------------------------------------------------------------------------ properties


RULES = ["descent", "momentum", "delta", "orthogonalized"]


def read(model, ids, state=None, size=4, **kwargs):
    keys, logits, losses = (), [], []
    for part in ids.split(size, 1):
        found = read_segment(model, part, state, keys, **kwargs)
        keys, state = found.keys, found.state
        logits.append(found.logits)
        losses.append(found.loss)
    return torch.cat(logits, 1), state, torch.stack(losses).sum(0)


def weights(state: LevelState) -> list[Tensor]:
    return [w for levels in state.networks.values() for x in levels if x for w in x.weights.params.values()]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("rule", RULES)
def test_rows_are_independent(make, ids, rule, rank):
    model = make("qwen3", torch.float64)
    stack_levels(model, [Level(4, rule=rule, lr=20, rank=rank), Level(8, rule=rule, lr=20)], mode="split")
    both, state, _ = read(model, ids)
    for row in range(2):
        alone, own, _ = read(model, ids[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], alone, **EXACT)
        for a, b in zip(weights(state.index_rows([row])), weights(own), strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    other = ids.clone()
    other[1] = other[1].flip(0)
    changed, _, _ = read(model, other)
    assert torch.equal(changed[0], both[0]) and not torch.equal(changed[1], both[1])


@pytest.mark.parametrize("rule", RULES)
def test_a_level_changes_at_the_end_of_its_periods_only(make, ids, rule):
    model = make("llama", torch.float64)
    stack_levels(model, [Level(4, rule=rule), Level(12, rule=rule)], mode="split")
    state, keys, seen = LevelState(), (), []
    for part in ids.split(4, 1):
        _, keys, state, _ = read_segment(model, part, state, keys)
        levels = state.networks["model.layers.0.mlp"]
        seen.append([x.weights.anchor["up"].clone() for x in levels if x])
    assert seen[0][0].any() and not torch.equal(seen[0][0], seen[1][0])
    assert not seen[0][1].any() and not seen[1][1].any()
    assert seen[2][1].any() and torch.equal(seen[3][1], seen[2][1])


@pytest.mark.parametrize("rule", RULES)
def test_the_last_segment_of_a_document_counts_as_a_whole_one(make, ids, rule):
    model = make("llama", torch.float64)
    stack_levels(model, [Level(4, rule=rule), Level(8, rule=rule)], mode="split")
    _, keys, state, _ = read_segment(model, ids[:, :4])
    short = read_segment(model, ids[:, 4:6], state, keys).state
    assert short.tokens == 8
    for level in short.networks["model.layers.1.mlp"]:
        assert level is not None and level.weights.position.tolist() == [0, 0]
        for name, w in level.weights.params.items():
            assert torch.equal(level.weights.anchor[name], w)
            before = state.networks["model.layers.1.mlp"][0 if level is short.networks["model.layers.1.mlp"][0] else 1]
            assert before is not None and not torch.equal(w, before.weights.params[name])
    single = read_segment(model, ids[:, 4:5], state, keys).state
    assert single.tokens == 4 and all(torch.equal(a, b) for a, b in zip(weights(single), weights(state), strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_reading_learns(make, rule):
    """A repeated text is predicted better, in a fresh context too."""
    model = make("llama")
    text = torch.randint(3, 61, (1, 32), generator=torch.Generator().manual_seed(1))
    stack_levels(model, [Level(8, rule=rule, lr=4), Level(32, rule=rule, lr=4)], mode="split")
    state, first = None, None
    for _ in range(6):
        _, state, loss = read(model, text, state, size=8)
        first = loss if first is None else first
    _, _, after = read(model, text, state, size=8, writes=False)
    assert after < first - 0.5


def test_inference_mode_learns_the_same(make, ids):
    model = stack_levels(make("llama"), LEVELS, mode="split")
    _, expected, _ = read(model, ids)
    with torch.inference_mode():
        _, state, _ = read(model, ids.clone())
    with torch.no_grad():
        _, other, _ = read(model, ids)
    for a, b, c in zip(weights(expected), weights(state), weights(other), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and not b.requires_grad and not b.is_inference()


def test_half_precision_models_learn_in_float32(make, ids):
    model = stack_levels(make("llama", torch.bfloat16), LEVELS, mode="split")
    logits, state, _ = read(model, ids)
    assert logits.dtype == torch.bfloat16 and all(w.dtype == torch.float32 for w in weights(state))
    assert logits.isfinite().all()


def test_clip_bounds_a_write(make, ids):
    def moved(clip):
        model = make("llama", torch.float64)
        stack_levels(model, [Level(4, clip=clip)], mode="split", layers=[0])
        _, state, _ = read(model, ids[:, :4])
        changes = state.networks["model.layers.0.mlp"][0].weights.params
        return sum(w.square().sum((1, 2)) for w in changes.values()).sqrt()

    free = moved(None)
    torch.testing.assert_close(moved(1e9), free, **EXACT)
    assert (moved(1e-3) < 0.01 * free).all()


@pytest.mark.parametrize("meta", ["first", "second"])
def test_outer_gradients_reach_the_initial_weights(make, ids, meta):
    """Of what is predicted after a write; second order against finite differences."""
    model = make("llama", torch.float64)
    stack_levels(model, [Level(4, lr=80)], mode="split", layers=[1])
    weight = model.model.layers[1].mlp.up_proj.weight

    def outer():
        keys, state = (), None
        for part in ids[:, :8].split(4, 1):
            found = read_segment(model, part, state, keys, meta=meta)
            keys, state = found.keys, found.state
        return found.loss.sum()

    (gradient,) = torch.autograd.grad(outer(), weight)
    assert gradient.abs().max() > 0
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * 1e-5 * direction)
        values.append(outer().detach())
        with torch.no_grad():
            weight.sub_(sign * 1e-5 * direction)
    slope, given = (values[0] - values[1]) / 2e-5, (gradient * direction).sum()
    if meta == "second":
        # The step's own scale (typical gradient, weight norm) counts as a constant in both orders.
        assert (slope - given).abs() < 0.05 * slope.abs()
    else:
        assert given.sign() == slope.sign() or slope.abs() < 1e-3


def test_forgetting_and_merging_levels(make, ids):
    model = stack_levels(make("llama"), LEVELS, mode="split")
    _, state, _ = read(model, ids)
    part = state.forget([0])
    path = model.stack_plan.paths[0]
    assert part.networks[path][0] is None and part.networks[path][1] is state.networks[path][1]
    assert state.forget([0, 1]).rows == 0 and state.forget().nbytes == 0
    assert part.with_levels([0], state).networks[path][0] is state.networks[path][0]
    assert state.with_levels([0], LevelState()).networks[path][0] is None
    # The clock goes on, so the forgotten level learns again in step with the other.
    _, again, _ = read(model, ids[:, :4], part)
    assert again.networks[path][0].weights.position.tolist() == [0, 0] and again.tokens == 20


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize(("retain", "clip"), [(1.0, None), (0.5, None), (0.0, None), (0.7, 1e-3)])
def test_descent_in_one_product_is_the_write_of_the_memory(make, ids, rank, retain, clip):
    """... token after token with retention, whole and short segments, two periods of two segments."""
    level = Level(8, rank=rank, lr=20, retain=retain, clip=clip)
    stacked = stack_levels(make("llama", torch.float64), [Level(4), level], mode="split")
    own = stacked.stacked_mlps()["model.layers.1.mlp"].level(1)
    generator = torch.Generator().manual_seed(0)
    initial = {n: w.detach() for n, w in own.initial(torch.zeros(1, dtype=torch.float64)).items()}
    state = own.memory_of(level).init_state((2,), 16, 16, initial, dtype=torch.float64)
    params = state.params
    for count in (4, 3, 4, 1):
        factors = {
            name: Factor(*(torch.randn(2, count, n, dtype=torch.float64, generator=generator) for n in (width, out)))
            for name, (out, width) in own.shapes.items()
        }
        step = torch.rand(2, dtype=torch.float64, generator=generator) / 100
        params = write._descend(level, params, factors, step, initial)
        state = write_dense(own.memory_of(level), state, factors, write._gates(level, factors, step), clip, initial)
        for name, w in params.items():
            torch.testing.assert_close(w, state.params[name], **EXACT)
            assert (w - initial[name]).abs().max() > 1e-9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("fields", [{}, {"rank": 2, "rule": "orthogonalized"}])
def test_rows_of_different_states_read_together_as_alone(make, family, fields):
    """... with contexts and segments of different lengths, and one that has learned nothing."""
    levels = [Level(8, lr=20, **fields), Level(16, lr=20, **fields)]
    stacked = stack_levels(make(family, torch.float64), levels, mode="split")
    estimate_general(stacked, torch.arange(20, 40).view(2, 10))
    ids = torch.arange(24).mul(7).remainder(40)[None]
    rows = [SegmentRow(ids[:, 3:11]), SegmentRow(ids[:, 9:10])]
    for start, count, length in ((5, 2, 8), (0, 1, 3)):
        state, keys = LevelState(), ()
        for at in range(start, start + 8 * count, 8):
            read = read_segment(stacked, ids[:, at : at + 8], state, keys)
            state, keys = read.state, read.keys
        rows.append(SegmentRow(ids[:, 8 : 8 + length], state, keys))
    for writes in (True, False):
        together = read_segments(stacked, rows, writes=writes)
        for found, row in zip(together, rows, strict=True):
            alone = read_segment(stacked, *row, writes=writes)
            assert found.state.tokens == alone.state.tokens
            pairs = zip(*(tensors_of([r.logits, r.keys, dict(r.state.networks), r.nats]) for r in (found, alone)),
                        strict=True)  # fmt: skip
            for a, b in pairs:
                torch.testing.assert_close(a, b, **EXACT)
