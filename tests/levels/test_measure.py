"""`measure` counts what really happens, leaves everything as it was, and finds levels that do nothing."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.levels import LevelHealth, measure, nested_system
from nestlearn.levels.writes import effective_rank
from nestlearn.optim import MultiTimescale


def language_model(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    return HopeForCausalLM(HopeConfig(**{**sizes, "mixer": "attention", "initializer_range": 0.3, **settings}))


def levels(*periods: int | None) -> list[dict[str, Any]]:
    return [{"period": period, "hidden": 6} for period in periods]


def open_levels(model: Any) -> Any:
    """Levels with values to learn; fresh ones have none."""
    for name, parameter in model.named_parameters():
        if name.endswith(".value"):
            nn.init.normal_(parameter)
    return model


def texts(count: int = 3, length: int = 16) -> list[Tensor]:
    return list(torch.randint(1, 11, (count, 2, length), generator=torch.Generator().manual_seed(1)))


def pairs(count: int, width: int = 4) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 2, 6, width, generator=torch.Generator().manual_seed(1))
    return [(a, b[:, :2]) for a, b in x]


def perceptron() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def faults(health: LevelHealth) -> list[tuple[str, str]]:
    return [(finding.fault, finding.label) for finding in health.findings]


def test_a_healthy_network_by_hand() -> None:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    health: Any = measure(nested_system(model, optimizer), pairs(4), loss=mse_loss)
    assert not health.findings and "Every level does something" in str(health)
    assert [(m.updates, m.inputs) for m in health.measured] == [(4, 4)] * 3
    # The same by hand.
    start = [p.detach().clone() for p in model.parameters()]
    losses, norms, way = [], [], 0.0
    for x, y in pairs(4):
        optimizer.zero_grad()
        value = mse_loss(model(x), y)
        value.backward()
        before = [p.detach().clone() for p in model[0].parameters()]
        optimizer.step()
        losses.append(value.item())
        norms.append(math.hypot(*(float(p.grad.norm()) for p in model[0].parameters())))
        now = [p.detach() for p in model[0].parameters()]
        way += math.hypot(*(float((p - b).norm()) for p, b in zip(now, before, strict=True)))
    size = math.hypot(*(float(p.norm()) for p in start[:2]))
    end = math.hypot(*(float(p.detach().norm()) for p in model[0].parameters()))
    assert health.loss == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert health["0"].gradient == pytest.approx(sum(norms) / 4, rel=1e-5)
    assert health["0"].change == pytest.approx(way / max(size, end), rel=1e-5)
    # Back at the start the loss of the end is higher; and without learning the loss does not fall.
    trained = sum(mse_loss(model(x), y).item() for x, y in pairs(4)) / 4
    with torch.no_grad():
        for p, b in zip(model[0].parameters(), start, strict=False):
            p.copy_(b)
    untrained = sum(mse_loss(model(x), y).item() for x, y in pairs(4)) / 4
    assert health["0"].initial == pytest.approx(untrained - trained, rel=1e-4)


def test_everything_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    mse_loss(model(pairs(1)[0][0]), pairs(1)[0][1]).backward()
    optimizer.step()
    model[2].eval()
    gradient = model[0].weight.grad
    before = {name: x.clone() for name, x in model.state_dict().items()}
    states = json.dumps(optimizer.state_dict(), default=lambda x: x.tolist())
    random = torch.get_rng_state()
    health: Any = measure(nested_system(model, optimizer), pairs(3), loss=mse_loss)
    broken = [*pairs(2), (torch.full((6, 4), torch.nan), torch.zeros(6, 2))]
    with pytest.raises(ValueError, match="the loss of batch 2 is nan"):
        measure(nested_system(model, optimizer), broken, loss=mse_loss)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert json.dumps(optimizer.state_dict(), default=lambda x: x.tolist()) == states
    assert model[0].weight.grad is gradient and torch.equal(torch.get_rng_state(), random)
    assert model.training and not model[2].training
    assert health["statistics"].updates == 3


def test_updates_of_memories_are_counted_token_by_token() -> None:
    deep = {"type": "self_modifying", "expansion": 2, "chunk_size": 2, "projection_chunk_size": 4}
    model = open_levels(language_model(mixer=deep, cms=levels(3, None)))
    health: Any = measure(nested_system(model), texts(1, 13), switch_off=False)
    assert not health.findings
    counted = {m.component.frequency.period: m.updates for m in health.measured if m.component.kind == "memory"}
    assert {m.updates for m in health.measured if m.component.frequency.period == 1} == {13}
    assert counted[1] == 13 and counted[3] == 4 and counted[4] == 3
    assert health["networks.0 · memory"].change > 1e-3 and health["networks.0 · memory"].share > 1e-3


def test_caches_and_states_of_other_models_are_counted() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    health: Any = measure(nested_system(model, torch.optim.SGD(model.parameters(), 0.1)), texts(2, 9))
    assert (health["key-value cache"].updates, health["key-value cache"].inputs) == (9, 9)
    assert not health.findings and health["lm_head"].updates == 2


def test_levels_that_learn_from_the_loss() -> None:
    model = language_model(cms=[{**level, "lr": 0.5} for level in levels(4, 8)], cms_signal="loss")
    health: Any = measure(nested_system(model), texts(1, 18))
    fast, slow = health["networks.0 · memory"], health["networks.1 · memory"]
    assert (fast.updates, slow.updates) == (4, 2)
    assert fast.share > 1e-3 and fast.writes_off != 0 and not health.findings


# -- planted faults -------------------------------------------------------------------------------------------------


def test_a_period_longer_than_the_sequence_or_the_stream() -> None:
    model = open_levels(language_model(cms=levels(4, 64)))
    health: Any = measure(nested_system(model), texts(1), switch_off=False)
    assert faults(health) == [("longer than the stream", "model.layers.0.cms.networks.1 · memory")]
    assert "period of 64 is not shorter than the 16 tokens" in health.findings[0].text
    model = perceptron()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    slow = MultiTimescale(torch.optim.SGD(groups, 0.1), [1, 9])
    found = faults(measure(nested_system(model, slow), pairs(5), loss=mse_loss))
    assert found == [("longer than the stream", "2")]


def test_a_dead_slow_level() -> None:
    class Gated(nn.Module):
        """The slow part is behind a gate that is shut."""

        def __init__(self) -> None:
            super().__init__()
            self.fast, self.slow = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fast(x) + 0 * self.slow(x)

    model = Gated()
    groups = [{"params": model.fast.parameters()}, {"params": model.slow.parameters()}]
    slow = MultiTimescale(torch.optim.SGD(groups, 0.1), [1, 2])
    health: Any = measure(nested_system(model, slow), pairs(6), loss=mse_loss)
    assert faults(health) == [("dead", "MultiTimescale.sums"), ("dead", "slow")]
    assert health["slow"].gradient == 0 and health["slow"].writes_off == health["slow"].initial == 0


def test_two_levels_that_do_the_same() -> None:
    model = open_levels(language_model(cms=levels(4, 5, None), cms_variant="independent"))
    first, second = model.model.layers[0].cms.networks[:2]
    second.load_state_dict(first.state_dict())
    health: Any = measure(nested_system(model), texts(1, 21), switch_off=False)
    assert faults(health) == [("duplicate", "model.layers.0.cms.networks.0 · memory")]
    other, cosine = health["networks.1 · memory"].cosine or ("", 0.0)
    assert other == "model.layers.0.cms.networks.0 · memory" and cosine > 0.99
    torch.manual_seed(3)
    for parameter in second.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert not measure(nested_system(model), texts(1, 21), switch_off=False).findings


def test_a_memory_whose_writes_change_nothing() -> None:
    """Titans with a bound on its steps that is far too tight: such a layer was once the default."""
    titans = {"type": "memory", "memory": "titans", "expansion": 2, "chunk_size": 4}
    bound = language_model(mixer={**titans, "max_step": 1e-5}, cms=levels(None))
    health: Any = measure(nested_system(bound), texts(1))
    assert faults(health) == [("writes change nothing", "model.layers.0.mixer · memory")]
    memory = health["mixer · memory"]
    assert memory.updates == 16 and 0 < memory.share < 1e-3 and abs(memory.writes_off) < 1e-3
    healthy: Any = measure(nested_system(language_model(mixer=titans, cms=levels(None))), texts(1))
    assert not healthy.findings and healthy["mixer · memory"].share > 0.01


def test_an_optimizer_state_that_never_matters() -> None:
    class Vain(torch.optim.SGD):
        """SGD that also averages gradients, and does not look at the average."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 0.1)
            super().step()

    model = perceptron()
    health: Any = measure(nested_system(model, Vain(model.parameters(), 0.1, momentum=0.9)), pairs(4), loss=mse_loss)
    assert faults(health) == [("never matters", "Vain.average")]
    assert health["average"].share == 0 and health["momentum_buffer"].share > 0.1


