"""The harness: deterministic, resumable after any task, honest about what it counts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from nestlearn.continual import CMS, EWC, ContinualLearner, ExperienceReplay, LoRA, Projection, Transfer
from nestlearn.data import Document, Examples, byte_tokenizer, document_stream, permuted_digits, split_digits
from nestlearn.data.continual import class_incremental
from nestlearn.optim import InputProjection, MultiTimescale, NestedTransfer

ADAM = partial(torch.optim.Adam, lr=1e-2)


def net(outputs: int = 10) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, outputs))


def digits(tasks: int = 3):
    return permuted_digits(tasks, train=200)


METHODS = {
    "fine-tuning": lambda: None,
    "ewc": lambda: EWC(10.0, samples=5),
    "replay": lambda: ExperienceReplay(20),
    "cms": lambda: CMS(
        levels=lambda m: [(m[0], 4)], projection=Projection(period=5), transfer=Transfer(rate=0.5, period=3)
    ),
    "lora": lambda: LoRA(2, after_task=0),
}


@pytest.mark.parametrize("name", METHODS)
def test_resumes_after_any_task(name, tmp_path):
    """An interruption after a task changes nothing: not a weight, not a score, not the dropout."""
    whole = ContinualLearner(net(), ADAM, method=METHODS[name](), seed=1)
    expected = whole.fit(digits())

    class Stopped(Exception):
        pass

    def stop(place: int, _row: tuple[float, ...]) -> None:
        raise Stopped

    file = tmp_path / "progress.pt"
    for _ in range(len(digits()) - 1):
        with pytest.raises(Stopped):
            ContinualLearner(net(), ADAM, method=METHODS[name](), seed=1).fit(digits(), checkpoint=file, on_task=stop)
    learner = ContinualLearner(net(), ADAM, method=METHODS[name](), seed=1)
    result = learner.fit(digits(), checkpoint=file)
    assert result.matrix == expected.matrix and result.initial == expected.initial
    assert (result.steps, result.examples, result.stored_examples) == (
        expected.steps, expected.examples, expected.stored_examples,
    )  # fmt: skip
    for p, q in zip(learner.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    # Nothing is left to learn: the finished file gives the result again.
    assert ContinualLearner(net(), ADAM, method=METHODS[name](), seed=1).fit(digits(), checkpoint=file) == result


def test_clipping_counts_trained_weights_only(tmp_path):
    """What LoRA froze after the first task keeps no gradient, and would count for nothing: resuming shows both."""
    pytest.importorskip("peft")

    def learner() -> ContinualLearner:
        return ContinualLearner(net(), ADAM, method=LoRA(2, after_task=0), max_grad_norm=0.01, seed=1)

    class Stopped(Exception):
        pass

    def stop(place: int, _row: tuple[float, ...]) -> None:
        raise Stopped

    file, whole, resumed = tmp_path / "progress.pt", learner(), learner()
    expected = whole.fit(digits(2))
    with pytest.raises(Stopped):
        learner().fit(digits(2), checkpoint=file, on_task=stop)
    assert resumed.fit(digits(2), checkpoint=file).matrix == expected.matrix
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert all(p.grad is None for p in whole.model.parameters() if not p.requires_grad)


def test_gradients_of_weights_outside_the_optimizer_are_not_counted():
    """Of a part that is trained, the step is the one it would make if the rest were not there to be clipped with."""
    moved = []
    for frozen in (False, True):
        model = net()
        if frozen:
            model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model[3].parameters(), lr=1.0)
        ContinualLearner(model, optimizer, max_grad_norm=1e-3, batch_size=200).fit(digits(1))
        moved.append(model[3].weight.detach().clone())
    torch.testing.assert_close(*moved, rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_fork_learns_as_the_learner_does_and_leaves_it_alone(name):
    learner = ContinualLearner(net().eval(), ADAM, method=METHODS[name](), seed=1)
    learner.model[2].p = 0.0  # dropout has the global random state
    first, second = digits(2).tasks
    learner.learn(first.train)
    learner.end_task(first.train)
    fork = learner.fork()
    losses = fork.learn(second.train, 1)
    assert learner.learn(second.train, 1) == losses and len(losses) == 7
    fork.learn(first.train, 2)
    assert fork.steps == learner.steps + 7


def test_a_learner_of_an_optimizer_object_has_no_fork():
    model = net()
    with pytest.raises(TypeError, match="has a SGD that it did not make"):
        ContinualLearner(model, torch.optim.SGD(model.parameters(), lr=0.1)).fork()


def test_without_shuffling_steps_are_in_the_order_of_the_examples():
    task = digits(1).tasks[0].train
    model = net().eval()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(task.inputs[:32]), task.targets[:32])
    still = partial(torch.optim.SGD, lr=0.0)
    model[2].p = 0.0
    learner = ContinualLearner(model, still, shuffle=False, epochs=2)
    losses = learner.learn(task)
    assert losses[0] == losses[7] == pytest.approx(loss.item(), rel=1e-6)
    assert ContinualLearner(model, still).learn(task)[0] != losses[0]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    file = tmp_path / "progress.pt"
    ContinualLearner(net(), ADAM).fit(digits(1), checkpoint=file)
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        ContinualLearner(net(), ADAM, seed=1).fit(digits(1), checkpoint=file)
    with pytest.raises(ValueError, match=r"other settings \(stream\)"):
        ContinualLearner(net(), ADAM).fit(digits(2), checkpoint=file)
    with pytest.raises(ValueError, match=r"other settings \(score\)"):
        ContinualLearner(net(), ADAM, score="bits").fit(digits(1), checkpoint=file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no checkpoint of a continual learner"):
        ContinualLearner(net(), ADAM).fit(digits(1), checkpoint=file)
    file.write_text("hello")
    with pytest.raises(ValueError, match="no checkpoint of a continual learner"):
        ContinualLearner(net(), ADAM).fit(digits(1), checkpoint=file)


def test_a_foreign_or_damaged_checkpoint_is_refused(tmp_path):
    file = tmp_path / "progress.pt"
    ContinualLearner(net(), ADAM).fit(digits(1), checkpoint=file)
    whole = torch.load(file, weights_only=True)
    foreign = [
        [1, 2], 7, "text", torch.ones(2), {}, net().state_dict(), whole | {"config": "[]"}, whole | {"rows": []},
        whole | {"rows": 3}, whole | {"rows": [["a"]]}, whole | {"learner": None}, whole | {"learner": {"model": {}}},
        whole | {"learner": whole["learner"] | {"optimizer": []}},
    ]  # fmt: skip
    for content in foreign:
        torch.save(content, file)
        with pytest.raises(ValueError, match=r"no checkpoint of a continual learner|does not fit the learner"):
            ContinualLearner(net(), ADAM).fit(digits(1), checkpoint=file)
    torch.save(whole, file)
    good = file.read_bytes()
    for place in range(0, len(good), len(good) // 60):
        damaged = bytearray(good)
        damaged[place] ^= 0xFF
        file.write_bytes(damaged)
        try:  # a byte of a weight or of padding cannot be told from a good one
            ContinualLearner(net(), ADAM).fit(digits(1), checkpoint=file)
        except ValueError as error:
            assert "progress.pt" in str(error)
    with pytest.raises(ValueError, match="cannot be read"):
        ContinualLearner(net(), ADAM).fit(digits(1), checkpoint=tmp_path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    file, good = tmp_path / "progress.pt", []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def fill(place: int, _row: tuple[float, ...]) -> None:
        good.append(file.read_bytes())
        monkeypatch.setattr("os.fsync", full)

    with pytest.raises(OSError, match=r"could not write the checkpoint to .*No space left.* check free space"):
        ContinualLearner(net(), ADAM).fit(digits(2), checkpoint=file, on_task=fill)
    assert [path.name for path in tmp_path.iterdir()] == ["progress.pt"] and file.read_bytes() == good[0]
    with pytest.raises(OSError, match="check free space and rights"):
        ContinualLearner(net(), ADAM).fit(digits(1), checkpoint=file / "below")


@pytest.mark.parametrize(
    "changed",
    [
        {"alpha": 2.0}, {"unit": "steps"}, {"period": 6}, {"period": None}, {"apply_to": "gradient"},
        {"reduction": "sum"}, {"rate": 0.4}, {"every": 4}, {"base": torch.optim.SGD},
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_wrappers_is_refused(changed, tmp_path):
    def optimizer(model, base=torch.optim.Adam, reduction="mean", rate=0.5, every=3, **projection):
        levels = MultiTimescale(base(model.parameters(), lr=0.01), [2], reduction=reduction)
        memory = InputProjection(levels, model, **{"alpha": 1.0, "period": 5, **projection})
        return NestedTransfer(memory, rate=rate, period=every)

    file = tmp_path / "progress.pt"
    for _ in range(2):
        model = net()
        ContinualLearner(model, optimizer(model)).fit(digits(1), checkpoint=file)
    model = net()
    with pytest.raises(ValueError, match=r"other settings \(optimizer\)"):
        ContinualLearner(model, optimizer(model, **changed)).fit(digits(1), checkpoint=file)


def test_the_seed_decides_and_nothing_outside_does():
    torch.manual_seed(7)
    first = ContinualLearner(net(), ADAM).fit(digits(2))
    torch.manual_seed(8)
    state = torch.get_rng_state()
    model = net()
    torch.set_rng_state(state)
    second = ContinualLearner(model, ADAM).fit(digits(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.matrix == second.matrix
    assert ContinualLearner(net(), ADAM, seed=1).fit(digits(2)).matrix != first.matrix


def test_counts_what_gradients_were_computed_for():
    stream = digits(2)
    plain = ContinualLearner(net(), ADAM, epochs=2, batch_size=50).fit(stream)
    assert (plain.steps, plain.examples, plain.stored_examples) == (16, 800, 0)
    ewc = ContinualLearner(net(), ADAM, method=EWC(1.0, samples=7), epochs=2, batch_size=50).fit(stream)
    assert ewc.examples == 800 + 14
    replay = ContinualLearner(net(), ADAM, method=ExperienceReplay(30), epochs=2, batch_size=50).fit(stream)
    assert (replay.examples, replay.stored_examples) == (800 + 15 * 30, 30)


def test_fine_tuning_forgets_classes_and_replay_does_not():
    """The ordering every study finds (evaluation of class-incremental learning): replay far above fine-tuning."""
    stream, slow = split_digits(5, train=1200), partial(torch.optim.Adam, lr=2e-3)

    def wide() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    plain = ContinualLearner(wide(), slow, epochs=10).fit(stream)
    replay = ContinualLearner(wide(), slow, method=ExperienceReplay(200), epochs=10).fit(stream)
    assert plain.metrics.average_accuracy < 0.35 < 0.6 < replay.metrics.average_accuracy
    assert plain.metrics.forgetting > 0.5


def test_an_optimizer_object_and_clipping():
    model = net()
    learner = ContinualLearner(model, torch.optim.SGD(model.parameters(), lr=1.0), max_grad_norm=1e-6)
    before = [p.detach().clone() for p in model.parameters()]
    learner.fit(digits(1))
    for p, q in zip(model.parameters(), before, strict=True):
        assert float((p - q).detach().norm()) <= 1.01e-6 * learner.steps


@pytest.mark.parametrize("name", METHODS)
def test_a_head_that_is_replaced_between_tasks_is_refused_by_name(name):
    """No optimizer has its parameters: it would keep its first values, without a word."""
    model, stream = net(), digits(2)
    learner = ContinualLearner(model, ADAM, method=METHODS[name](), batch_size=100)

    def replace(place: int, row: tuple[float, ...]) -> None:
        learner.model[3] = nn.Linear(16, 10)

    if name == "lora":  # from the first task on the trained parameters are its own, in wrapped layers
        learner.learn(stream.tasks[0].train)
        replace(0, ())
        with pytest.raises(ValueError, match=r"3\.weight, 3\.bias \(2 parameters\) joined the model"):
            learner.learn(stream.tasks[1].train, 1)
        return
    with pytest.raises(ValueError, match=r"3\.weight, 3\.bias \(2 parameters\) joined the model.* new Continual"):
        learner.fit(stream, on_task=replace)


def test_a_layer_that_is_thawed_later_is_refused_and_one_left_out_from_the_start_is_not():
    model, task = net(), digits(1).tasks[0].train
    model[0].weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad and p is not model[0].bias]
    learner = ContinualLearner(model, torch.optim.SGD(trained, lr=0.1))
    learner.learn(task)
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.weight \(1 parameters\) joined"):
        learner.learn(task)


def test_replay_draws_stored_examples_without_repetition():
    method, generator = ExperienceReplay(6), torch.Generator().manual_seed(0)
    stored = Examples(torch.arange(6.0)[:, None], torch.arange(6))
    method.observe(stored, generator, first_pass=True)
    for _ in range(20):
        together = method.batch(Examples(torch.full((5, 1), -1.0), torch.full((5,), -1)), generator)
        drawn = together.targets[5:].tolist()
        assert len(drawn) == len(set(drawn)) == 5 and set(drawn) <= set(range(6))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """At the step that has it, before the weights and the checkpoint of the last good task are spoiled."""
    stream, file = digits(2), tmp_path / "progress.pt"
    stream.tasks[1].train.inputs[:] = float("nan")
    model, kept = net(), []
    learner = ContinualLearner(model, ADAM, batch_size=50)
    with pytest.raises(ValueError, match=r"loss is nan at step 5 of fine-tuning.* lower the learning rate"):
        learner.fit(stream, checkpoint=file, on_task=lambda place, row: kept.append(file.read_bytes()))
    assert file.read_bytes() == kept[0] and len(kept) == 1
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with pytest.raises(ValueError, match=r"loss is inf \(.* and a penalty of inf\) at step 2 of EWC"):
        method = EWC(1e38, samples=2)
        stiff = ContinualLearner(net(), ADAM, method=method, batch_size=200)
        stiff.fit(digits(1))
        method.constant = float("inf")
        stiff.learn(digits(1).tasks[0].train)


class TinyLanguageModel(nn.Module):
    """Next byte from this byte alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(259, 16)
        self.out = nn.Linear(16, 259)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(ids))


