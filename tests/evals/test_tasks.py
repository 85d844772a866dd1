"""Every generator against what its task says, computed another way: by counting, by hand, by a plain dictionary."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from itertools import pairwise

import pytest
import torch

from nestlearn.data.synthetic import IGNORE, Batch
from nestlearn.evals.tasks import (
    S3,
    S5,
    Compression,
    Counter2,
    Counter3,
    EvenA,
    FormalLanguage,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    ModularSum,
    Mqar,
    NoisyRecall,
    Parity,
    RepeatedAbab,
    RewrittenMqar,
    SelectiveCopying,
    Shuffle2,
    SortOfClevr,
    Task,
)
from nestlearn.evals.tasks.base import accuracy, cut, lengths_of, pad, right_by_sequence
from nestlearn.evals.tasks.mad import AggregateDecoder

BINS = ((2, 20), (21, 40))
FORMAL: list[FormalLanguage] = [
    kind(bins=BINS, train_examples=300, eval_examples=100)
    for kind in (Parity, EvenA, RepeatedAbab, Counter2, Counter3, Shuffle2)
]
MAD: list[Task] = [
    kind(train_examples=64, eval_examples=40)
    for kind in (Compression, InContextRecall, FuzzyRecall, NoisyRecall, SelectiveCopying, Memorization)
]
TASKS: list[Task] = [
    *FORMAL,
    *MAD,
    Mqar(eval_pairs=(2, 4, 16), eval_examples=20),
    RewrittenMqar(pairs=8, eval_pairs=(2, 8), eval_examples=20),
    ModularSum(modulus=5, eval_examples=20),
    S3(eval_examples=20),
    S5(eval_examples=20),
    SortOfClevr(eval_examples=20),
]


def strings(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every sequence without its padding."""
    lengths = lengths_of(batch).tolist()
    rows = zip(batch.inputs.tolist(), batch.targets.tolist(), lengths, strict=True)
    return [(inputs[:n], targets[:n]) for inputs, targets, n in rows]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_keeps_the_contract(task: Task) -> None:
    """Deterministic by seed, global randomness untouched, ids in the vocabulary, evaluation unlike training."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = [next(batches) for batches in [task.batches(8, seed=1)] for _ in range(12)]
    again = [next(batches) for batches in [task.batches(8, seed=1)] for _ in range(12)]
    other = [next(batches) for batches in [task.batches(8, seed=2)] for _ in range(12)]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.inputs, two.inputs) and torch.equal(one.targets, two.targets)
    assert any(not torch.equal(one.targets, two.targets) for one, two in zip(first, other, strict=True))
    for split in task.splits:
        batch = task.examples(split.name)
        assert torch.equal(batch.inputs, task.examples(split.name).inputs)
        assert 0 <= task.chance(split.name) < 1
        assert batch.inputs.shape == batch.targets.shape and len(batch.inputs) <= task.eval_examples
        first.append(batch)
    for batch in first:
        assert 0 <= int(batch.inputs.min()) and int(batch.inputs.max()) < task.vocab_size
        answers = batch.targets[batch.targets != IGNORE]
        assert len(answers) and 0 <= int(answers.min()) and int(answers.max()) < task.vocab_size
    assert torch.equal(before, torch.get_rng_state())
    assert json.loads(json.dumps(task.config()))["eval_seed"] == task.eval_seed
    with pytest.raises(ValueError, match="unknown split"):
        task.examples("nothing")


@pytest.mark.parametrize("task", FORMAL, ids=lambda task: task.name)
def test_validation_strings_are_in_their_bin_and_unique(task: FormalLanguage) -> None:
    for (low, high), split in zip(BINS, task.splits, strict=True):
        found = strings(task.examples(split.name))
        per_n = {"anbn": 2, "anbncn": 3}.get(task.name, 1)
        assert all(low <= len(inputs) / per_n <= high for inputs, _ in found)
        assert len({tuple(inputs) for inputs, _ in found}) == len(found)
    train = strings(task.draw(300, torch.Generator().manual_seed(0)))
    assert len(train) == 300 and max(len(inputs) for inputs, _ in train) <= 20 * per_n  # pyright: ignore


def test_finite_bins_are_complete() -> None:
    """25 and 12 strings of lengths 2-50, 49 values of n; unlike training, which repeats them."""
    sizes = {kind.name: len(kind().examples("2-50").inputs) for kind in (EvenA, RepeatedAbab, Counter2, Counter3)}
    assert sizes == {"aa": 25, "abab": 12, "anbn": 49, "anbncn": 49}


def test_parity_is_counted() -> None:
    for inputs, targets in strings(FORMAL[0].examples("21-40")):
        assert sum(inputs) % 2 == 0 and set(inputs) <= {0, 1}
        assert targets == [1 - sum(inputs[: t + 1]) % 2 for t in range(len(inputs))]


def test_parity_lengths_are_those_of_the_stopping_rule() -> None:
    """A string before its last symbol is long with geometric probabilities; the mean shows it."""
    task = Parity(bins=((1, 400),), train_examples=None)
    lengths = lengths_of(task.draw(4000, torch.Generator().manual_seed(0))).double()
    # Mean of a geometric length with continuation L / (1 + L) is L, truncated at 400 = 2 L; half get one symbol more.
    share = 200 / 201
    weights = torch.tensor([share**n * (1 - share) for n in range(1, 401)], dtype=torch.float64)
    mean = (weights * torch.arange(1, 401)).sum() / weights.sum() + 0.5
    assert abs(lengths.mean() - mean) < 4 * lengths.std() / 4000**0.5 + 0.5


def test_repeated_words() -> None:
    for task, pattern in ((FORMAL[1], r"(aa)*"), (FORMAL[2], r"(abab)*")):
        for inputs, targets in strings(task.examples("21-40")):
            text = "".join("ab"[i] for i in inputs)
            assert re.fullmatch(pattern, text)
            assert targets == [int(bool(re.fullmatch(pattern, text[: t + 1]))) for t in range(len(text))]


@pytest.mark.parametrize("place", [3, 4])
def test_counter_languages_name_what_may_follow(place: int) -> None:
    """The set of next symbols, by trying every symbol on every prefix, folded into one class per set."""
    task = FORMAL[place]
    letters = "abc"[: task.symbols]
    pattern = "".join(f"({letter}*)" for letter in letters)

    def prefix_of_the_language(text: str) -> bool:
        match = re.fullmatch(pattern, text)
        if match is None:
            return False
        counts = [len(group) for group in match.groups()]
        # Later letters begin when the earlier ones are complete, and never outnumber them.
        complete = all(later == 0 or before == counts[0] for before, later in pairwise(counts))
        return complete and max(counts) == counts[0]

    folded: dict[frozenset[str], int] = {}
    for inputs, targets in strings(task.examples("2-20")):
        text = "".join(letters[i] for i in inputs)
        assert len({text.count(letter) for letter in letters}) == 1
        for t, target in enumerate(targets):
            prefix = text[: t + 1]
            following = {letter for letter in letters if prefix_of_the_language(prefix + letter)}
            if len({prefix.count(letter) for letter in letters}) == 1:
                following = {"end"}
            assert folded.setdefault(frozenset(following), target) == target
    assert len(folded) == task.classes and len(set(folded.values())) == task.classes


def test_shuffle2_is_two_balanced_words() -> None:
    task = FORMAL[5]
    both = 0
    for split in ("2-20", "21-40"):
        for inputs, targets in strings(task.examples(split)):
            for opening in (0, 2):
                word = [symbol for symbol in inputs if symbol in (opening, opening + 1)]
                text = "".join("()"[symbol - opening] for symbol in word)
                while "()" in text:
                    text = text.replace("()", "")
                assert text == ""
            assert targets == [
                int(inputs[: t + 1].count(0) > inputs[: t + 1].count(1))
                + 2 * int(inputs[: t + 1].count(2) > inputs[: t + 1].count(3))
                for t in range(len(inputs))
            ]
            both += 3 in targets
    assert both > 50  # the words are interleaved, not one after the other


@pytest.mark.parametrize("random_non_queries", [True, False])
def test_mqar_asks_for_the_value_bound_to_the_key(random_non_queries: bool) -> None:
    task = Mqar(vocabulary=40, length=48, pairs=8, eval_pairs=(4, 8), random_non_queries=random_non_queries)
    for pairs in (4, 8):
        batch = task.examples(f"{pairs} pairs")
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            bound = dict(zip(inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2], strict=True))
            asked = [t for t, target in enumerate(targets) if target != IGNORE]
            assert len(asked) == len(bound) == pairs
            assert {inputs[t]: targets[t] for t in asked} == bound
            assert all(t >= 2 * pairs and t % 2 == 0 for t in asked)
            assert max(bound) < 20 <= min(bound.values())
            rest = [token for t, token in enumerate(inputs) if t >= 2 * pairs and t not in asked]
            assert any(rest) == random_non_queries


def test_rewritten_recall_asks_for_the_second_value() -> None:
    batch = RewrittenMqar(vocabulary=40, length=60, pairs=9).draw(50, torch.Generator().manual_seed(3))
    orders_differ = False
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        first = dict(zip(inputs[0:18:2], inputs[1:18:2], strict=True))
        second = dict(zip(inputs[18:36:2], inputs[19:36:2], strict=True))
        assert first.keys() == second.keys() and len(first) == 9
        assert all(0 < key < 20 <= value < 40 for key, value in [*first.items(), *second.items()])
        assert all(first[key] != second[key] for key in first)
        asked = [t for t, target in enumerate(targets) if target != IGNORE]
        assert {inputs[t]: targets[t] for t in asked} == second and min(asked) >= 36
        orders_differ |= list(first) != list(second)
    assert orders_differ


def test_mqar_trains_on_a_mixture_of_numbers_of_pairs() -> None:
    task = Mqar(vocabulary=40, length=48, train_pairs=(2, 5, 9))
    batches = task.batches(4, seed=0)
    found = {tuple((batch.targets != IGNORE).sum(1).tolist()) for batch in (next(batches) for _ in range(40))}
    assert found == {(2,) * 4, (5,) * 4, (9,) * 4}
    pool = dataclasses.replace(task, train_examples=200).draw(200, torch.Generator().manual_seed(0))
    counts = (pool.targets != IGNORE).sum(1).tolist()
    assert len(counts) == 200 and all(counts.count(pairs) > 40 for pairs in (2, 5, 9))


def test_running_products_are_composed_by_hand() -> None:
    for task, degree in ((S3(eval_examples=30), 3), (S5(eval_examples=30), 5)):
        elements = list(itertools.permutations(range(degree)))
        assert task.vocab_size == math.factorial(degree)
        batch = task.examples(task.splits[0].name)
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            places = list(range(degree))
            for token, target in zip(inputs, targets, strict=True):
                places = [elements[token][place] for place in places]
                assert elements[target] == tuple(places)
    batch = ModularSum(modulus=7, eval_examples=5).examples("length 50")
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert targets == [total % 7 for total in itertools.accumulate(inputs)]
    lengths = {next(ModularSum(longest=9).batches(2, seed)).inputs.shape[1] for seed in range(40)}
    assert lengths == set(range(2, 10))


@pytest.mark.parametrize("task", [InContextRecall(eval_examples=60), NoisyRecall(eval_examples=60, noise_share=0.5)])
def test_mad_recall_judges_values_of_keys_seen_before(task: InContextRecall) -> None:
    symbols = 16
    batch, noisy = task.examples("test"), 0
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert len(inputs) == 127
        known: dict[int, int] = {}
        for t in range(0, 127, 2):
            key, value = inputs[t], inputs[t + 1] if t + 1 < 127 else targets[t]
            if key >= symbols:
                assert value >= symbols and targets[t] == IGNORE
                noisy += 1
                continue
            assert key < symbols // 2 <= value < symbols
            assert known.setdefault(key, value) == value
            assert targets[t] == (value if inputs[:t:2].count(key) else IGNORE)
            assert t + 1 == 127 or targets[t + 1] == IGNORE
        assert targets[-1] != IGNORE
    share = noisy / (60 * 64)
    assert (0.4 < share < 0.6) if isinstance(task, NoisyRecall) else share == 0


@pytest.mark.parametrize("kind", [InContextRecall, NoisyRecall, FuzzyRecall])
def test_mad_recall_trains_on_the_next_token(kind: type[InContextRecall]) -> None:
    batch = kind(train_examples=20).draw(20, torch.Generator().manual_seed(0))
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert (batch.targets != IGNORE).all()


def test_fuzzy_recall_binds_motifs() -> None:
    task = FuzzyRecall(eval_examples=80, vocabulary=10, length=64)
    batch = task.examples("test")
    assert batch.inputs.shape == (80, 64)
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        last = targets[-1]
        tokens = [*inputs, last]
        start = next(t for t, token in enumerate(tokens) if token != 9)
        assert 9 not in tokens[start:]
        text = "".join("k" if token < 4 else "v" for token in tokens[start:])
        assert re.fullmatch(r"(kkkv{1,3})+", text)
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        expected = [IGNORE] * len(tokens)
        for match in re.finditer(r"kkk(v+)", text):
            key = tuple(tokens[start + match.start() : start + match.start() + 3])
            places = range(start + match.start(1), start + match.end(1))
            value = tuple(tokens[t] for t in places)
            assert len(set(key)) == 3 and len(set(value)) == len(value)
            if key in known:
                assert known[key] == value
                for t in places:
                    expected[t] = tokens[t]
            known[key] = value
        assert targets == expected[1:]
        assert last != IGNORE


def test_selective_copying_gives_the_tokens_in_order() -> None:
    task = SelectiveCopying(length=40, copied=6, eval_examples=50)
    batch = task.examples("test")
    starts = set()
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        copy = inputs.index(15)
        assert copy == 33 and inputs[copy + 1 :] == [14] * 6
        tokens = [token for token in inputs[:copy] if token != 14]
        assert targets == [IGNORE] * 34 + tokens and len(tokens) == 6
        starts.add(next(t for t, token in enumerate(inputs) if token != 14))
    assert len(starts) > 5


def test_compression_is_answered_from_the_last_state_alone() -> None:
    task = Compression(eval_examples=30, length=12)
    batch = task.examples("test")
    assert torch.equal(batch.inputs, batch.targets) and (batch.inputs[:, -1] == 15).all()
    assert int(batch.inputs[:, :-1].max()) < 15
    head = task.head(8)
    assert isinstance(head, AggregateDecoder)
    hidden = torch.randn(2, 12, 8)
    changed = hidden.clone()
    changed[:, :-1] = 0
    assert torch.equal(head(hidden), head(changed))
    logits = head(hidden)
    assert logits.shape == (2, 12, 16) and not torch.allclose(logits[:, 0], logits[:, 5])


def test_memorization_has_one_value_per_key_in_every_split_and_seed() -> None:
    task = Memorization(eval_examples=40)
    known: dict[int, int] = {}
    for batch in (task.examples("test"), next(task.batches(64, 0)), next(task.batches(64, 5))):
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            assert inputs[1::2] == [255] * 16 and targets[::2] == [IGNORE] * 16
            for key, value in zip(inputs[::2], targets[1::2], strict=True):
                assert known.setdefault(key, value) == value and key < 127 <= value < 255
    assert len(set(known.values())) == len(known) > 100
    assert not torch.equal(task.values(), Memorization(map_seed=1).values())


def test_batches_go_through_the_training_set() -> None:
    task = Parity(bins=((2, 30),), train_examples=100)
    batches = task.batches(10, seed=0)
    pool = task.draw(100, torch.Generator().manual_seed(0))
    whole = sorted(tuple(inputs) for inputs, _ in strings(pool))
    for _ in range(2):
        epoch = [next(batches) for _ in range(10)]
        assert sorted(tuple(inputs) for batch in epoch for inputs, _ in strings(batch)) == whole
    # Sequences of similar length are together: padding is less than half of what batches in random order would need.
    padding = sum(batch.inputs.numel() for batch in epoch) - sum(map(len, whole))  # pyright: ignore
    unsorted = sum(10 * max(map(len, whole[start::10])) for start in range(10)) - sum(map(len, whole))
    assert padding < 0.5 * unsorted


def test_accuracy_of_tokens_and_sequences() -> None:
    targets = torch.tensor([[1, 2, IGNORE], [3, IGNORE, 4], [5, 5, 5]])
    predictions = torch.tensor([[1, 2, 9], [3, 9, 0], [0, 0, 0]])
    counts = right_by_sequence(predictions, targets)
    assert [c.tolist() for c in counts] == [[2, 1, 0], [2, 2, 3]]
    whole = accuracy(*counts, "sequence accuracy")
    assert (whole.value, whole.n) == (pytest.approx(1 / 3), 3)
    assert whole.stderr == pytest.approx((1 / 3 * 2 / 3 / 3) ** 0.5)
    token = accuracy(*counts, "token accuracy")
    assert token.value == pytest.approx(3 / 7)
    deviations = [2 - 2 * 3 / 7, 1 - 2 * 3 / 7, 0 - 3 * 3 / 7]
    assert token.stderr == pytest.approx(sum(d * d for d in deviations) ** 0.5 / 7)
    with pytest.raises(ValueError, match="no target"):
        accuracy(torch.tensor([0]), torch.tensor([0]), "token accuracy")


def test_padding_and_cutting() -> None:
    batch = pad([[1, 2, 3], [4]], [[0, 1, 0], [1]])
    assert batch.inputs.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.targets.tolist() == [[0, 1, 0], [1, IGNORE, IGNORE]]
    assert cut(Batch(batch.inputs[1:], batch.targets[1:])).inputs.tolist() == [[4]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mqar(pairs=40, vocabulary=256), "length >= 160"),
        (lambda: Mqar(vocabulary=16), "keys"),
        (lambda: Mqar(pairs=0), "at least 1"),
        (lambda: RewrittenMqar(pairs=16, length=64), "length >= 96"),
        (lambda: Mqar(eval_pairs=(4, 17)), "length"),
        (lambda: Mqar(train_pairs=(0,)), "at least 1"),
        (lambda: Parity(bins=()), "bins is empty"),
        (lambda: Parity(bins=((5, 4),)), "shortest <= longest"),
        (lambda: RepeatedAbab(bins=((5, 7),)), "has no string"),
        (lambda: Shuffle2(bins=((3, 3),)), "has no string"),
        (lambda: EvenA(train_examples=0), "train_examples=0"),
        (lambda: InContextRecall(vocabulary=1), "vocabulary=1"),
        (lambda: InContextRecall(length=9), "even"),
        (lambda: NoisyRecall(vocabulary=17), "no tokens remain"),
        (lambda: NoisyRecall(noise_share=1.0), "noise_share"),
        (lambda: FuzzyRecall(vocabulary=6), "motif"),
        (lambda: FuzzyRecall(length=11), "two pairs"),
        (lambda: SelectiveCopying(copied=128), "copied=128"),
        (lambda: SelectiveCopying(vocabulary=2), "a token to copy"),
        (lambda: Memorization(vocabulary=2), "a key and a value"),
        (lambda: Memorization(length=7), "even"),
        (lambda: ModularSum(modulus=1), "modulus=1"),
        (lambda: S3(shortest=40), "shortest <= longest"),
        (lambda: S5(eval_lengths=(0,)), "eval_lengths"),
        (lambda: next(S5().batches(0, 0)), "batch_size=0"),
    ],
)
def test_impossible_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_published_numbers_have_a_source_and_belong_to_a_split() -> None:
    numbers = [(kind, number) for kind in (Parity, Shuffle2, Compression) for number in kind.published]
    assert len(numbers) == 12 + 12 + 5
    for kind, number in numbers:
        assert "arXiv" in number.source and 0 <= number.value <= 100
        assert kind().find_split(number.split).name == number.split
    table = {(n.model, n.split): n.value for n in Parity.published}
    assert (table["DeltaNet", "51-100"], table["Hope", "51-100"], table["Transformer", "2-50"]) == (10.1, 100, 46.4)


def test_settings_are_fields_that_can_be_replaced() -> None:
    task = dataclasses.replace(Mqar(), pairs=8)
    assert task.splits[0].name == "8 pairs" and task.config()["pairs"] == 8
