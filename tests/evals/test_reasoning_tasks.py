"""Sort-of-CLEVR's questions answered by hand, and bAbI's files as sequences of words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn.data.synthetic import IGNORE
from nestlearn.evals.bench import BenchOptions, Recipe, Suite, Training, find_suite, plan, register_suite, run_bench
from nestlearn.evals.tasks import Babi, Mqar, SortOfClevr
from nestlearn.evals.tasks.clevr import KINDS, Thing, answer

# A grid of 6 by 6, row 0 at the top:
#
#      0 1 2 3 4 5
#    0 A . . . . B        A: square, small     B: circle, large
#    1 . . D . . .        C: square, large     D: circle, small
#    2 . . . . . .        E: square, small
#    3 C . . . E .
A, B, C = Thing(0, "square", "small", 0, 0), Thing(1, "circle", "large", 5, 0), Thing(2, "square", "large", 0, 3)
D, E = Thing(3, "circle", "small", 2, 1), Thing(4, "square", "small", 4, 3)
SCENE = [E, C, A, D, B]


@pytest.mark.parametrize(
    ("question", "first", "second", "expected"),
    [
        ("shape of", 1, None, "circle"),
        ("size of", 2, None, "large"),
        ("left half", 3, None, "yes"),  # column 2 of 0-5
        ("left half", 4, None, "no"),
        ("top half", 3, None, "yes"),
        ("top half", 2, None, "no"),  # row 3 of 0-5
        ("shape nearest to", 0, None, "circle"),  # D at distance² 5; C at 9
        ("shape nearest to", 2, None, "circle"),  # D at 4 + 4 = 8; A at 9
        ("shape farthest from", 0, None, "circle"),  # B and E both at 25: see below
        ("shape farthest from", 1, None, "square"),  # C at 25 + 9
        ("others of the shape of", 0, None, "2"),  # C, E
        ("others of the shape of", 3, None, "1"),  # B
        ("others in the rectangle of", 0, 4, "2"),  # C in its corner, D inside
        ("others in the rectangle of", 0, 3, "0"),
        ("others between the columns of", 0, 1, "2"),  # D and E; C shares the column of A
        ("others between the columns of", 3, 1, "1"),  # E
        ("others at an obtuse angle to", 0, 1, "1"),  # D: 5 + 10 < 25. C: right angle at A. E: 25 + 10 > 25
        ("others at an obtuse angle to", 0, 2, "0"),  # right angles at A (B) and at C (E); D: 5 + 8 > 9
    ],
)
def test_questions_are_answered_by_hand(question: str, first: int, second: int | None, expected: str) -> None:
    things = SCENE
    if question == "shape farthest from" and first == 0:
        things = [B, C, A, D, E]  # of two that are equally far the one told first counts
        assert answer(question, SCENE, 6, first) == "square"
    assert answer(question, things, 6, first, second) == expected


def test_three_in_a_row_are_obtuse_and_equal_distances_go_to_the_first() -> None:
    row = [Thing(number, "square", "small", number, number) for number in range(3)]
    assert answer("others at an obtuse angle to", row, 6, 0, 1) == "1"
    near = [Thing(0, "square", "small", 2, 2), Thing(1, "circle", "small", 1, 2), Thing(2, "square", "small", 3, 2)]
    assert answer("shape nearest to", near, 6, 0) == "circle"
    assert answer("shape nearest to", near[::-1], 6, 0) == "square"
    with pytest.raises(ValueError, match="Did you mean 'shape of'"):
        answer("shape off", row, 6, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_tells_the_scene_and_asks_its_kind(kind: str) -> None:
    task = SortOfClevr(objects=4, grid=3, questions=5, eval_examples=30)
    words, batch = task.words(), task.examples(kind)
    assert batch.inputs.shape == (30, 4 * 5 + 5 * 3)
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        told = [[words[token] for token in inputs[5 * i : 5 * i + 5]] for i in range(4)]
        things = [Thing(int(colour[7:]), shape, size, int(x[7:]), int(y[4:])) for colour, shape, size, x, y in told]
        assert {thing.colour for thing in things} == set(range(4)) and len({thing[3:] for thing in things}) == 4
        for place in range(20, 35, 3):
            asked, first, second = (words[token] for token in inputs[place : place + 3])
            assert asked in KINDS[kind] and (second == "blank") is (kind != "ternary")
            other = None if second == "blank" else int(second[7:])
            assert words[targets[place + 2]] == answer(asked, things, 3, int(first[7:]), other)
        assert [t for t, target in enumerate(targets) if target != IGNORE] == list(range(22, 35, 3))


def test_training_asks_every_kind_and_chance_is_below_it() -> None:
    task = SortOfClevr()
    batch = task.draw(60, torch.Generator().manual_seed(0))
    asked = {task.words()[token] for token in batch.inputs[:, 30::3].flatten().tolist()}
    assert asked == {question for kind in KINDS.values() for question in kind}
    # Halves, shapes and sizes are even; how many share a shape is binomial.
    assert abs(task.chance("unary") - 0.5) < 0.03 and all(0.3 < task.chance(kind) < 0.6 for kind in KINDS)


def test_impossible_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="objects=10 do not fit the 9 cells"):
        SortOfClevr(objects=10, grid=3)
    with pytest.raises(ValueError, match="objects=2 must be an integer of at least 3"):
        SortOfClevr(objects=2)


# ------------------------------------------------------------------------------------------------------------- bAbI

TRAIN = """1 Mary got the milk.
2 John went to the hall.
3 What is Mary carrying? \tmilk\t1
4 Mary got the apple.
5 What is Mary carrying?\tapple,milk\t1 4
1 Lily is a frog.
2 What is Lily?\tfrog\t1
"""
TEST = """1 Mary got the football.
2 Lily is a frog.
3 What is Lily?\tfrog\t2
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(1, 21):
        (tmp_path / f"qa{number}_train.txt").write_text(TRAIN)
        (tmp_path / f"qa{number}_name_test.txt").write_text(TEST)
    return tmp_path


