"""ContinuumMemory with signal "loss": which tokens a level has seen, and what a call does to its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nestlearn.memory import Factor
from nestlearn.nn import ContinuumMemory, Level
from nestlearn.nn.cms.loss import LossLevel
from nestlearn.nn.cms.tape import Tape, segment_factors
from nestlearn.nn.state import tensors_of

D = 6


def learn(cms: ContinuumMemory, x: Tensor, learns: Tensor | None = None) -> list[list[dict[str, Tensor]]]:
    """Read rows ``[b, t, d]`` segment by segment, a loss on each; the weights that each segment read, by level."""
    state, read, size = None, [], cms.segment_length
    assert size is not None
    for first in range(0, x.shape[1], size):
        here, tape = x[:, first : first + size], Tape()
        y, state = cms(here, state, tape=tape)
        assert state is not None
        read.append([{n: w.detach() for n, w in _fast(level).anchor.items()} for level in state.levels if level])
        if here.shape[1] == size:
            factors = segment_factors(y.cumsum(1).sin().sum(), tape)
            state = cms.absorb(state, factors, None, None if learns is None else learns[:, first : first + size])
    return read


def _fast(level):
    return getattr(level, "fast", level)


@pytest.mark.parametrize("tokens", [12, 13, 24])
@pytest.mark.parametrize("periods", [(4,), (3, 6), (2, 4, 12), (2, 6, 10), (2, 4, 6, 8), (2, 4, 8, 16)])
def test_a_level_has_read_whole_periods_in_order(periods, tokens):
    """A level of period C sees tokens 1..C, then C+1..2C: row s learns from token s alone, so that the weights it reads
    differ from the initial ones exactly where token s is known."""
    cms = ContinuumMemory(D, [Level(period, 2, lr=0.1, retain=1.0) for period in periods], signal="loss").double()
    x = torch.randn(1, tokens, D, dtype=torch.float64).expand(tokens, tokens, D)
    read = learn(cms, x, torch.eye(tokens, dtype=torch.bool))
    for segment, weights in enumerate(read):
        for level, period, here in zip(cms.networks, periods, weights, strict=True):
            assert isinstance(level, LossLevel)
            changed = (here["up"] != level.initial["up"]).flatten(1).any(1)
            known = segment * periods[0] // period * period
            assert changed.nonzero().flatten().tolist() == list(range(known)), (segment, period)


def test_levels_that_do_not_write_are_chosen_by_number():
    """A level that is not named passes over the segment, the others absorb it."""
    cms = ContinuumMemory(D, [Level(4, 2, lr=0.1), Level(8, 2, lr=0.1)], signal="loss").double()
    tape = Tape()
    y, state = cms(torch.randn(2, 4, D, dtype=torch.float64), tape=tape)
    factors = segment_factors(y.sin().sum(), tape)
    ends = [cms.absorb(state, factors), cms.advance_clock(state, 4), cms.absorb(state, factors, writes=[1])]
    everyone, known_empty, second = ([[*tensors_of(level)] for level in end.levels] for end in ends)
    torch.testing.assert_close(second, [known_empty[0], everyone[1]])
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(everyone[0], known_empty[0], strict=True))


@pytest.mark.parametrize("tokens", [12, 13])
def test_a_nested_level_lets_go_but_for_the_part_rho(tokens):
    """After the slower level's period a token is known to the faster one by its initial weights alone."""
    levels = [Level(2, 2, lr=0.1, retain=1.0), Level(4, 2, lr=0.1, retain=1.0)]
    cms = ContinuumMemory(D, levels, variant="nested", signal="loss", transfer=0.25).double()
    plain = ContinuumMemory(D, levels, signal="loss").double()
    plain.load_state_dict(cms.state_dict())
    x = torch.randn(1, tokens, D, dtype=torch.float64).expand(tokens, tokens, D)
    rows = torch.eye(tokens, dtype=torch.bool)
    nested, sequential = learn(cms, x, rows), learn(plain, x, rows)
    start = cms.networks[0].initial["up"]
    # Rows that learned from one of the first four tokens have learned the same in both until the third segment.
    moved, whole = nested[2][0]["up"][:4] - start, sequential[2][0]["up"][:4] - start
    torch.testing.assert_close(moved, 0.25 * whole, rtol=1e-9, atol=1e-12)
    assert torch.equal(nested[1][0]["up"], sequential[1][0]["up"])


