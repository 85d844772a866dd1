"""A mixer defined here, as another package would define it, used by its registered name."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from nestlearn import HopeCache, HopeConfig, HopeForCausalLM
from nestlearn.fields import Fraction
from nestlearn.models import row_bytes
from nestlearn.nn import AttentionConfig, MixerConfig, mixer_types, register_mixer
from nestlearn.train.inspection import model_facts


class Average(nn.Module):
    """``y_t = W m_t`` with the mean ``m_t = keep m_{t-1} + (1 - keep) x_t`` of the document."""

    def __init__(self, d_model, config):
        super().__init__()
        self.keep, self.out = config.keep, nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, state=None, mask=None, reset=None, *, writes=True, return_state=True):
        mean, outputs = torch.zeros_like(x[:, 0]) if state is None else state, []
        for t in range(x.shape[1]):
            if reset is not None:
                mean = mean.where(~reset[:, t, None], 0)
            new = torch.lerp(x[:, t], mean, self.keep) if writes else mean
            mean = new if mask is None else new.where(mask[:, t, None], mean)
            outputs.append(mean)
        y = self.out(torch.stack(outputs, 1))
        return (y if mask is None else y.where(mask[..., None], 0)), mean if return_state else None

    def flops_per_token(self, context_length):
        return 2 * self.out.weight.numel()


@register_mixer("tests.average")
@dataclass(frozen=True)
class AverageConfig(MixerConfig):
    keep: Fraction = 0.9

    def build(self, d_model, num_heads):
        return Average(d_model, self)


def config(**fields):
    return HopeConfig(**({
        "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "reset_token_id": 1,
        "bos_token_id": 1, "mixer": {"type": "tests.average", "keep": 0.5},
    } | fields))  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HopeForCausalLM(config()).double()


@pytest.fixture
def ids():
    return torch.randint(2, 20, (3, 11), generator=torch.Generator().manual_seed(0))


def test_it_trains(model, ids):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
def test_it_streams_and_generates_with_a_cache(model, ids):
    model.eval()
    cache = HopeCache()
    pieces = [model(part, past_key_values=cache).logits for part in ids.split([4, 6, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits)
    with_cache, without = (
        model.generate(ids[:, :5], max_new_tokens=6, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    )
    assert with_cache.shape == (3, 11) and torch.equal(with_cache, without)


@torch.no_grad()
def test_it_is_saved_and_loaded_with_its_cache(model, ids, tmp_path):
    model.eval().save_pretrained(tmp_path / "model")
    cache = HopeCache()
    model(ids[:, :6], past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    again = HopeForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    assert again.config.mixers == [AverageConfig(keep=0.5)] * 2
    loaded = HopeCache.load(tmp_path / "cache.safetensors", model=again)
    torch.testing.assert_close(again(ids[:, 6:], past_key_values=loaded).logits, model(ids).logits[:, 6:])


def test_its_cost_is_known_and_layers_may_mix(model):
    mixed = config(mixer=["tests.average", AttentionConfig(window=4)])
    assert [mixer.type for mixer in mixed.mixers] == ["tests.average", "attention"]
    assert row_bytes(config()).mixers == 2 * 16 * 4
    facts = model_facts(mixed, 64, 2)
    assert facts.mixers == ["tests.average", "attention"] and facts.activation_bytes > 0


def test_wrong_options_are_refused_by_name():
    with pytest.raises(ValueError, match="mixer: keep=2 must be a finite number of at least 0 and at most 1"):
        config(mixer={"type": "tests.average", "keep": 2})
    with pytest.raises(ValueError, match="field of the mixer 'tests.average' 'kep'. Did you mean 'keep'"):
        config(mixer={"type": "tests.average", "kep": 0.5})
    with pytest.raises(ValueError, match=r"unknown mixer type 'tests.averag'. Did you mean 'tests.average'"):
        config(mixer="tests.averag")


def test_only_frozen_configurations_with_names_of_their_own_are_registered():
    @dataclass
    class Changeable:
        keep: float = 0.9

    @dataclass(frozen=True)
    class Foreign:
        keep: float = 0.9

    class Plain(MixerConfig):
        pass

    for wrong in (Changeable, Foreign, Plain, AverageConfig(), Average):
        with pytest.raises(TypeError, match=r"@dataclass\(frozen=True\) and derived from nestlearn.nn.MixerConfig"):
            register_mixer("tests.wrong")(wrong)  # pyright: ignore[reportArgumentType]

    @dataclass(frozen=True)
    class Other(MixerConfig):
        keep: float = 0.9

    with pytest.raises(ValueError, match="'tests.average' of .*Other belongs to .*AverageConfig"):
        register_mixer("tests.average")(Other)
    assert mixer_types()["tests.average"] is AverageConfig and "tests.wrong" not in mixer_types()
