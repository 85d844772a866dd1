"""The baselines that read: what they remember, what they forget, and that copies are independent."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from nestlearn.continual import FineTuning, FineTuningReader, InContextReader
from nestlearn.continual.methods import OptimizerFactory
from nestlearn.data import byte_tokenizer
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
        with pytest.raises(ValueError, match="context_length=1 must be at least 2"):
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

    def test_copies_are_independent(self, model: HopeForCausalLM) -> None:
        reader = FineTuningReader(model, TOKENIZER, partial(torch.optim.AdamW, lr=1e-3))
        reader.read("some text")
        fork = reader.fork()
        expected = reader.read("more of it")
        assert fork.read("more of it") == expected
        fork.read("something else")
        assert reader.read("the end") != fork.read("the end")

    def test_bad_sizes(self, model: HopeForCausalLM) -> None:
        with pytest.raises(ValueError, match="passes=0 at least 1"):
            FineTuningReader(model, TOKENIZER, torch.optim.SGD, passes=0)
