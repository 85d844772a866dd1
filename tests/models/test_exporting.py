"""An exported step of decoding gives the logits and the states of the model, token after token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.mixers import slow_unless
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.models.exporting import DecodeStep, export_step

MODELS: dict[str, dict[str, Any]] = {
    "hope": {"mixer": {"type": "self_modifying", "architecture": "matrix", "chunk_size": 4}},
    "transformer": {"mixer": {"type": "attention", "conv_size": 4}},
    "window": {"mixer": {"type": "attention", "window": 6}},
    "levels": {
        "mixer": {"type": "memory", "memory": "deltanet", "chunk_size": 4},
        "cms": [{"period": 3, "expansion": 1}, {"expansion": 2}],
    },
}
PROMPT, TOKENS = 9, 20


def make(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    }
    return HopeForCausalLM(HopeConfig(**sizes | MODELS[name] | fields)).eval()


def tensors(cache: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(cache.layers) if isinstance(leaf, Tensor)]


@torch.no_grad()
@pytest.mark.parametrize("name", [slow_unless(name in ("hope", "transformer"), name) for name in MODELS])
def test_the_program_gives_the_logits_and_states_of_the_model(name: str, tmp_path: Path) -> None:
    model = make(name)
    ids = torch.randint(50, (2, PROMPT + TOKENS))
    cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
    program, state = export_step(model, cache)
    torch.export.save(program, tmp_path / "step.pt2")
    run = torch.export.load(tmp_path / "step.pt2").module()
    first, changed, logits = [x.clone() for x in state], set[int](), torch.empty(0)
    for t in range(PROMPT, PROMPT + TOKENS):
        token = ids[:, t : t + 1]
        logits, *state = run(token, *state)
        expected = model(token, past_key_values=cache, use_cache=True)
        cache = expected.past_key_values
        assert torch.allclose(logits, expected.logits, atol=1e-5)
        for a, b in zip(state, tensors(cache), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, atol=1e-5)
        changed |= {i for i, (a, b) in enumerate(zip(state, first, strict=True)) if not torch.equal(a, b)}
    assert len(changed) > len(state) / 2  # the state goes on
    assert (logits - model(ids).logits[:, -1:]).abs().max() <= 1e-4


def test_what_cannot_be_a_step_is_refused() -> None:
    ids = torch.arange(6)[None]
    learning = make("hope", cms=[{"period": 4, "expansion": 1}, {"expansion": 1}], cms_signal="loss")
    with pytest.raises(ValueError, match="take a backward pass"):
        export_step(learning, learning(ids, use_cache=True).past_key_values)
    model = make("hope")
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="training mode"):
        export_step(model.train(), cache)
    with pytest.raises(ValueError, match="has read nothing yet"):
        DecodeStep(model, type(cache)())
