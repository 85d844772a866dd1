"""Sessions that read together: each learns and reports what it would alone, and errors of one leave the others."""

from __future__ import annotations

import pytest
import torch

from nestlearn import Level, MemorySession, stack_levels
from nestlearn.continual import ReadInterrupted, read_together
from nestlearn.nn.state import tensors_of

from .test_session import TEXT, TOKENIZER, llama, states_equal

TEXTS = [TEXT[:200], TEXT[300:340], [TEXT[500:600], TEXT[600:650]], ""]


@pytest.fixture(scope="module")
def model():
    return stack_levels(llama().double(), [Level(32, rank=2, lr=8), Level(64, rule="momentum", lr=8)], mode="split")


def session(model, **fields):
    return MemorySession(model, TOKENIZER, context_length=64, **fields)


def nats_of(report):
    return [value for s in report.segments for value in (s.nats, s.off, *s.without.values())]


@pytest.mark.parametrize("compare", ["off", "levels"])
def test_each_learns_what_it_would_alone(model, compare, monkeypatch):
    """Texts of different lengths, two documents in a row, one of them left open, and a rate of its own."""
    fields = [{}, {}, {}, {"lr": 2.0}]
    together, alone = ([session(model, compare=compare, **f) for f in fields] for _ in range(2))
    rows, forward, seen = [], type(model).forward, []
    monkeypatch.setattr(
        type(model), "forward", lambda self, *a, **k: (rows.append(len(k["input_ids"])), forward(self, *a, **k))[1]
    )
    rounds = [(TEXTS, True), (["", "", TEXT[:1100], ""], False), (TEXTS[::-1], True)]
    for texts, end in rounds[: 3 if compare == "off" else 1]:
        found = read_together(together, texts, end=end, progress=seen.append)
        for one, other, text, report in zip(together, alone, texts, found, strict=True):
            expected = other.read(text, end=end)
            assert (report.tokens, report.bytes, len(report.segments)) == (
                expected.tokens, expected.bytes, len(expected.segments)
            )  # fmt: skip
            assert nats_of(report) == pytest.approx(nats_of(expected), rel=1e-9)
            pairs = zip(*(tensors_of(s._backend.to_tree(s._cursor.memory)) for s in (one, other)), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
            assert one.tokens == other.tokens and one.unfinished == other.unfinished
            assert [(e.what, e.bytes) for e in one.log] == [(e.what, e.bytes) for e in other.log]
    assert max(rows) >= 2 and seen[-1][0] is found[0]


def test_what_fails_in_one_leaves_the_others(model):
    def broken():
        yield TEXT
        raise OSError("gone")

    sessions = [session(model) for _ in range(2)]
    with pytest.raises(ReadInterrupted, match="gone"):
        read_together(sessions, [broken(), TEXT])
    assert 0 < sessions[0].tokens < sessions[1].tokens == len(TEXT)
    sessions[0].read("An open document. " * 80, end=False)
    kept = [s.fork() for s in sessions]
    with pytest.raises(ValueError, match="NUL"):
        read_together(sessions, [TEXT, "\0"])
    assert all(states_equal(s, k) and s.unfinished == k.unfinished for s, k in zip(sessions, kept, strict=True))


def test_what_cannot_be_read_together(model):
    one, two = session(model), session(model)
    for sessions, texts, message in (
        ([one, two], ["a"], "2 sessions cannot read 1 sources"),
        ([], [], "0 sessions"),
        ([one, one], ["a", "b"], "named twice"),
        ([one, session(stack_levels(llama(), [Level(16)]))], ["a", "b"], "different models"),
    ):
        with pytest.raises(ValueError, match=message):
            read_together(sessions, texts)
    assert one.tokens == 0


def test_sessions_of_a_model_whose_frequencies_follow_the_input_read_alone():
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    model = stack_levels(llama(**rope), [Level(16)], mode="split")
    together, alone = ([session(model) for _ in range(2)] for _ in range(2))
    found = read_together(together, TEXTS[:2])
    assert [r.segments for r in found] == [s.read(t).segments for s, t in zip(alone, TEXTS[:2], strict=True)]
