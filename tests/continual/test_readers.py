"""The baselines that read: what they remember, what they forget, and that copies are independent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from nestlearn.continual import (
    CMS,
    EWC,
    ExperienceReplay,
    FineTuning,
    FineTuningReader,
    InContextReader,
    LoRA,
    Method,
    Projection,
    Transfer,
)
from nestlearn.continual.methods import OptimizerFactory
from nestlearn.data import byte_tokenizer
from nestlearn.evals.learning import model_bits_per_byte
from nestlearn.models import HopeConfig, HopeForCausalLM

TOKENIZER = byte_tokenizer()


@pytest.fixture
def model() -> HopeForCausalLM:
    torch.manual_seed(0)
    config = HopeConfig(mixer="attention", hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    return HopeForCausalLM(config).eval()


class TestInContext:
    def test_a_prompt_comes_after_what_was_read(self, model: HopeForCausalLM) -> None:
        reader, fresh = InContextReader(model, TOKENIZER, 64), InContextReader(model, TOKENIZER, 64)
        reader.read("abcde")
        assert reader.generate("fgh", max_new_tokens=8) == fresh.generate("abcdefgh", max_new_tokens=8)

    def test_only_the_end_fits(self, model: HopeForCausalLM) -> None:
        reader, short = InContextReader(model, TOKENIZER, 32), InContextReader(model, TOKENIZER, 32)
        reader.read("x" * 50)
        assert reader.read("0123456789" * 3) == 32
        short.read("789")
        room = 32 - 1 - 20 - 8  # the start of the text, the prompt and the answer
        assert room == 3
        assert reader.generate("p" * 20, max_new_tokens=8) == short.generate("p" * 20, max_new_tokens=8)

    def test_copies_are_independent(self, model: HopeForCausalLM) -> None:
        reader = InContextReader(model, TOKENIZER, 64)
        reader.read("one")
        other = reader.fork()
        other.read("two")
        fresh = InContextReader(model, TOKENIZER, 64)
        assert reader.generate("?", max_new_tokens=4) == fresh.generate("one?", max_new_tokens=4)
        assert other.generate("?", max_new_tokens=4) == fresh.generate("onetwo?", max_new_tokens=4)

    def test_bad_sizes(self, model: HopeForCausalLM) -> None:
        with pytest.raises(ValueError, match="context_length=1 must be a whole number of at least 2"):
            InContextReader(model, TOKENIZER, 1)
        with pytest.raises(ValueError, match="do not fit into context_length=8"):
            InContextReader(model, TOKENIZER, 8).generate("abcdef", max_new_tokens=4)


class TestFineTuning:
    def test_reading_changes_the_copy_alone(self, model: HopeForCausalLM) -> None:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        reader = FineTuningReader(model, TOKENIZER, partial(torch.optim.AdamW, lr=3e-3), context_length=32, passes=40)
        losses = reader.read("the answer is blue\n" * 4)
        assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
        assert reader.generate("the answer", max_new_tokens=12) == " is blue"
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_a_step_is_the_gradient_of_the_mean_loss(self, model: HopeForCausalLM) -> None:
        reader = FineTuningReader(model, TOKENIZER, partial(torch.optim.SGD, lr=0.1), context_length=64)
        ids = torch.tensor([[256, *b"hello world"]])
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert reader.read("hello world") == [pytest.approx(loss.item(), rel=1e-5)]
        scale = 0.1 * min(1.0, 1.0 / norm.item())
        for old, new, gradient in zip(model.parameters(), reader.model.parameters(), gradients, strict=True):
            torch.testing.assert_close(new, old - scale * gradient, rtol=1e-4, atol=1e-6)

    def test_only_gradients_of_what_is_trained_are_bounded(self, model: HopeForCausalLM) -> None:
        class Head(FineTuning):
            def make_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> torch.optim.Optimizer:
                assert isinstance(model, HopeForCausalLM)
                return factory(model.lm_head.parameters())

        reader = FineTuningReader(model, TOKENIZER, partial(torch.optim.SGD, lr=1.0), method=Head())
        for text in ("hello world", "another text"):
            before = copy.deepcopy(reader.model)
            ids = torch.tensor([[256, *text.encode()]])
            loss = torch.nn.functional.cross_entropy(before(ids[:, :-1]).logits[0], ids[0, 1:])
            (gradient,) = torch.autograd.grad(loss, [before.lm_head.weight])
            reader.read(text)
            expected = before.lm_head.weight - gradient * min(1.0, 1.0 / gradient.norm().item())
            torch.testing.assert_close(reader.model.lm_head.weight, expected, rtol=1e-4, atol=1e-6)

    def test_bad_arguments(self, model: HopeForCausalLM) -> None:
        with pytest.raises(ValueError, match="passes is 0; it must be a whole number"):
            FineTuningReader(model, TOKENIZER, torch.optim.SGD, passes=0)
        with pytest.raises(ValueError, match="EWC acts at the ends of tasks, and boundaries is 'unknown'. Use CMS or"):
            FineTuningReader(model, TOKENIZER, torch.optim.SGD, method=EWC(1.0), boundaries="unknown")
        with pytest.raises(ValueError, match="nothing to predict"):
            FineTuningReader(model, TOKENIZER, torch.optim.SGD).read("")

    def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_are(self, model: HopeForCausalLM) -> None:
        model.lm_head.weight.data[7, 3] = float("nan")
        reader = FineTuningReader(model, TOKENIZER, SGD, context_length=8)
        with pytest.raises(ValueError, match="The loss is nan at step 1 of fine-tuning"):
            reader.read("some text")
        assert not reader.model.training
        assert sum(int(p.isnan().sum()) for p in reader.model.parameters()) == 1
        with pytest.raises(ValueError, match="loss on a text of 9 characters is nan nats"):
            model_bits_per_byte(reader.model, TOKENIZER, "some text", 8)

    def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_are(self, model: HopeForCausalLM) -> None:
        reader = FineTuningReader(model, TOKENIZER, SGD, context_length=8)
        reader.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
        before = copy.deepcopy(reader.model.state_dict())
        with pytest.raises(ValueError, match="The gradients' norm is (nan|inf) at step 1 of fine-tuning"):
            reader.read("some text")
        assert all(torch.equal(value, before[name]) for name, value in reader.model.state_dict().items())


SGD = partial(torch.optim.SGD, lr=0.1)


class TestMethods:
    # Made when it is needed: LoRA imports peft.
    @pytest.mark.parametrize(
        "make",
        [
            FineTuning,
            lambda: CMS(projection=Projection(alpha=1.0, unit="steps", period=None)),
            lambda: CMS(projection=Projection(alpha=1.0, unit="steps", period=3), transfer=Transfer(period=2)),
            lambda: EWC(10.0),
            lambda: ExperienceReplay(4),
            lambda: LoRA(2),
        ],
        ids=["fine-tuning", "projection", "projection and transfer", "ewc", "replay", "lora"],
    )
    def test_a_copy_learns_as_the_reader_does(self, model: HopeForCausalLM, make: Callable[[], Method]) -> None:
        adamw = partial(torch.optim.AdamW, lr=1e-3)  # it has moments to copy
        reader = FineTuningReader(model, TOKENIZER, adamw, context_length=8, method=make())
        reader.read("some text of several windows")
        fork = reader.fork()
        expected = reader.read("more of it, in other words")
        assert fork.read("more of it, in other words") == expected
        fork.read("something else")
        assert reader.read("the end") != fork.read("the end")

    @pytest.mark.parametrize(
        "make", [FineTuning, lambda: LoRA(2), lambda: LoRA(2, after_task=0)], ids=["all", "lora", "later"]
    )
    def test_reading_leaves_the_model_in_its_mode(self, model: HopeForCausalLM, make: Callable[[], Method]) -> None:
        for training in (False, True):
            reader = FineTuningReader(model.train(training), TOKENIZER, SGD, context_length=8, method=make())
            reader.read("some text")
            assert {module.training for module in reader.model.modules()} == {training}

    def test_the_given_method_stays_as_it_was(self, model: HopeForCausalLM) -> None:
        method = EWC(10.0)
        FineTuningReader(model, TOKENIZER, SGD, method=method).read("some text")
        assert not method.fisher

    def test_ewc_pulls_each_step_and_is_not_in_the_loss_reported(self, model: HopeForCausalLM) -> None:
        method = EWC(1e3, labels="data")
        reader = FineTuningReader(model, TOKENIZER, SGD, context_length=8, method=method)
        reader.read("one text")
        twin = copy.deepcopy(reader.model)
        weights, centre = list(twin.parameters()), [p.detach().clone() for p in twin.parameters()]
        ids = torch.tensor([[256, *b"one text"]])
        loss = torch.nn.functional.cross_entropy(twin(ids[:, :8]).logits[0], ids[0, 1:9], reduction="sum")
        fisher = [gradient.square() for gradient in torch.autograd.grad(loss, weights)]
        ids, losses = torch.tensor([[256, *b"in sixteen bytes"]]), []
        for first in (0, 8):
            logits = twin(ids[:, first : first + 8]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, first + 1 : first + 9])
            losses.append(loss.item())
            gradients = torch.autograd.grad(loss, weights)
            pulls = [1e3 * f * (w - c) for f, w, c in zip(fisher, weights, centre, strict=True)]
            whole = [(g + p).detach() for g, p in zip(gradients, pulls, strict=True)]
            scale = 0.1 * min(1.0, 1.0 / torch.stack([g.norm() for g in whole]).norm().item())
            for weight, gradient in zip(weights, whole, strict=True):
                weight.data -= scale * gradient
        assert reader.read("in sixteen bytes") == pytest.approx(losses, rel=1e-4)
        for found, expected in zip(reader.model.parameters(), weights, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_a_projection_without_a_period_is_refreshed_where_a_text_ends(self, model: HopeForCausalLM) -> None:
        method = CMS(projection=Projection(alpha=1e-6, unit="steps", period=None))
        plain = FineTuningReader(model, TOKENIZER, SGD, context_length=8)
        guarded = FineTuningReader(model, TOKENIZER, SGD, context_length=8, method=method)
        # Nothing is closed while the first text is read.
        assert plain.read("a text of some windows") == guarded.read("a text of some windows")
        ids = torch.tensor([[256, *b"a text "]])
        kept = guarded.model(ids).logits.detach(), plain.model(ids).logits.detach()
        for reader in (plain, guarded):
            reader.read("b other b other")
        moved = [float((r.model(ids).logits - k).detach().norm()) for r, k in zip((guarded, plain), kept, strict=True)]
        assert 0.0 < moved[0] < 0.5 * moved[1]

    def test_replay_of_texts_of_other_lengths_asks_for_no_padding(self, model: HopeForCausalLM) -> None:
        reader = FineTuningReader(model, TOKENIZER, SGD, context_length=16, method=ExperienceReplay(4))
        reader.read("short")
        before = copy.deepcopy(reader.model)
        both = [torch.tensor([[256, *text]]) for text in (b"a longer one", b"short")]
        losses = [
            torch.nn.functional.cross_entropy(before(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum").item()
            for ids in both
        ]
        assert reader.read("a longer one") == [pytest.approx(sum(losses) / (12 + 5), rel=1e-5)]

    def test_adapters_after_the_first_text(self, model: HopeForCausalLM) -> None:
        reader = FineTuningReader(model, TOKENIZER, SGD, method=LoRA(2, after_task=0))
        reader.read("in full")
        assert sum(p.requires_grad for p in reader.model.parameters()) < len(list(reader.model.parameters()))
        frozen = [p.detach().clone() for p in reader.model.parameters() if not p.requires_grad]
        reader.read("by adapters")
        still = [p for p in reader.model.parameters() if not p.requires_grad]
        assert all(torch.equal(a, b) for a, b in zip(still, frozen, strict=True))
