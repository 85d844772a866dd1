"""MemorySession.edit: what is written, found and measured, against the same by hand; undo, files, forks and errors."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.continual.test_session import llama
from tests.mixers import SMALL
from tests.models.stacking.conftest import tiny
from transformers.pytorch_utils import Conv1D

from nestlearn import Fact, HopeConfig, HopeForCausalLM, Level, MemorySession, stack_levels, unstack_levels
from nestlearn.continual.editing.facts import FactRows
from nestlearn.continual.editing.measure import layers_of, measure
from nestlearn.continual.editing.targets import LARGEST, find_targets
from nestlearn.continual.editing.tracing import NOISE, SAMPLES, contributions
from nestlearn.continual.session.reader import BlockTokenizer
from nestlearn.data import byte_tokenizer, train_bpe
from nestlearn.data.documents import Document
from nestlearn.models.stacking import LevelState
from nestlearn.models.stacking.rows import join_rows
from nestlearn.models.stacking.taps import _hooks

TOKENIZER = byte_tokenizer()
BYTES: dict[str, Any] = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
GENERAL = "Text of any kind that many have read before. " * 12
FACTS = [Fact("Ann lives in Ulm", "yes"), Fact("The king of Spain is", "Bo")]
CHAT = "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}"


@pytest.fixture(scope="module")
def model():
    """Its answers depend on its subjects, unlike those of a model with small weights."""
    plain = tiny("llama", num_hidden_layers=3, tie_word_embeddings=True, max_position_embeddings=128, **BYTES)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    return stack_levels(plain, [Level(16, lr=4)], mode="split")


def session(model, **fields) -> MemorySession:
    return MemorySession(model, TOKENIZER, compare="none", **fields)


def edit(one: MemorySession, facts=FACTS, **fields):
    return one.edit(facts, general=GENERAL, **fields)


@pytest.fixture(autouse=True)
def _short_search(monkeypatch) -> None:
    """Few and large steps; and a null space even in small models, whose general inputs use every direction."""
    monkeypatch.setattr("nestlearn.continual.editing.targets.STEPS", 6)
    monkeypatch.setattr("nestlearn.continual.editing.targets.RATE", 0.3)
    monkeypatch.setattr("nestlearn.continual.editing.edit.NULL", 0.4)


@torch.no_grad()
def logits(one: MemorySession, text: str = "The king of Spain") -> torch.Tensor:
    with one.active():
        return one.model(torch.tensor([list(text.encode())]), use_cache=False).logits


def rows_of(contexts=(), tokenizer=TOKENIZER) -> FactRows:
    return FactRows(tokenizer, partial(BlockTokenizer(tokenizer), first=True), (256,), contexts)


# ------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("method", ["intattn", "memit", "alphaedit", "rome"])
def test_each_method_makes_its_targets_likelier(model, method) -> None:
    one = session(model)
    with torch.inference_mode(method in ("rome", "intattn")):
        report = edit(one, method=method, layers=[0] if method == "rome" else [0, 1])
    one.read("The king of Spain has a parrot. ")
    assert sum(report.after) < sum(report.before) - 0.4, str(report)
    kinds = {path.split(".")[-1] for path in one.edits[0].maps}
    assert kinds == ({"down_proj", "o_proj"} if method == "intattn" else {"down_proj"})
    assert (report.alpha > 0) == (method == "intattn")


@pytest.mark.parametrize(
    ("family", "mode", "dtype"),
    [("llama", "add", torch.float32), ("gpt2", "split", torch.float32), ("gpt_neox", "copy", torch.float32),
     ("qwen3", "split", torch.bfloat16)],
)  # fmt: skip
def test_an_edited_session_is_a_model_with_changed_weights(family, mode, dtype) -> None:
    """W + Lᵀ G written into a plain copy of the model by hand."""
    depth = {"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}
    plain = tiny(family, dtype, **depth, **BYTES).eval()
    stacked = stack_levels(copy.deepcopy(plain), [Level(16)], mode=mode).eval()
    one = session(stacked, context_length=32)
    before = logits(one)
    report = edit(one, alpha=0.5, layers=[0, 1])
    for path, change in one.edits[0].maps.items():
        part = plain.get_submodule(path)
        dense = (change.left.double().mT @ change.right.double()).to(dtype)
        with torch.no_grad():
            part.weight += dense.mT if isinstance(part, Conv1D) else dense
    exact = dtype == torch.float32
    wanted = plain(torch.tensor([list(b"The king of Spain")]), use_cache=False).logits
    torch.testing.assert_close(logits(one), wanted, rtol=0, atol=1e-3 if exact else 0.3)
    assert (wanted - before).abs().max() > (0.02 if exact else 0.1)
    assert sum(report.after) < sum(report.before)


def test_the_share_of_attention_divides_the_same_change(model) -> None:
    """In one layer, MLP and attention get alpha R and (1 - alpha) R for the same R."""
    maps = {alpha: edit(one := session(model), alpha=alpha, layers=[0]) and one.edits[0].maps for alpha in (0.25, 0, 1)}
    whole, attention = maps[0]["model.layers.0.mlp.down_proj"], maps[1]["model.layers.0.self_attn.o_proj"]
    torch.testing.assert_close(maps[0.25]["model.layers.0.mlp.down_proj"].left, 0.75 * whole.left)
    torch.testing.assert_close(maps[0.25]["model.layers.0.self_attn.o_proj"].left, 0.25 * attention.left)
    assert len(maps[0]) == len(maps[1]) == 1 and set(maps[0.25]) == {*maps[0], *maps[1]}


def test_a_later_edit_of_alphaedit_keeps_the_outputs_at_earlier_keys(model) -> None:
    """K_p: the second change of a map is nearly zero at the keys of the first, unlike that of MEMIT."""
    moved = {}
    for method in ("alphaedit", "memit"):
        one = session(model)
        edit(one, FACTS[:1], method=method, layers=[0])
        edit(one, FACTS[1:], method=method, layers=[0])
        path = "model.layers.0.mlp.down_proj"
        first, second = (held.maps[path] for held in one.edits)
        own = (second.keys @ second.right.mT @ second.left).norm()
        moved[method] = float((first.keys @ second.right.mT @ second.left).norm() / own)
    assert moved["alphaedit"] < 0.2 * moved["memit"], moved


# ------------------------------------------------------------------------------------- rows, targets, contributions


def test_rows_read_the_subject_at_its_last_token_in_every_context() -> None:
    tokenizer = train_bpe(
        [Document(text="The king of Köln is Bo. Spain and Spain are two. " * 4, name="a")], vocab_size=280
    )
    tokenizer.chat_template = CHAT
    fact = Fact("Spain, Köln: the king of Köln is", " Bo")
    rows = rows_of(["It rains. ", "Spain. "], tokenizer).all(7, fact)
    assert len(rows) == 4 and {row.fact for row in rows} == {7}

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    for row in rows:
        first, last = row.subject
        assert text(row.ids[first : last + 1]).strip() == "Köln"
        assert text(row.ids[: last + 1]).endswith("the king of Köln")
        assert text(row.ids[row.prompt :]) == (" Bo" if row is not rows[-1] else "Bo")
    assert text(rows[-1].ids[: rows[-1].prompt]).endswith("assistant: ")
    assert text(rows_of((), tokenizer).neutral(7, fact).ids[1:]) == "Köln is a"


def by_hand(plain, ids: list[int], hooks: dict) -> torch.Tensor:
    """Logits of one row with functions of the outputs of modules."""
    handles = [
        plain.get_submodule(path).register_forward_hook(lambda module, inputs, output, change=change: change(output))
        for path, change in hooks.items()
    ]
    try:
        return plain(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def test_a_found_target_lowers_the_loss_as_measured_by_hand(model) -> None:
    plain, path = unstack_levels(copy.deepcopy(model)), "model.layers.0.mlp.down_proj"
    rows = [rows_of().plain(i, fact) for i, fact in enumerate(FACTS)]
    neutral = [rows_of().neutral(i, fact) for i, fact in enumerate(FACTS)]
    hidden = measure(model, LevelState(), rows, ["model.layers.0"]).outputs["model.layers.0"]
    delta = find_targets(model, LevelState(), path, hidden, rows, neutral)
    assert bool((delta.norm(dim=1) <= 1.001 * LARGEST * hidden.norm(dim=1)).all()) and bool((delta != 0).any(1).all())
    for row, change, state in zip(rows, delta, hidden, strict=True):

        def moved(output: torch.Tensor, at: int = row.subject[1], change: torch.Tensor = change) -> torch.Tensor:
            return output.index_add(1, torch.tensor([at]), change[None, None])

        targets, losses = torch.tensor(row.ids[row.prompt :]), []
        for hooks in ({}, {path: moved}):
            logs = by_hand(plain, row.ids, hooks)[row.prompt - 1 : -1].log_softmax(-1)
            losses.append(-logs.gather(1, targets[:, None]).mean().item())
        assert losses[1] < losses[0] - 0.1
        whole = plain.model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[1][0, row.subject[1]]
        torch.testing.assert_close(state, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_contributions_are_those_of_restoring_by_hand(model) -> None:
    plain, layers = unstack_levels(copy.deepcopy(model)), layers_of(model)
    row = rows_of().plain(0, FACTS[1])
    prompt, (first, last) = row.ids[: row.prompt], row.subject
    found = contributions(model, LevelState(), [row], layers, seed=3)
    own = by_hand(plain, prompt, {})[-1].argmax()
    size = NOISE * plain.get_input_embeddings().weight.std()
    noise = size * torch.randn(SAMPLES, last + 1 - first, 16, generator=torch.Generator().manual_seed(3))
    clean: dict[str, torch.Tensor] = {}
    maps = {"attention": [layer.attention for layer in layers], "mlp": [layer.down for layer in layers]}
    by_hand(
        plain, prompt, {p: lambda y, p=p: clean.update({p: y[0, last]}) for p in [*maps["attention"], *maps["mlp"]]}
    )

    def probability(restored: list[str]) -> float:
        total = 0.0
        for draw in noise:
            hooks = {"model.embed_tokens": lambda y, draw=draw: torch.cat([y[:, :first], y[:, first : last + 1] + draw,
                                                                          y[:, last + 1 :]], 1)}  # fmt: skip
            hooks |= {p: lambda y, p=p: y.index_copy(1, torch.tensor([last]), clean[p][None, None]) for p in restored}
            total += float(by_hand(plain, prompt, hooks)[-1].softmax(-1)[own]) / SAMPLES
        return total

    rises = {kind: probability(paths) - probability([]) for kind, paths in maps.items()}
    assert found._asdict() == pytest.approx(rises, abs=1e-5) and any(abs(x) > 1e-4 for x in rises.values())


# ------------------------------------------------------------------------------------------- undo, files and forks


def test_edits_are_taken_back_one_by_one_and_nobody_else_sees_them(model, tmp_path: Path) -> None:
    one, other = session(model), session(model)
    states = [logits(one)]
    for fact in FACTS:
        edit(one, [fact], method="memit", layers=[0])
        states.append(logits(one))
    assert not torch.equal(states[1], states[0]) and not torch.equal(states[2], states[1])
    assert torch.equal(logits(other), states[0]) and torch.equal(model(torch.tensor([[5, 6]])).logits[:, :1],
                                                                 logits(other, "\5\6")[:, :1])  # fmt: skip
    one.save(tmp_path / "a.session")
    loaded, fork = MemorySession.load(tmp_path / "a.session", model, TOKENIZER), one.fork()
    assert torch.equal(logits(loaded), states[2]) and torch.equal(logits(fork), states[2])
    assert loaded.edits[1].facts == (("The king of Spain is", "Spain", "Bo"),) and loaded.nbytes == one.nbytes > 0
    assert all(row.change == 0 for row in loaded.diff(one))
    [row] = [row for row in one.describe() if row.rule == "edit"]
    assert row.path == "model.layers.0.mlp.down_proj" and row.change > 0
    one.undo_edit()
    assert torch.equal(logits(one), states[1]) and torch.equal(logits(fork), states[2])
    fork.undo_edit(0)
    assert len(fork.edits) == 1 and not torch.equal(logits(fork), states[1])
    one.undo_edit()
    assert torch.equal(logits(one), states[0]) and one.nbytes == 0 and one.edits == ()
    assert [entry.what.split()[0] for entry in one.log] == ["edited", "edited", "took", "took"]
    with pytest.raises(ValueError, match="no edit -1"):
        one.undo_edit()
    loaded.forget()
    assert torch.equal(logits(loaded), states[0])


def test_edits_stay_while_the_session_reads_and_levels_are_forgotten(model) -> None:
    one, read = session(model), session(model)
    edit(one, method="memit", layers=[0])
    edited = logits(one)
    report = one.read("The king of Spain has a parrot. " * 8)
    assert report.tokens > 200 and len(one.edits) == 1 and not torch.equal(logits(one), edited)
    read.read("The king of Spain has a parrot. " * 8)
    assert not torch.equal(logits(one), logits(read))
    one.forget([0])
    assert torch.equal(logits(one), edited)
    assert one.generate("The king", max_new_tokens=4) is not None


def test_an_edit_ends_the_document_whose_keys_are_of_the_model_before(model) -> None:
    one = session(model)
    one.read("Half of a text. ", end=False)
    assert one.unfinished is not None
    edit(one, method="memit", layers=[1])
    assert one.unfinished is None
    one.read("Half of another. ", end=False)
    one.undo_edit()
    assert one.unfinished is None


def test_sessions_with_their_own_edits_are_read_in_one_pass(model) -> None:
    one, two = session(model), session(model)
    edit(one, method="memit", layers=[0])
    edit(two, FACTS[:1], alpha=0.5, layers=[0])
    two.read("The king of Spain has a parrot. ")
    for others in ([one, session(model)], [one, two, session(model), one.fork()]):
        states = [other._cursor.memory.levels for other in others]
        ids = torch.tensor([list(b"The king of Spain")] * len(others))
        with torch.no_grad():
            found = model(ids, level_state=join_rows(model, states)).logits
        torch.testing.assert_close(found, torch.cat([logits(other) for other in others]), rtol=1e-4, atol=1e-4)
    assert join_rows(model, [states[0], states[3]]).edits is one.edits


def test_the_hooks_of_edits_leave_with_the_levels() -> None:
    stacked = stack_levels(llama(), [Level(16)], mode="split")
    one = session(stacked)
    edit(one, FACTS[:1], method="memit", layers=[0])
    twin = copy.deepcopy(stacked)
    assert torch.equal(logits(session(twin)), logits(session(stacked)))
    with torch.no_grad():
        moved = twin(torch.tensor([[5, 6]]), level_state=LevelState(edits=one.edits)).logits
        assert not torch.equal(moved, twin(torch.tensor([[5, 6]])).logits)
    assert any(_hooks(module) for module in stacked.modules())
    unstack_levels(stacked)
    assert not any(_hooks(module) for module in stacked.modules())


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("The capital of France is", ""), "the target of a fact is empty"),
        ((" ", "Rome"), "the prompt of a fact is empty"),
        (("The capital of France is", "Rome", "Spain"), "'Spain' is not in the prompt"),
        (("The capital of France is", "Rome", ""), "'' is not in the prompt"),
        (("water is always", "wet"), "no name or number"),
    ],
)
def test_facts_that_cannot_be_edited(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Fact(*arguments)
    with pytest.raises(TypeError, match="is a text, got int"):
        Fact("The capital of France is", 3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"facts": []}, "no fact to edit"),
        ({"method": "memo"}, "memo"),
        ({"alpha": 1.5}, "alpha=1.5 must be from 0"),
        ({"alpha": 0.5, "method": "memit"}, "edits MLPs only"),
        ({"layers": [3]}, r"layers=\[3\] must name some of the 3 layers"),
        ({"layers": [2]}, "no later layer attends to it"),
        ({"layers": [0, 1], "method": "rome"}, "rome edits one layer"),
    ],
)
def test_arguments_that_cannot_work_change_nothing(model, fields, message) -> None:
    one = session(model)
    with pytest.raises(ValueError, match=message):
        edit(one, **fields)
    assert one.edits == () and one.log == ()
    with pytest.raises(TypeError, match=r"is a nestlearn.Fact\(prompt=..., target=...\), got \('a', 'b'\)"):
        edit(one, [("a", "b")])


def test_models_whose_maps_do_not_add_up_are_refused(model, monkeypatch) -> None:
    one = session(stack_levels(tiny("gemma2", **BYTES), [Level(16)], mode="split"), context_length=32)
    with pytest.raises(ValueError, match="does not add the outputs"):
        edit(one)
    hope = HopeForCausalLM(
        HopeConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                   mixer=SMALL["self_modifying"])
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match="a Hope model learns them by reading"):
        edit(session(hope))
    monkeypatch.setattr("nestlearn.continual.editing.measure.ATTENTION_OUTPUTS", ("attention.out",))
    with pytest.raises(ValueError, match=r"has no mlp\.down_proj, or none of attention\.out"):
        edit(session(model))