# -- streams and reports --------------------------------------------------------------------------------------------


def test_streams_that_end_early_are_measured_as_far_as_they_go() -> None:
    model = perceptron()
    system = nested_system(model, torch.optim.SGD(model.parameters(), 0.1), accumulation=2)
    health: Any = measure(system, iter(pairs(3)), loss=mse_loss, steps=10)
    assert health.batches == 3 and "ended after 3 of 10 batches" in health.notes[0] and health.notes[0] in str(health)
    assert health["0"].updates == 1  # the gradients of two batches, once; the third waits
    assert measure(system, iter(pairs(5)), loss=mse_loss, steps=2).batches == 2
    with pytest.raises(ValueError, match="the stream is empty"):
        measure(system, [], loss=mse_loss)
    with pytest.raises(ValueError, match="gave no loss"):
        measure(system, pairs(1))
    with pytest.raises(ValueError, match="has no model to run"):
        measure(nested_system(nn.Linear(1, 1)).__class__("none", ()), pairs(1))


def test_reports(tmp_path: Any) -> None:
    model = perceptron()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    slow = MultiTimescale(torch.optim.SGD(groups, 0.1), [1, 9])
    health: Any = measure(nested_system(model, slow), pairs(3), loss=mse_loss)
    page = health.save(tmp_path / "health.html").read_text()
    assert page.count('class="found"') == 1 and "#d0312d" in page and "9 is not shorter than the 3 batches" in page
    figures = json.loads(health.save(tmp_path / "health.json").read_text())
    assert figures["findings"][0]["label"] == "2" and figures["measured"][0]["updates"] == health.measured[0].updates
    assert health.save(tmp_path / "health.txt").read_text() == f"{health}\n"


