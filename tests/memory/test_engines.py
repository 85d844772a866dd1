"""The chunked engine equals the token loop: outputs, final state and every outer gradient, in float64."""

from __future__ import annotations

import itertools

import pytest
from torch import Tensor

from nestlearn.memory import L2, MLP, Decay, Delta, DotProduct, Matrix

from .cases import AXES, Case, Inputs, assert_same, covering, legal, make_inputs, product, results, run

COVERING = [Case(**setting) for setting in covering(AXES, 3)]

# Tokens, rows and the activation are no axes of the full product: the first two vary from case to case.
FULL_AXES = {name: values for name, values in AXES.items() if name not in ("tokens", "batch")}
FULL_AXES["architecture"] = (Matrix(), MLP(2))
GROUPS = list(product({name: FULL_AXES[name] for name in ("architecture", "objective", "retention", "step_size")}))


def check(case: Case, seed: int = 0, conditioned: bool = False) -> None:
    """Raises AssertionError where the engines differ; `conditioned` allows for as much as rounding moves the loop."""
    inputs = make_inputs(case, seed=seed)
    expected = results(inputs, *run(case, inputs, "reference"))
    got = results(inputs, *run(case, inputs, "chunked"))
    try:
        assert_same(got, expected, case)
    except AssertionError:
        if not conditioned:
            raise
        assert_same(got, expected, case, noise=conditioning(case, inputs, expected))


def conditioning(case: Case, inputs: Inputs, expected: dict[str, Tensor], relative: float = 1e-13) -> dict[str, float]:
    """How far the token loop's own results move when its inputs change in the thirteenth digit.

    Newton-Schulz pulls small singular values up, and rounding with them; the slope of Lq's map has no bound at 0. Such
    results have fewer digits than 1e-9, in whatever order the sums are made.
    """
    nudged = inputs.nudged(relative)
    moved = results(nudged, *run(case, nudged, "reference"))
    noise = {name: (moved[name].double() - x.double()).norm().item() for name, x in expected.items()}
    for name, x in expected.items():
        assert noise[name] <= 1e-4 * max(x.double().norm().item(), 1e-3), f"{case}: {name} is chaotic"
    return noise


def test_the_covering_set_contains_every_pair():
    settings = [vars(case) for case in COVERING]
    assert all(legal(setting) for setting in settings)
    for a, b in itertools.combinations(AXES, 2):
        wanted = {(x, y) for x in AXES[a] for y in AXES[b] if legal({a: x, b: y})}
        assert wanted == {(setting[a], setting[b]) for setting in settings}, (a, b)


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_engines_agree_on_every_three_settings(case: Case):
    check(case)


@pytest.mark.parametrize(("flags", "read"), [("none", "token"), ("both", "token"), ("reset", "chunk")])
@pytest.mark.parametrize("architecture", [Matrix(), MLP(2)], ids=["matrix", "mlp"])
def test_engines_agree_where_a_chunk_is_split_in_spans(architecture, flags, read):
    """A chunk of 192 runs as two spans of 96 that share its anchor; the rest of 200 starts a new chunk."""
    check(Case(architecture, L2(), Delta(), momentum=True, chunk_size=192, read=read, flags=flags, tokens=200))


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: str(Case(**g)).split("-momentum")[0])
def test_engines_agree_on_the_full_product(group):
    others = {name: values for name, values in FULL_AXES.items() if name not in group}
    for number, setting in enumerate(product(others)):
        tokens = 200 if setting["chunk_size"] == 192 and number % 4 == 0 else (1, 23, 40, 70)[number % 4]
        check(Case(**group, **setting, tokens=tokens, batch=1 + 2 * (number % 2)), seed=number)


def test_every_retention_and_objective_is_in_the_product():
    kinds = {(type(g["retention"]), type(g["objective"]), type(g["architecture"])) for g in GROUPS}
    assert kinds == set(itertools.product((Decay, Delta), (DotProduct, L2), (Matrix, MLP)))