def test_documents_are_learned_one_after_the_other():
    documents = [Document("abcabcabc " * 60, "a"), Document("xyzzyx. " * 70, "b")]
    stream = document_stream(documents, byte_tokenizer(), length=32)
    learner = ContinualLearner(TinyLanguageModel(), ADAM, score="bits", epochs=6, batch_size=4, boundaries="unknown")
    result = learner.fit(stream)
    assert result.initial[0] < -7.5  # 8 bits per byte before anything was read
    assert result.matrix[0][0] > -3.0 > result.matrix[0][1]
    assert result.metrics.learning_accuracy > -3.0


def test_document_windows_cover_the_text_once():
    text = "".join(chr(97 + place % 26) for place in range(101))
    (task,) = document_stream([Document(text, "a")], byte_tokenizer(), length=16, held_out=0.5).tasks
    windows = {bytes(row[row >= 0].tolist()) for part in (task.train, task.test) for row in part.targets}
    assert sorted(b"".join(windows)) == sorted(text[1:].encode())
    assert len(task.train) == 4 and len(task.test) == 3
    with pytest.raises(ValueError, match=r"Document 'b' has 5 tokens; it needs more than 17"):
        document_stream([Document("hello", "b")], byte_tokenizer(), length=16)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.25, 1 / 3, 0.4, 0.5, 0.6, 0.8, 0.9, 0.99])
