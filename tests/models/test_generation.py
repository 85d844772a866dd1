"""`generate` with the cache equals `generate` without it."""

import pytest
import torch

from nestlearn import HopeCache

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


def generate(model, ids, **options):
    torch.manual_seed(5)
    return model.generate(ids, max_new_tokens=7, **options)


@pytest.mark.parametrize("mode", MODES)
def test_cached_equals_cache_free(build, ids, mixer, mode):
    model = build(mixer)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = MODES[mode] | {"attention_mask": mask}
    assert torch.equal(generate(model, ids, **options), generate(model, ids, use_cache=False, **options))


def test_left_padding_equals_each_prompt_alone(build, ids, mixer):
    model = build(mixer, eos_token_id=None)
    lengths = (7, 11, 4)
    mask = torch.tensor([[0] * (11 - n) + [1] * n for n in lengths])
    together = generate(model, ids, attention_mask=mask, do_sample=False)
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, -length:], do_sample=False)
        assert together[row, 11 - length :].tolist() == alone[0].tolist()


def test_prefill_in_chunks(build, ids, mixer):
    model = build(mixer)
    whole = generate(model, ids, do_sample=False)
    assert torch.equal(whole, generate(model, ids, do_sample=False, prefill_chunk_size=4))


def test_going_on_from_a_cache(build, ids, mixer):
    model = build(mixer, eos_token_id=None)
    expected = model.generate(ids, max_new_tokens=9, do_sample=False)
    cache = HopeCache()
    first = model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)
    # The last generated token has not been read yet.
    assert cache.seen == 14
    options = {"attention_mask": torch.ones_like(first), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(first, past_key_values=cache.fork(), **options), expected)
    # Only the new tokens, with a mask over all.
    part = model.generate(first[:, -1:], past_key_values=cache, **options)
    assert torch.equal(part[:, 1:], expected[:, 15:])


def test_generating_from_embeddings(build, ids):
    model = build()
    expected = generate(model, ids, do_sample=False)
    embeds = model.get_input_embeddings()(ids)
    made = model.generate(inputs_embeds=embeds, max_new_tokens=7, do_sample=False)
    assert torch.equal(made, expected[:, 11:])


def test_input_already_read_is_refused(build, ids):
    model, cache = build(), HopeCache()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="already read 11"):
        model.generate(ids[:, :5], past_key_values=cache, max_new_tokens=2)


def test_assisted_decoding_is_refused(build, ids):
    model = build()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids[:1], assistant_model=build(), max_new_tokens=2)


def test_a_whole_generation_leaves_the_model_unchanged(build, ids, mixer):
    model = build(mixer)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    generate(model, ids, do_sample=False)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
