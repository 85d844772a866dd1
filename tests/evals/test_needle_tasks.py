"""The trainable long-context tasks: each answer found again by reading the sequence; short models learn them."""

import re

import pytest
import torch

from nestlearn.data.synthetic import IGNORE
from nestlearn.evals.bench.suites import find_suite
from nestlearn.evals.tasks import NeedleInNoise, WhereIs
from nestlearn.evals.tasks.base import lengths_of

TOLD = re.compile(r"One of the special magic numbers for ([a-z]+) is: (\d{4})\.")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@pytest.mark.parametrize("split", ["length 256", "length 1024"])
def test_the_number_asked_for_was_told_once(split: str):
    task = NeedleInNoise(eval_lengths=(256, 1024), eval_examples=20)
    batch, keys, places = task.examples(split), set(), set()
    length = int(split.split()[1])
    for inputs, targets, size in zip(batch.inputs, batch.targets, lengths_of(batch).tolist(), strict=True):
        text = bytes(inputs[:size].tolist()).decode()
        ((key, number),) = TOLD.findall(text)
        asked = f" The special magic number for {key} mentioned in the provided text is "
        assert text.endswith(asked + number[:-1]) and bytes(targets[targets != IGNORE].tolist()).decode() == number
        # The digits are due one after the other from the space before the first.
        assert (targets[size - 4 : size] != IGNORE).all() and size <= length - 1
        context = text[: text.index(asked)] + " "
        assert (NOISE * 20).startswith(TOLD.sub("", context).replace("  ", " ").lstrip())
        assert length - len(context) - len(asked) - 4 < 30
        keys.add(key)
        places.add(text.index("One of"))
    assert len(keys) > 10 and len(places) >= (3 if length == 256 else 10)


def locations(inputs: list[int], task: WhereIs) -> tuple[dict[int, int], int]:
    """Where each person is after all facts, and who is asked for."""
    names, rooms = range(4), range(4, 10)
    at: dict[int, int] = {}
    for place in range(len(inputs) - 3):
        name, verb, room, stop = inputs[place : place + 4]
        if name in names:
            assert verb in range(10, 14) and room in rooms and stop == 14
            at[name] = room
    assert all(token < task.vocab_size for token in inputs)
    return at, inputs[-2]


def test_the_answer_is_the_last_room_of_the_person_asked_for():
    task = WhereIs(eval_lengths=(64, 300), eval_examples=50)
    for split in task.splits:
        batch = task.examples(split.name)
        assert batch.inputs.shape == (50, split.value)
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            at, asked = locations(inputs, task)
            assert inputs[-3] == 15 and inputs[-1] == 16
            assert targets[:-1] == [IGNORE] * (len(targets) - 1) and targets[-1] == at[asked]


def test_haystack_words_follow_zipfs_law():
    batch = WhereIs(length=2000, eval_examples=1).draw(20, torch.Generator().manual_seed(0))
    words = batch.inputs[batch.inputs >= 17]
    counts = torch.bincount(words - 17, minlength=1000).double()
    assert len(counts) == 1000 and counts[0] / counts[9:11].mean() == pytest.approx(10, rel=0.5)


@pytest.mark.parametrize("kind", [NeedleInNoise, WhereIs])
def test_sequences_depend_on_their_seed_only(kind: type):
    task = kind(eval_lengths=(256,), eval_examples=5)
    before = torch.get_rng_state()
    first, again, other = (next(task.batches(4, seed)) for seed in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(
        first.inputs[:, :200], other.inputs[:, :200]
    )  # fmt: skip
    assert torch.equal(task.examples("length 256").inputs, task.examples("length 256").inputs)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (NeedleInNoise, {"length": 100}, r"length=100 must be an integer of at least \d+"),
        (NeedleInNoise, {"eval_lengths": ()}, "eval_lengths is empty"),
        (NeedleInNoise, {"keys": 10_000}, r"keys=10000 must be at most \d+, the number of words"),
        (NeedleInNoise, {"digits": 0}, "digits=0"),
        (WhereIs, {"eval_lengths": (256, 20)}, "eval_lengths=20 must be an integer of at least 27"),
        (WhereIs, {"most_facts": 0}, "most_facts=0"),
    ],
)
def test_impossible_settings_are_refused(kind: type, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_the_shortest_sequences_fit():
    for task in (NeedleInNoise(), WhereIs()):
        small = type(task)(length=task.shortest(), eval_lengths=(task.shortest(),), eval_examples=50)
        assert small.examples(small.splits[0].name).inputs.shape[1] <= task.shortest()


def test_suites_are_known():
    for name, task in (("niah", "niah_single_1"), ("babilong", "babilong_qa1")):
        (recipe,) = find_suite(name).select([task])
        assert [split.value for split in recipe.task.splits] == [256, 512, 1024, 2048]
    assert NeedleInNoise().chance("length 512") == pytest.approx(1 / 9000) and WhereIs().chance("length 256") == 1 / 6
    assert all("NL" in entry.source for entry in NeedleInNoise.published)
