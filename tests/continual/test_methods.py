"""Methods against forgetting by their formulas and statistics."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from nestlearn.continual import (
    CMS,
    EWC,
    ContinualLearner,
    ExperienceReplay,
    FineTuning,
    InContextLearner,
    JointTraining,
    LoRA,
    Projection,
    Transfer,
)
from nestlearn.continual.methods import fisher_information
from nestlearn.continual.scoring import score_examples
from nestlearn.data import Examples, StreamTask, TaskStream
from nestlearn.optim import InputProjection, MultiTimescale, NestedTransfer

SGD = partial(torch.optim.SGD, lr=0.1)


def examples(seed: int, n: int = 12) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(n, 3, generator=generator), torch.randint(4, (n,), generator=generator))


def stream(tasks: int = 3, n: int = 12) -> TaskStream:
    made = tuple(StreamTask(f"{place}", examples(place, n), examples(100 + place, n)) for place in range(tasks))
    return TaskStream("random", made, 4)


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


def test_fisher_information_equals_the_mean_of_squared_gradients():
    """With given labels; and exactly, by the sum over all labels, what drawing labels estimates."""
    model, batch, generator = net(), examples(0), torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    measured = fisher_information(model, batch, parameters, "data", generator)
    exact = {name: torch.zeros_like(p) for name, p in parameters.items()}
    given = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x, y in zip(batch.inputs, batch.targets, strict=True):
        log_p = model(x).log_softmax(-1)
        for label in range(4):
            for name, g in zip(
                exact, torch.autograd.grad(log_p[label], list(parameters.values()), retain_graph=True), strict=True
            ):
                exact[name] += log_p[label].exp().detach() * g.square() / len(batch)
                if label == y:
                    given[name] += g.square() / len(batch)
    torch.testing.assert_close(measured, given)
    drawn = [fisher_information(model, batch, parameters, "model", generator) for _ in range(150)]
    for name in exact:
        torch.testing.assert_close(torch.stack([d[name] for d in drawn]).mean(0), exact[name], rtol=0.35, atol=5e-3)


def test_penalty_is_the_sum_over_tasks():
    """``λ/2 Σ_tasks Σ F_i (θ_i - θ*_i)²`` from each task's own F and θ*, with its gradient."""
    model, method = net(), EWC(3.0, samples=12, labels="data")
    assert method.prepare(model) is model
    assert method.penalty() is None
    kept = []
    for place in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(place)), alpha=0.5)
        batch = examples(place)
        fisher = fisher_information(model, batch, dict(model.named_parameters()), "data", torch.Generator())
        kept.append((fisher, {name: p.detach().clone() for name, p in model.named_parameters()}))
        assert method.end_task(model, batch, torch.Generator().manual_seed(place)) == 12
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3)
    expected = 1.5 * sum(
        (fisher[name] * (p - anchor[name]).square()).sum()
        for fisher, anchor in kept
        for name, p in model.named_parameters()
    )
    penalty = method.penalty()
    torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=1e-6)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(torch.autograd.grad(penalty, list(model.parameters())), wanted, rtol=1e-4, atol=1e-6)


def test_the_reservoir_is_uniform():
    """Each of n examples is stored with probability capacity/n: a chi-squared test over first, middle and last."""
    capacity, n, runs = 8, 40, 400
    counts = torch.zeros(n)
    for seed in range(runs):
        method, generator = ExperienceReplay(capacity), torch.Generator().manual_seed(seed)
        for part in torch.arange(n).split(7):
            method.observe(Examples(part[:, None].float(), part), generator, first_pass=True)
            method.observe(Examples(part[:, None].float(), part), generator, first_pass=False)
        assert method.seen == n and method.stored_examples == capacity
        stored = [int(y) for y in method.targets]
        assert len(set(stored)) == capacity
        counts[stored] += 1
    expected = runs * capacity / n
    # Stored without repetition: the statistic is (1 - capacity/n) times chi-squared of n - 1 degrees of freedom.
    statistic = float(((counts - expected) ** 2 / expected).sum()) / (1 - capacity / n)
    assert statistic < 39 + 4 * (2 * 39) ** 0.5


def test_replay_trains_on_stored_and_new_examples():
    method, generator = ExperienceReplay(5, batch_size=3), torch.Generator().manual_seed(0)
    batch = examples(0, 4)
    assert method.batch(batch, generator) is batch
    method.observe(batch, generator, first_pass=True)
    mixed = method.batch(examples(1, 4), generator)
    assert len(mixed) == 7
    torch.testing.assert_close(mixed.inputs[:4], examples(1, 4).inputs)
    assert all(any(torch.equal(x, y) for y in batch.inputs) for x in mixed.inputs[4:])


def test_joint_training_sees_everything_once():
    learner = ContinualLearner(net(), SGD, method=JointTraining(), epochs=2, batch_size=6)
    result = learner.fit(stream())
    assert result.steps == 2 * 36 // 6 and result.stored_examples == 36
    assert list(result.measured()) == ["average_accuracy"]


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        (CMS(), [torch.optim.SGD]),
        (CMS(levels=lambda m: [(m[0], 4)]), [MultiTimescale, torch.optim.SGD]),
        (CMS(projection=Projection()), [InputProjection, torch.optim.SGD]),
        (
            CMS(levels=lambda m: [(m[0], 4)], projection=Projection(), transfer=Transfer()),
            [NestedTransfer, InputProjection, MultiTimescale, torch.optim.SGD],
        ),
    ],
)
def test_each_ingredient_of_cms_can_be_left_out(method, kinds):
    optimizer = ContinualLearner(net(), SGD, method=method).optimizer
    for kind in kinds:
        assert type(optimizer) is kind
        optimizer = getattr(optimizer, "base", None)


