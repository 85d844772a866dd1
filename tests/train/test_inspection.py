"""The figures of `nestlearn info` are those of the model itself."""

from typing import Any

import pytest
import torch

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.train.inspection import model_facts

CONTEXT = 256


def measured_activations(model: HopeForCausalLM) -> int:
    """Bytes that one row's forward pass really keeps for its backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.zeros(1, CONTEXT, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, labels=tokens).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


OWN = {"type": "self_modifying", "chunk_size": 16, "projection_chunk_size": 32}
MEMORY = {"type": "memory", "chunk_size": 16}


@pytest.mark.parametrize(
    "mixer",
    [
        OWN,
        {"type": "attention", "conv_size": 4},
        {"type": "attention", "window": 64},
        MEMORY | {"memory": "deltanet"},
        MEMORY,
        {"type": "titans_mac", "chunk_size": 16, "segment_length": 32},
        {"type": "titans_mag", "chunk_size": 16, "window": 64},
        {"type": "tnt", "chunk_size": 32, "local_windows": [32], "local_chunk_sizes": [16]},
        ["attention", OWN],
    ],
    ids=str,
)
def test_estimates_match_the_model(mixer: Any):
    config = HopeConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mixer=mixer)
    facts = model_facts(config, CONTEXT, batch_size=3)
    model = HopeForCausalLM(config).train()
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.activation_bytes == pytest.approx(3 * measured_activations(model), rel=0.2)
    with torch.no_grad():
        # Inside a chunk, where weights and the weights at its start are two; at its end they share memory.
        cache = model.eval()(torch.zeros(1, CONTEXT - 1, dtype=torch.long), use_cache=True).past_key_values
    assert facts.state_bytes_per_row == pytest.approx(cache.nbytes(), rel=0.1)
    assert facts.rows()[0][0] == "layers"