def test_held_out_windows_are_the_share_asked_for_and_spread(share):
    for windows in (2, 3, 10, 97):
        text = "x" * (4 * windows + 1)
        (task,) = document_stream([Document(text, "a")], byte_tokenizer(), length=4, held_out=share).tasks
        assert len(task.train) + len(task.test) == windows
        assert len(task.test) == min(max(int(windows * share + 1e-9), 1), windows - 1)
    text = "".join(f"{place:04d}" for place in range(50)) + "x"
    (task,) = document_stream([Document(text, "a")], byte_tokenizer(), length=4, held_out=share).tasks
    tested = [int(bytes(row.tolist())) for row in task.test.inputs]
    if share > 0.01:
        for count in range(1, 50):  # of every beginning, too
            assert abs(sum(place < count for place in tested) - count * share) <= 1
    if share == 0.2:  # every fifth window
        assert tested == list(range(4, 50, 5))


def test_a_document_stream_of_impossible_sizes_is_refused():
    document = Document("abcdefgh" * 10, "a")
    for share in (0.0, 1.0, 2.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"held_out {share}; .*between 0 and 1"):
            document_stream([document], byte_tokenizer(), length=4, held_out=share)
    with pytest.raises(ValueError, match="length is 0"):
        document_stream([document], byte_tokenizer(), length=0)


def test_a_class_without_examples_is_named():
    every, some = (Examples(torch.zeros(len(labels), 2), torch.tensor(labels)) for labels in ([0, 1, 2, 3], [0, 1, 3]))
    for train, test, part in ((some, every, "train"), (every, some, "test")):
        with pytest.raises(ValueError, match=rf"animals: of the classes 0 to 3, 2 \(cat\) has no examples in {part}"):
            class_incremental("animals", train, test, tasks=2, names=["ant", "bee", "cat", "dog"])