def test_cms_refreshes_at_boundaries_and_stores_in_the_last_epoch():
    method = CMS(projection=Projection(period=None, last_epoch_only=True, alpha=1.0))
    learner = ContinualLearner(net(), SGD, method=method, epochs=3, batch_size=12)
    learner.fit(stream(tasks=1))
    (state,) = learner.optimizer.state_dict()["param_groups"][0]["wrappers"]
    inputs = torch.cat([examples(0).inputs, torch.ones(12, 1)], 1)
    torch.testing.assert_close(state["maps"][0]["seen"], inputs.T @ inputs)
    assert state["maps"][0]["applied"] is not None


def test_methods_that_need_boundaries_say_what_to_use():
    for method in (EWC(1.0), CMS(projection=Projection(period=None))):
        with pytest.raises(ValueError, match=r"acts at the ends of tasks, and boundaries is 'unknown'\. (Use|Give)"):
            ContinualLearner(net(), SGD, method=method, boundaries="unknown")


def test_bad_settings_name_the_cause():
    with pytest.raises(ValueError, match="strength is -1"):
        EWC(-1.0)
    with pytest.raises(ValueError, match="capacity is 0"):
        ExperienceReplay(0)
    with pytest.raises(ValueError, match="boundaries is 'maybe'"):
        ContinualLearner(net(), SGD, boundaries="maybe")
    with pytest.raises(ValueError, match="score is 'f1'"):
        ContinualLearner(net(), SGD, score="f1")
    with pytest.raises(ValueError, match="labels is 'drawn'"):
        EWC(1.0, labels="drawn")
    with pytest.raises(ValueError, match=r"4 parameters of the SGD are not the model's"):
        ContinualLearner(net(), SGD(net().parameters()))
    with pytest.raises(ValueError, match=r"0 labels, shots is 1 .*give at least one label"):
        InContextLearner(net(), None, labels=[])
    unasked = Examples(torch.zeros(2, 3), torch.full((2,), -100))
    with pytest.raises(ValueError, match=r"All 2 targets of 2 examples are -100, which is padding"):
        score_examples(net(), unasked, "accuracy")
    broken, two = net(), examples(0, 2)
    next(broken.parameters()).data[0, 0] = float("nan")
    for score in ("accuracy", "bits"):
        with pytest.raises(ValueError, match=f"The model's {score} on 2 examples is nan"):
            score_examples(broken, two, score)
    with pytest.raises(ValueError, match="epochs is 0"):
        ContinualLearner(net(), SGD, epochs=0)
    model = net()
    with pytest.raises(TypeError, match="makes its own parameter groups; give a function"):
        ContinualLearner(model, SGD(model.parameters()), method=CMS())


def test_lora_trains_adapters_and_chosen_modules_only():
    pytest.importorskip("peft")
    model = net()
    frozen = model[0].weight.detach().clone()
    learner = ContinualLearner(model, SGD, method=LoRA(2, targets=["0"], trained=["2"]), epochs=3)
    before = learner.evaluate(stream())
    learner.fit(stream())
    trained = {name for name, p in learner.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained if "lora" in name} == {"lora_A", "lora_B"}
    weights = dict(learner.model.named_parameters())
    (base,) = [p for name, p in weights.items() if name.endswith("0.base_layer.weight")]
    assert torch.equal(base, frozen)
    assert before == ContinualLearner(net(), SGD, method=FineTuning()).evaluate(stream())


def test_lora_after_the_first_task_keeps_what_it_learned():
    pytest.importorskip("peft")
    plain = ContinualLearner(net(), SGD, epochs=2).fit(stream())
    learner = ContinualLearner(net(), SGD, method=LoRA(1, after_task=0), epochs=2)
    result = learner.fit(stream())
    assert result.matrix[0] == plain.matrix[0]
    assert sum(p.numel() for p in learner.model.parameters() if p.requires_grad) == (3 + 5) + (5 + 4)
    with pytest.raises(ValueError, match="rank is 0"):
        LoRA(0)


def test_lora_places_adapters_by_full_names():
    """The map "0" of the outer model is no pattern for the "1.0" of a part that trains in full."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    adapted = LoRA(1, trained=["1"]).prepare(model)
    places = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert places == {"base_model.model.0", "base_model.model.2"}
    with pytest.raises(
        ValueError, match=r"A Sequential has no linear map for adapters.*trained in full are \['0', '2'\]"
    ):
        LoRA(1, trained=["0", "2"]).prepare(net())
    with pytest.raises(ValueError, match="A Linear has no linear map"):
        LoRA(1).prepare(nn.Linear(2, 2))


def test_only_levels_make_it_a_cms_by_name():
    given = {"projection": Projection(), "transfer": Transfer()}
    assert CMS(**given).name == "projection, transfer"
    assert CMS(transfer=Transfer()).name == "transfer"
    assert CMS().name == "fine-tuning"
    assert CMS(levels=lambda model: [(model, 4)], **given).name == "CMS: levels, projection, transfer"
    assert CMS(**given, name="mine").name == "mine"