@pytest.mark.parametrize("rule", ["descent", "momentum", "delta", "orthogonalized"])
@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_a_new_system_reads_as_feed_forward_networks_and_writes(variant, rule):
    levels = [Level(3, 1, rule=rule, lr=0.1), Level(6, rank=2, rule=rule, lr=0.1), Level(None, 1)]
    cms = ContinuumMemory(D, levels, "gelu", variant, "loss", heads=2 if variant == "independent" else 1)
    x = torch.randn(2, 9, D)
    with torch.no_grad():
        y, state = cms(x)
        assert torch.equal(cms(x, state)[0], y)
    read = learn(cms, x)
    for level, first, last in zip(cms.networks, read[0], read[-1], strict=False):
        assert isinstance(level, LossLevel)
        assert all(torch.equal(w[0], level.initial[n]) for n, w in first.items())
        assert any(not torch.equal(w[0], level.initial[n]) for n, w in last.items()) == (level.period < 9)


def test_a_call_that_only_reads_changes_no_tensor():
    cms = ContinuumMemory(D, [Level(2), Level(4)], signal="loss")
    _, state = cms(torch.randn(2, 4, D))
    again = cms(torch.randn(2, 4, D), state)[1]
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(again), strict=True))


def test_gradient_of_the_segment_norm_is_clipped():
    """A clipped level moves by at most lr * clip in a period."""
    cms = ContinuumMemory(D, [Level(4, lr=0.5, clip=1e-3, retain=1.0)], signal="loss").double()
    level = cms.networks[0]
    assert isinstance(level, LossLevel)
    torch.nn.init.zeros_(level.gate.weight)
    read = learn(cms, torch.randn(2, 8, D, dtype=torch.float64))
    moved = sum((w - level.initial[n]).square().sum((-2, -1)) for n, w in read[1][0].items()).sqrt()
    torch.testing.assert_close(moved, torch.full_like(moved, 5e-4), rtol=1e-9, atol=0)


def test_segments_are_the_smallest_period():
    assert ContinuumMemory(D, [Level(4), Level(8), Level()], signal="loss").segment_length == 4
    assert ContinuumMemory(D, [Level()], signal="loss").segment_length is None
    assert ContinuumMemory(D, [Level(4)]).segment_length is None


def test_a_reset_comes_with_the_first_token():
    cms = ContinuumMemory(D, [Level(4)], signal="loss")
    reset = torch.zeros(1, 4, dtype=torch.bool)
    reset[0, 2] = True
    with pytest.raises(ValueError, match="first token of a call only"):
        cms(torch.randn(1, 4, D), reset=reset)


@pytest.mark.parametrize("rule", ["descent", "momentum", "delta", "orthogonalized"])
def test_only_levels_whose_period_ends_pay_for_its_end(rule):
    """FLOPs of a segment's write: the same for every level, and more at a period's end only where that is special."""
    cms = ContinuumMemory(16, [Level(8, 2, rule=rule), Level(16, 2, rule=rule)], signal="loss")
    state, costs = None, []
    for here in torch.randn(4, 1, 8, 16):
        tape = Tape()
        y, state = cms(here, state, tape=tape)
        found, cost = segment_factors(y.square().sum(), tape), []
        for i, level in enumerate(cms.networks):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                level.absorb(state.levels[i], found[None, i])
            cost.append(counter.get_total_flops())
        costs.append(cost)
        state = cms.absorb(state, found)
    fast, slow = zip(*costs, strict=True)
    # After the first write the momentum and the distance to the initial weights are no longer known to be zero.
    assert len(set(fast[1:])) == 1 and len(set(slow[2::2])) == len(set(slow[1::2])) == 1
    ended, inside = slow[3], slow[2]
    assert fast[2] == ended
    assert (ended > 2 * inside) if rule == "orthogonalized" else (ended == inside)


def test_factors_that_do_not_fit_are_refused():
    cms = ContinuumMemory(D, [Level(4, 2)], signal="loss")
    tape = Tape()
    y, state = cms(torch.randn(1, 4, D), tape=tape)
    assert state is not None
    factors = segment_factors(y.square().sum(), tape)
    with pytest.raises(ValueError, match="no factors for level 0 under the key 'other'"):
        cms.absorb(state, factors, "other")
    (maps,) = factors.values()
    twice = {name: Factor(x.repeat(1, 2, 1), error.repeat(1, 2, 1)) for name, (x, error) in maps.items()}
    longer = dict.fromkeys(factors, twice)
    with pytest.raises(ValueError, match="8 tokens goes beyond the smallest period, 4"):
        cms.absorb(state, longer)
