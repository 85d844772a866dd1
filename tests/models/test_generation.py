"""`generate` with the cache equals `generate` without it."""

import pytest
import torch
from tests.mixers import KINDS, SMALL, slow_unless
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StoppingCriteria

from nestlearn import HopeCache
from nestlearn.data import byte_tokenizer
from nestlearn.models import generate_texts
from nestlearn.models.stacking import read_segment, stack_levels
from nestlearn.nn import Level

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


def generate(model, ids, **options):
    torch.manual_seed(5)
    return model.generate(ids, max_new_tokens=7, **options)


# A choice among equal logits does not depend on the mixer; beams reorder its cache. The tests below are greedy.
@pytest.mark.parametrize("mode", [slow_unless(mode == "sampled beams", mode) for mode in MODES])
def test_cached_equals_cache_free(build, ids, mixer, mode):
    model = build(mixer)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = MODES[mode] | {"attention_mask": mask}
    assert torch.equal(generate(model, ids, **options), generate(model, ids, use_cache=False, **options))


class EndOfFirstRow(StoppingCriteria):
    """Ends row 0 after thirteen columns."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.arange(len(input_ids)) == (0 if input_ids.shape[1] == 13 else -1)


LEVELS = {
    "fixed": {},
    "local": {"cms": [{"period": 3, "expansion": 1}, {"period": 6, "expansion": 1}]},
    "loss": {"cms": [{"period": 3, "expansion": 1, "lr": 0.3}, {"expansion": 1}], "cms_signal": "loss"},
    "nested": {"cms": [{"period": 2, "expansion": 1}, {"period": 4, "expansion": 1}], "cms_variant": "nested"},
}


@pytest.mark.parametrize(
    ("mixer", "levels"),
    [
        slow_unless(mixer in ("attention", "self_modifying") or (mixer in KINDS and levels == "fixed"),
                    mixer, levels)
        for mixer in SMALL
        for levels in LEVELS
    ],
)  # fmt: skip
def test_a_row_that_has_ended_learns_no_more(build, ids, mixer, levels):
    """Its cache, read on with a mask that hides the padding, is that of its text alone."""
    model = build(mixer, eos_token_id=None, num_hidden_layers=1, **LEVELS[levels])
    cache, more, mask = HopeCache(), ids.flip(1)[:, :6], torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "eos_token_id": 2, "suppress_tokens": [2], "pad_token_id": 0}
    made = generate(model, ids, past_key_values=cache, stopping_criteria=[EndOfFirstRow()], do_sample=False, **options)
    assert cache.seen == 17 and made[0, 13:].tolist() == [0] * 5
    with torch.no_grad():
        later = model(more, past_key_values=cache).logits[0]
        alone = model(torch.cat([made[0, 3:13], more[0]])[None]).logits[0, -6:]
    torch.testing.assert_close(later, alone, rtol=1e-9, atol=1e-9)


def test_a_row_of_a_stacked_model_that_has_ended(ids):
    """Stacked levels learn nothing in `generate`; with a mask over all columns, the cache is that of the text."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = stack_levels(LlamaForCausalLM(config).double().eval(), [Level(period=4, lr=100)], mode="split")
    state = read_segment(model, ids[:, :4]).state
    options = {"eos_token_id": 2, "suppress_tokens": [2], "pad_token_id": 0, "level_state": state}
    cache, mask, more = DynamicCache(), torch.ones(3, 23, dtype=torch.long), ids.flip(1)[:, :6]
    mask[0, :3], mask[0, 13:17] = 0, 0
    options |= {"attention_mask": mask[:, :11], "past_key_values": cache}
    made = generate(model, ids, stopping_criteria=[EndOfFirstRow()], do_sample=False, **options)
    with torch.no_grad():
        # Positions count the tokens of the text.
        places = torch.arange(10, 16).expand(3, 6)
        later = model(more, past_key_values=cache, attention_mask=mask, position_ids=places, level_state=state)
        text = torch.cat([made[0, 3:13], more[0]])[None]
        alone = model(text, level_state=state.index_rows([0])).logits[0, -6:]
    torch.testing.assert_close(later.logits[0], alone, rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize("seed", [0, None])
def test_draws_follow_temperature_and_top_p(build, seed):
    model, tokenizer, rows = build(vocab_size=259), byte_tokenizer(), 4000
    prompt = [5, 6, 7]
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.6).sum()) + 1]
    kept = kept[kept < 128]  # bytes that are letters on their own
    torch.manual_seed(1)
    texts = generate_texts(model, tokenizer, [prompt] * rows, max_new_tokens=1, temperature=1.5, top_p=0.6, seed=seed)
    expected = (p / p[order].cumsum(0)[int((p[order].cumsum(0) < 0.6).sum())])[kept]
    found = torch.tensor([texts.count(chr(token)) / rows for token in kept.tolist()])
    deviation = (expected * (1 - expected) / rows).sqrt()
    assert len(kept) > 5 and ((found - expected).abs() < 4 * deviation).all()


def test_generated_rows_are_those_of_each_prompt_alone(build):
    model, tokenizer = build(vocab_size=259), byte_tokenizer()
    prompts = [[5, 6, 7], [8], [9, 10]]
    together = generate_texts(model, tokenizer, prompts, max_new_tokens=6)
    assert together == [generate_texts(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    word = next(letter for letter in together[0][1:] if letter != together[0][0])
    cut = generate_texts(model, tokenizer, prompts, max_new_tokens=6, stop=["", word])
    assert cut == [text.split(word)[0] for text in together] and cut[0]
