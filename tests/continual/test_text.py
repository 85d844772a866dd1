"""Texts as class-incremental streams, frozen features, and the in-context learner."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from torch import nn

from nestlearn.continual import InContextLearner
from nestlearn.data import IntentTexts, byte_tokenizer, load_banking77, load_clinc150
from nestlearn.data.continual_text import ngram_features, token_encoder

TEXTS = {
    "greet": ["hello there", "good day", "hi friend"],
    "pay": ["pay my bill", "send money", "pay rent"],
    "card": ["lost my card", "new card please", "card is gone"],
    "time": ["what time is it", "the hour", "time now"],
}


def intents() -> IntentTexts:
    train = [(text, label) for label, texts in TEXTS.items() for text in texts[:2]]
    test = [(texts[2], label) for label, texts in TEXTS.items()]
    return IntentTexts.from_pairs("intents", train, test)


def test_each_task_brings_new_classes_and_every_text_comes_once():
    data = intents()
    stream = data.stream(token_encoder(byte_tokenizer(), 16), tasks=2, order_seed=3)
    assert sorted(label for task in stream.tasks for label in task.classes) == [0, 1, 2, 3]
    assert sum(len(task.train) for task in stream.tasks) == 8
    for task, (train, test) in zip(stream.tasks, data.texts_by_task(stream), strict=True):
        assert set(task.train.targets.tolist()) == set(task.test.targets.tolist()) == set(task.classes)
        for texts, part in ((train, task.train), (test, task.test)):
            for text, ids, label in zip(texts, part.inputs, part.targets, strict=True):
                assert bytes(ids[ids < 256].tolist()).decode() == text[:16]
                assert text in TEXTS[data.classes[int(label)]]
    with pytest.raises(ValueError, match="4 classes cannot be divided evenly over 3 tasks"):
        data.stream(token_encoder(byte_tokenizer(), 16), tasks=3)
    other = data.stream(token_encoder(byte_tokenizer(), 16), tasks=2, order_seed=4)
    orders = {tuple(task.classes for task in s.tasks) for s in (stream, other)}
    assert len(orders) == 2 or stream.tasks[0].classes == other.tasks[0].classes


def test_files_of_both_data_sets(tmp_path):
    pairs = [(text, label) for label, texts in TEXTS.items() for text in texts]
    (tmp_path / "data_full.json").write_text(
        json.dumps({"train": pairs, "test": pairs[::3], "oos_test": [["x", "oos"]]})
    )
    for part, rows in (("train", pairs), ("test", pairs[::3])):
        with (tmp_path / f"{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "category"), *rows])
    clinc, banking = load_clinc150(tmp_path), load_banking77(tmp_path)
    assert clinc.classes == banking.classes == tuple(sorted(TEXTS))
    assert clinc.train == banking.train == tuple(text for text, _ in pairs)
    assert len(clinc.test) == 4
    with pytest.raises(ValueError, match="is not CLINC150"):
        load_clinc150(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="does not hold Banking77"):
        load_banking77(tmp_path / "absent")
    (tmp_path / "data_full.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="is not CLINC150"):
        load_clinc150(tmp_path)
    with pytest.raises(ValueError, match=r"labels that no training text has: \['new'\]"):
        IntentTexts.from_pairs("x", [("a", "old")], [("b", "new")])


def test_published_sizes(shared_data):
    clinc, banking = load_clinc150(shared_data / "clinc150"), load_banking77(shared_data / "banking77")
    assert (len(clinc.train), len(clinc.test), len(clinc.classes)) == (15000, 4500, 150)
    assert (len(banking.train), len(banking.test), len(banking.classes)) == (10003, 3080, 77)


def test_features_tell_texts_apart_and_are_fitted_once():
    data = intents()
    encode = ngram_features(data.train, dimensions=6)
    features = encode(data.train)
    assert features.shape == (8, 6) and features.dtype == torch.float32
    assert float(features.square().mean()) == pytest.approx(1.0, rel=1e-4)
    torch.testing.assert_close(encode(data.train[:2]), features[:2], rtol=1e-4, atol=1e-5)
    # One-hot counts would have a cosine of 0 between texts without a common word.
    first, second = (place for place, text in enumerate(data.train) if "card" in text)
    similarity = nn.functional.cosine_similarity(features[first], features, dim=-1)
    assert float(similarity[second]) > float(similarity[data.train.index("hello there")]) + 0.1


class CopyModel(nn.Module):
    """Knows by heart: after the bytes of a text and a tab, the label that stood after that text in the prompt."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, 259)
        for row, line in enumerate(ids.tolist()):
            for place in range(len(line)):
                before = bytes(t for t in line[: place + 1] if t < 256)
                query = before.rpartition(b"\n")[2]
                # The last earlier line that begins as this one does says what comes next.
                for earlier in reversed(before.split(b"\n")[:-1]):
                    if earlier.startswith(query):
                        follow = (earlier + b"\n")[len(query)]
                        logits[row, place, follow] = 20.0
                        break
        return logits


def test_in_context_answers_from_the_prompt_and_forgets_what_leaves_it():
    train = [(texts[0], label) for label, texts in TEXTS.items()]
    data = IntentTexts.from_pairs("intents", train, train)
    stream = data.stream(token_encoder(byte_tokenizer(), 16), tasks=2)
    texts = data.texts_by_task(stream)
    settings = {"labels": data.classes, "shots": 1}
    whole = InContextLearner(CopyModel(), byte_tokenizer(), context=256, **settings).fit(stream, texts)
    assert whole.matrix == ((1.0, 0.0), (1.0, 1.0))
    assert whole.config["examples_in_reach"] == 4 and whole.stored_examples == 4
    short = InContextLearner(CopyModel(), byte_tokenizer(), context=64, **settings).fit(stream, texts)
    assert short.matrix[1][1] == 1.0 > short.matrix[1][0]
    assert short.config["examples_in_reach"] < 4
    with pytest.raises(ValueError, match="context 4, the longest label has 6 tokens"):
        InContextLearner(CopyModel(), byte_tokenizer(), labels=data.classes, context=4)