def spelled(task: Babi, ids: list[int]) -> str:
    from nestlearn.evals.tasks.babi import _numbers

    words = list(_numbers(task.folder))
    return " ".join(words[token] for token in ids)


def test_stories_become_words_with_the_answer_at_the_question_mark(folder: Path) -> None:
    task = Babi(tasks=("qa2", "qa8")).with_data(str(folder))
    batch = task.examples("qa2")
    assert [split.name for split in task.splits] == ["qa2", "qa8", "all"] and len(task.examples("all").inputs) == 2
    # Training never names a football: it is the unknown word.
    assert spelled(task, batch.inputs[0].tolist()) == "mary got the <unknown> . lily is a frog . what is lily ?"
    assert spelled(task, batch.targets[0, -1:].tolist()) == "frog" and (batch.targets[0, :-1] == IGNORE).all()
    found = set()
    train = task.draw(6, torch.Generator().manual_seed(0))
    for inputs, targets in zip(train.inputs.tolist(), train.targets.tolist(), strict=True):
        (place,) = [t for t, target in enumerate(targets) if target != IGNORE]
        found.add((spelled(task, inputs[: place + 1]), spelled(task, [targets[place]])))
    story = "mary got the milk . john went to the hall ."
    assert found == {
        (f"{story} what is mary carrying ?", "milk"),
        (f"{story} mary got the apple . what is mary carrying ?", "apple,milk"),
        ("lily is a frog . what is lily ?", "frog"),
    }
    assert task.chance("qa2") in (0.0, 1.0)  # one question, and all answers of training are equally frequent


def test_a_long_story_keeps_its_last_whole_facts(tmp_path: Path, folder: Path) -> None:
    facts = "".join(f"{n} Mary got the milk number {n}.\n" for n in range(1, 9))
    (folder / "qa1_train.txt").write_text(facts + "9 What is Lily?\tfrog\t1\n")
    task = Babi(tasks=("qa1",), longest=32).with_data(str(folder))
    inputs = task.draw(1, torch.Generator().manual_seed(0)).inputs[0].tolist()
    text = spelled(task, inputs)
    assert len(inputs) == 4 + 4 * 7 and text.startswith("mary got the milk number 5 .") and text.endswith("lily ?")


def test_every_question_comes_once_before_one_comes_again(folder: Path) -> None:
    task = Babi(tasks=("qa1", "qa2"), train_examples=6).with_data(str(folder))
    batch = task.draw(12, torch.Generator().manual_seed(1))
    rows = [tuple(row) for row in batch.inputs.tolist()]
    assert sorted(rows[:6]) == sorted(rows[6:]) and len(set(rows[:6])) == 3


def test_folders_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data"):
        plan(find_suite("babi"))
    with pytest.raises(ValueError, match="leave --data out"):
        plan(find_suite("clevr"), data=str(folder))
    assert Mqar().with_data(None) == Mqar()
    (folder / "qa7_train.txt").unlink()
    with pytest.raises(ValueError, match="no bAbI file qa7_train"):
        Babi().with_data(str(folder)).vocab_size
    with pytest.raises(ValueError, match=r"unknown task of bAbI 'qa21'"):
        Babi(tasks=("qa21",))


def test_a_cell_knows_files_by_their_content(folder: Path, tmp_path: Path) -> None:
    suite = find_suite("babi")
    (cell,) = plan(suite, ["pmi"], data=str(folder))
    copy = tmp_path / "other" / folder.name
    copy.mkdir(parents=True)
    for path in folder.glob("*.txt"):
        (copy / path.name).write_text(path.read_text())
    assert plan(suite, ["pmi"], data=str(copy))[0].key == cell.key
    (copy / "qa3_train.txt").write_text(TRAIN + "3 What is Lily?\tmilk\t1\n")
    changed = tmp_path / "third" / folder.name
    copy.parent.rename(changed.parent)
    assert plan(suite, ["pmi"], data=str(changed))[0].key != cell.key


def test_both_suites_run_and_write_a_table(folder: Path, tmp_path: Path) -> None:
    for name, data in (("clevr", None), ("babi", str(folder))):
        (recipe,) = find_suite(name).recipes
        few: dict[str, Any] = {"eval_examples": 4} | ({"tasks": ("qa1", "qa20")} if data else {})
        small = Recipe(
            task=replace(recipe.task, **few), mixer=recipe.mixer, model=recipe.model | {"hidden_size": 8},
            training=Training(steps=2, batch_size=4, check_every=2, check_examples=4),
        )  # fmt: skip
        suite = register_suite(Suite(name=f"small-{name}", title=name, recipes=(small,), mixers=("pmi",)))
        outcome = run_bench(suite, BenchOptions(out=tmp_path / name, workers=1, data=data))
        (result,) = outcome.results
        assert set(result.details["scores"]) == {split.name for split in small.task.splits}
        assert "pmi" in outcome.table.read_text()


def test_the_official_files_are_read_whole(shared_data: Path) -> None:
    folder = shared_data / "babi_en" / "en-valid"
    if not folder.is_dir():
        pytest.skip(f"the official files of bAbI are not at {folder}")
    task = Babi(eval_examples=3).with_data(str(folder))
    assert 150 < task.vocab_size < 250 and len(task.splits) == 21
    batch = task.examples("all")
    assert len(batch.inputs) == 60 and batch.inputs.shape[1] <= 256
    assert (batch.targets.amax(1) > 0).all()  # every answer is known from training
