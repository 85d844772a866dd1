"""Refused settings and arguments of the further objectives, retentions and algorithms, each with the fix."""

from __future__ import annotations

import pytest
import torch

from nestlearn.memory import (
    KL,
    L2,
    MLP,
    AssociativeMemory,
    Bregman,
    Decay,
    Delta,
    ElasticNet,
    Gates,
    Huber,
    Lp,
    Lq,
    LqDual,
    Oja,
    OrthogonalizedMomentum,
    ValueShiftRobust,
    explain,
    scan,
    surprise,
)
from nestlearn.nn.cms.network import Network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lp(0.5), "p of at least 1.*got 0.5"),
        (lambda: Lp(float("nan")), "got nan"),
        (lambda: Lp(2, sharpness=0), "positive finite sharpness.*got 0"),
        (lambda: Huber("vector"), "unknown form 'vector'.*'coordinate', 'norm' or 'switch'"),
        (lambda: Huber(threshold=-1.0), "Huber needs a threshold of at least 0, or None; got -1.0"),
        (lambda: ValueShiftRobust(-0.1), "ValueShiftRobust needs a threshold"),
        (lambda: Lq(1.5), "q of at least 2, got 1.5; LqDual takes any q above 1"),
        (lambda: Lq(4, eps=0), "positive eps"),
        (lambda: LqDual(1), "q above 1, got 1"),
        (lambda: LqDual(4, eps=0), "positive eps"),
        (lambda: KL(0), "positive sum c, got 0"),
        (lambda: ElasticNet(-1), "at least 0, got -1"),
        (lambda: Bregman(-1), "positive bound c, got -1"),
        (lambda: OrthogonalizedMomentum(0), "at least one Newton-Schulz step, got 0"),
        (lambda: AssociativeMemory(retention=KL), "retention must be .*subclass of Retention"),
        (
            lambda: AssociativeMemory(retention=Delta(), algorithm=OrthogonalizedMomentum()),
            r"Use Decay\(\), or Momentum",
        ),
        (
            lambda: AssociativeMemory(retention=Decay(True), algorithm=OrthogonalizedMomentum()),
            r"needs retention=Decay",
        ),
        (lambda: AssociativeMemory(retention=KL(), step_size="normalized"), "needs retention=Delta"),
        (lambda: AssociativeMemory(values=Huber()), "takes its thresholds from the gates.*threshold=1.0"),
        (lambda: AssociativeMemory(values="mine"), "one of 'given', 'own', or an objective; got 'mine'"),
        (lambda: AssociativeMemory(values=L2), "or an objective; got <class"),
        (lambda: AssociativeMemory(MLP(2), retention=Oja()), r"Oja\(\) is a rule for Matrix.*got MLP.*or Delta"),
        (lambda: AssociativeMemory(Network(12, "swiglu"), retention=Decay(True)).init_state((), 4, 4), "map 'gate'"),
    ],
)
def test_impossible_parts(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


X, G = torch.zeros(2, 5, 4), torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("memory", "gates", "message"),
    [
        (AssociativeMemory(objective=Huber()), Gates(G, G), r"no constant threshold.*pass Gates\(threshold"),
        (AssociativeMemory(objective=Huber(threshold=1.0)), Gates(G, G, None, G), "has a constant one; drop it"),
        (AssociativeMemory(objective=L2()), Gates(G, G, None, G), "has none; drop them"),
        (AssociativeMemory(objective=Huber()), Gates(G, G, None, G[:, :3]), r"threshold must have shape \(2, 5\)"),
        (AssociativeMemory(retention=Decay(True)), Gates(G, G), r"retain must have shape \(2, 5, 4\), got \(2, 5\)"),
        (AssociativeMemory(retention=Delta()), Gates(G, X), "a gate per channel needs per_channel=True"),
        (AssociativeMemory(algorithm=OrthogonalizedMomentum()), Gates(G, G), "OrthogonalizedMomentum.*needs gates.mom"),
    ],
)
def test_gates_that_do_not_fit(memory: AssociativeMemory, gates: Gates, message: str):
    with pytest.raises(ValueError, match=message):
        scan(memory, memory.init_state((2,), 4, 4), X, X, X, gates)


def test_surprise_needs_the_thresholds_as_well():
    memory = AssociativeMemory(objective=Huber())
    with pytest.raises(ValueError, match="no constant threshold"):
        surprise(memory, memory.init_state((2,), 4, 4).params, X, X)
    with pytest.raises(ValueError, match="no constant threshold"):
        Huber().error(lambda: X, X)


def test_explain_says_what_happens_at_chunk_boundaries_and_what_is_read_densely():
    def said(*parts, **options) -> str:
        return str(explain(AssociativeMemory(MLP(2), *parts, **options)))

    assert "norm at chunk boundaries" in said(L2(), Lq())
    assert "computed densely" in said(L2(), KL()) and "densely" not in said(L2(), KL(), read="chunk")
    assert "changes the accumulators when a chunk ends" in said(L2(), ElasticNet())
    assert "kernels per channel" in said(L2(), Decay(per_channel=True))
    assert "Newton-Schulz" in said(L2(), algorithm=OrthogonalizedMomentum())
    assert "densely" not in said(Lp(3), Decay())