def test_a_state_without_which_the_loss_is_lost(tmp_path: Any) -> None:
    """Steps that a state makes smaller diverge without it; that is a figure of the report, not an error."""

    class Shrinking(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                seen = self.state[p].setdefault("seen", torch.ones_like(p))
                p.sub_(100 * p.grad / seen)
                seen.mul_(4)

    model = nn.Linear(2, 1, bias=False)
    optimizer = Shrinking(model.parameters(), {})
    health: Any = measure(nested_system(model, optimizer), [(torch.eye(2), torch.zeros(2, 1))] * 60, loss=mse_loss)
    assert math.isfinite(health.loss) and not math.isfinite(health["seen"].writes_off)
    figures = json.loads(health.save(tmp_path / "health.json").read_text())
    assert [row["writes_off"] for row in figures["measured"] if "seen" in row["component"]["name"]] == [None]
    assert not health.system.notes


def test_parameters_of_any_type() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.ones(2, dtype=torch.cfloat))
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.codes = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
            self.table = nn.Embedding(5, 2, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return (self.table(x) * self.turn * self.codes * self.scale).abs()

    model = Odd()
    stream = [(torch.arange(3), torch.zeros(3, 2))] * 2
    health: Any = measure(nested_system(model, torch.optim.SGD(model.parameters(), 0.1)), stream, loss=mse_loss)
    assert health["table"].updates == 2 and health["table"].gradient > 0 and not health.findings


@pytest.mark.parametrize(("matrix", "rank"), [(torch.eye(5), 5), (torch.ones(4, 3), 1), (torch.zeros(2, 2), 0)])
def test_effective_rank(matrix: Tensor, rank: int) -> None:
    assert effective_rank([matrix]) == pytest.approx(rank, abs=1e-5)


def test_levels_on_a_pretrained_model_are_measured_while_it_reads() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from nestlearn import stack_levels
    from nestlearn.nn import Level

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model: Any = stack_levels(
        LlamaForCausalLM(config), [Level(period=4, lr=200.0), Level(period=32)], mode="split"
    ).eval()
    health: Any = measure(nested_system(model), texts(1, 16))
    fast, slow = health["levels.0 · memory"], health["levels.1 · memory"]
    assert fast.updates == 4 and fast.share > 1e-3 and slow.updates == 0
    assert faults(health) == [("longer than the stream", slow.component.label)]
    assert fast.writes_off != 0 and slow.writes_off == 0


def test_a_trainer_writes_reports_and_trains_as_without(tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    from nestlearn.levels import LevelHealthCallback

    def trained(*callbacks: Any) -> list[Tensor]:
        model = language_model(cms=levels(None))
        data: Any = [{"input_ids": row, "labels": row} for row in torch.cat(texts(3))]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=2,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks)).train()
        return [p.detach() for p in model.parameters()]

    callback = LevelHealthCallback(texts(2), every=2, switch_off=False)
    assert all(map(torch.equal, trained(), trained(callback)))
    assert [step for step, _ in callback.reports] == [2, 3]
    assert callback.reports[0][1]["model.norm"].component.frequency.period == 2
    assert json.loads((tmp_path / "levels.json").read_text())["batches"] == 2 and (tmp_path / "levels.html").exists()
    with pytest.raises(ValueError, match="every=0"):
        LevelHealthCallback([], every=0)
