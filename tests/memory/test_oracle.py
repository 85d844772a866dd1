"""Both engines against an oracle written from the formulas, which shares nothing with the package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestlearn.memory import MLP, AssociativeMemory, Decay, Delta, DotProduct, Momentum

from . import oracle
from .cases import AXES, Case, Inputs, assert_same, covering, make_inputs, results, run

SMALL = {**AXES, "chunk_size": (1, 3, 4, 16), "tokens": (1, 11), "batch": (2,)}
CASES = [Case(**setting) for setting in covering(SMALL, 3)]


def rule_of(memory: AssociativeMemory) -> oracle.Rule:
    deep = isinstance(memory.architecture, MLP)
    gated = isinstance(memory.retention, Delta) and memory.retention.gated
    return oracle.Rule(
        deep=deep,
        activation=memory.architecture.activation if isinstance(memory.architecture, MLP) else "",
        objective="dot" if isinstance(memory.objective, DotProduct) else "l2",
        retention="decay" if isinstance(memory.retention, Decay) else "gated" if gated else "delta",
        step={name: memory.step_size_of(name) for name in (("in", "out") if deep else ("W",))},
        momentum=isinstance(memory.algorithm, Momentum),
        to_initial=memory.retain_to == "initial",
        chunk_size=memory.chunk_size,
        read=memory.read,
    )


def run_oracle(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    rule, rows, outputs = rule_of(case.memory), [], []
    for b in range(case.batch):
        gates = [None if g is None else g[b] for g in inputs.gates[:3]]
        flags = [None if f is None else f[b].tolist() for f in (inputs.mask, inputs.reset)]
        initial = {name: w[b] for name, w in inputs.initial.items()}
        y, row = oracle.scan_row(rule, initial, inputs.q[b], inputs.k[b], inputs.v[b], *gates, *flags)
        outputs.append(y)
        rows.append(row)

    def stack(group: str) -> dict[str, Tensor]:
        return {name: torch.stack([getattr(row, group)[name] for row in rows]) for name in inputs.initial}

    state = case.memory.init_state((case.batch,), 3, 3, dtype=torch.float64)._replace(
        params=stack("weights"),
        anchor=stack("anchor"),
        momentum=stack("momentum") if case.momentum else None,
        position=torch.tensor([row.position for row in rows]),
    )
    return results(inputs, torch.stack(outputs), state)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_engines_equal_the_formulas(case: Case):
    inputs = make_inputs(case, seed=7)
    expected = run_oracle(case, inputs)
    for engine in ("reference", "chunked"):
        got = results(inputs, *run(case, inputs, engine))
        assert_same(got, expected, f"{engine} {case}")


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_the_oracle_notices_a_wrong_step(case: Case):
    """A comparison that cannot fail proves nothing: one gate changed by 1e-6 must show."""
    inputs = make_inputs(case, seed=7)
    expected = run_oracle(case, inputs)
    with torch.no_grad():
        inputs.gates.lr[:, -1] += 1e-6
    with pytest.raises(AssertionError, match="differs"):
        assert_same(results(inputs, *run(case, inputs, "chunked")), expected, case)
