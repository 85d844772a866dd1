"""A session that learns a document in passes can be stopped at any segment and goes on exactly there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import Level, MemorySession, stack_levels
from nestlearn.data import byte_tokenizer
from nestlearn.data.documents import Document
from nestlearn.evals.learning import SessionMethod
from nestlearn.evals.stream_record import Reading, StreamRecord

TEXT = Document("".join(f"Lamp {n} is red. " for n in range(20)), "lamps.txt")  # 290 bytes: 10 segments of 32
SEGMENTS = -(-len(TEXT.text) // 32)


class Killed(Exception):
    """Stands for the end of the process: nothing of the objects in memory is used afterwards."""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, initializer_range=0.3)  # fmt: skip
    return stack_levels(LlamaForCausalLM(config), [Level(32, lr=4.0)], mode="split").eval()


def new_session(model) -> MemorySession:
    return MemorySession(model, byte_tokenizer(), compare="none")


@pytest.mark.parametrize("stop", [1, SEGMENTS, SEGMENTS + 1, 2 * SEGMENTS])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_reading_goes_on_where_the_file_of_the_session_stands(model, tmp_path: Path, stop: int, lag: int) -> None:
    whole = SessionMethod(new_session(model), passes=2)
    expected = whole.learn(TEXT, lambda _: None)
    method, calls = SessionMethod(new_session(model), passes=2), 0
    record = StreamRecord("m", "cms", {}, "known", 1.0, (), stream=("digest",))

    def save(reading) -> None:
        """The record is written at every segment; the session ``lag`` segments earlier, as if killed in between."""
        nonlocal calls, record
        calls += 1
        if calls == stop - lag:
            method.session.save(tmp_path / "session")
        if calls == stop:
            StreamRecord(**{**vars(record), "reading": reading()}).save(tmp_path / "results.json")
            raise Killed

    if stop == lag:
        method.session.save(tmp_path / "session")
    with pytest.raises(Killed):
        method.learn(TEXT, lambda _: None, method.begin(math.inf), save)
    again = StreamRecord.load(tmp_path / "results.json")
    assert isinstance(again.reading, Reading) and not again.finished
    resumed = SessionMethod(MemorySession.load(tmp_path / "session", model, byte_tokenizer()), passes=2)
    assert resumed.learn(TEXT, lambda _: None, again.reading).segments == expected.segments
    assert resumed.session.tokens == whole.session.tokens == 2 * len(TEXT.text)
    assert all(row.change == 0 for row in resumed.session.diff(whole.session))
