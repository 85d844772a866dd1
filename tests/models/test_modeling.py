"""HopeForCausalLM: splits, padding, documents, loss, checkpointing, compilation, files, refusals."""

import math
from itertools import pairwise

import pytest
import torch
from tests.mixers import ATTENTION, SMALL
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nestlearn import HopeCache, HopeConfig, HopeForCausalLM
from nestlearn.nn.state import flatten_state

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("sizes", [[3, 1, 4, 3], [1] * 11, [10, 1]])
def test_reading_in_parts_equals_reading_at_once(build, ids, mixer, sizes):
    model, cache = build(mixer), HopeCache()
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, **CLOSE)
    assert cache.get_seq_length() == 11


def test_padding_anywhere_changes_nothing(build, ids, mixer):
    model = build(mixer)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], [0] + [1] * 10, [1] * 9 + [0, 0]])
    with torch.no_grad():
        whole, cache = model(ids, attention_mask=mask).logits, HopeCache()
        parts = [
            model(part, attention_mask=mask[:, :end], past_key_values=cache).logits
            for part, end in zip(ids.split([2, 6, 3], 1), (2, 8, 11), strict=True)
        ]
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real]).logits[0]
            torch.testing.assert_close(whole[row, real], alone, **CLOSE)
            torch.testing.assert_close(torch.cat(parts, 1)[row, real], alone, **CLOSE)


def test_documents_do_not_see_each_other(build, ids, mixer):
    model = build(mixer, reset_token_id=1)
    ids[0, 4], ids[1, 2], ids[1, 9] = 1, 1, 1
    with torch.no_grad():
        together = model(ids).logits
        for row, bounds in enumerate([(0, 4, 11), (0, 2, 9, 11), (0, 11)]):
            for start, end in pairwise(bounds):
                alone = model(ids[row : row + 1, start:end]).logits
                torch.testing.assert_close(together[row : row + 1, start:end], alone, **CLOSE)


def test_three_ways_to_start_a_document(build, ids, mixer):
    model = build(mixer)
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[:, 5] = True
    position_ids = torch.cat((torch.arange(5), torch.arange(6)))[None].expand(3, -1)
    with torch.no_grad():
        expected = model(ids[:, 5:]).logits
        for ways in ({"reset": reset}, {"position_ids": position_ids}):
            torch.testing.assert_close(model(ids, **ways).logits[:, 5:], expected, **CLOSE)
        cache = HopeCache()
        model(ids[:, :5], past_key_values=cache)
        cache.reset([0, 2])
        after = model(ids[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(after[[0, 2]], expected[[0, 2]], **CLOSE)
    assert cache.pending_reset is None


def test_a_forgotten_row_waits_for_its_first_real_token(build, ids):
    model, cache = build("attention"), HopeCache()
    mask = torch.tensor([[0, 0, 0], [0, 1, 1], [1, 1, 1]])
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        cache.reset(torch.tensor([True, True, False]))
        middle = model(ids[:, 5:8], attention_mask=mask, past_key_values=cache).logits
        assert cache.pending_reset.tolist() == [True, False, False]
        last = model(ids[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(middle[1:2, 1:], model(ids[1:2, 6:8]).logits, **CLOSE)
        torch.testing.assert_close(last[:1], model(ids[:1, 8:]).logits, **CLOSE)
        torch.testing.assert_close(last[1:2], model(ids[1:2, 6:]).logits[:, 2:], **CLOSE)
        torch.testing.assert_close(last[2:], model(ids[2:]).logits[:, 8:], **CLOSE)


def test_rows_and_the_past_are_independent_of_other_tokens(build, ids, mixer):
    model, other = build(mixer), ids.clone()
    other[0], other[1, 7:] = 7, 9
    with torch.no_grad():
        first, second = model(ids).logits, model(other).logits
    assert torch.equal(first[2], second[2])
    assert torch.equal(first[1, :7], second[1, :7])


def test_initial_loss_is_that_of_guessing(build, ids, mixer):
    loss = build(mixer, initializer_range=0.02)(ids, labels=ids).loss
    assert abs(loss.item() - math.log(50)) < 0.05 * math.log(50)


def test_loss_is_shifted_masked_and_divided(build, ids):
    model = build()
    labels = ids.clone()
    labels[:, :6] = -100
    output = model(ids, labels=labels)
    chosen = output.logits[:, 5:-1].log_softmax(-1).gather(-1, ids[:, 6:, None]).squeeze(-1)
    torch.testing.assert_close(output.loss, -chosen.mean())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=7).loss, -chosen.sum() / 7)
    assert output.past_key_values is None
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, labels=labels, logits_to_keep=2)


def test_every_parameter_learns(build, ids, mixer):
    model = build(mixer).train()
    model(ids, labels=ids).loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert dead == []


@pytest.mark.parametrize("levels", ["fixed", "local", "loss"])
def test_gradients_through_a_carried_cache_are_kept_or_the_call_is_refused(build, ids, mixer, levels):
    if mixer == "levels":
        pytest.skip("levels of its own")
    fields = {"fixed": {}, "local": {"cms": [{"period": 4}]}, "loss": {"cms": [{"period": 4}], "cms_signal": "loss"}}
    model, gradients = build(mixer, num_hidden_layers=1, **fields[levels]).train(), []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options is not None:
            model.activation_checkpointing_enable(options)
        try:
            cache = model(ids[:, :8], use_cache=True).past_key_values
            model(ids[:, 8:], past_key_values=cache).logits.square().mean().backward()
        except ValueError as error:
            assert options == {"use_reentrant": True} and "'use_reentrant': False" in str(error)
            continue
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert len(gradients) == 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_gradient_checkpointing_gives_the_same_gradients(build, ids, mixer):
    gradients = []
    for checkpointing in (False, True):
        model = build(mixer, reset_token_id=5).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        cache = HopeCache()
        loss = sum(model(part, labels=part, past_key_values=cache).loss for part in ids.split([6, 5], 1))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_saved_and_loaded_models_are_equal_to_the_bit(build, ids, mixer, tmp_path):
    model = build(mixer, tie_word_embeddings=mixer == "attention").float()
    model.save_pretrained(tmp_path)
    for loader in (HopeForCausalLM, AutoModelForCausalLM):
        again = loader.from_pretrained(tmp_path)
        assert isinstance(again, HopeForCausalLM)
        assert {n: p.tolist() for n, p in again.named_parameters()} == {
            n: p.tolist() for n, p in model.named_parameters()
        }
        # Weights are equal to the bit. Outputs are within rounding: loaded weights may be aligned otherwise in memory,
        # and some processors then add in another order.
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model(ids).logits, **ROUNDING)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    with torch.no_grad():
        base = AutoModel.from_pretrained(tmp_path)
        torch.testing.assert_close(base(ids).last_hidden_state, model.model(ids).last_hidden_state, **ROUNDING)


def test_sharded_files(build, ids, tmp_path):
    model = build().float()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        again = HopeForCausalLM.from_pretrained(tmp_path)
        assert all(torch.equal(p, dict(again.named_parameters())[n]) for n, p in model.named_parameters())
        torch.testing.assert_close(again(ids).logits, model(ids).logits, **ROUNDING)


def test_half_precision_weights_and_autocast(build, ids, mixer, tmp_path):
    """Fast weights stay in fp32, whatever the slow weights or the context are."""
    build(mixer).float().save_pretrained(tmp_path)
    half = HopeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    output = half(ids, labels=ids, use_cache=True)
    output.loss.backward()
    assert (output.logits.dtype, output.loss.dtype) == (torch.bfloat16, torch.float32)
    full = HopeForCausalLM.from_pretrained(tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = full(ids, labels=ids, use_cache=True)
    cast.loss.backward()
    expected = full(ids, labels=ids).loss
    torch.testing.assert_close(cast.loss, expected, rtol=0.05, atol=0)
    torch.testing.assert_close(output.loss, expected, rtol=0.05, atol=0)
    for model in (half, full):
        assert all(p.grad.isfinite().all() for p in model.parameters())
    for cache in (output.past_key_values, cast.past_key_values):
        weights = [x for name, x in flatten_state(cache.layers[0])[0].items() if ".params." in name]
        assert {x.dtype for x in weights} == ({torch.float32} if mixer not in ATTENTION else set())


def test_tied_embeddings_are_one_parameter(build, tmp_path):
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert build(tie_word_embeddings=False).num_parameters() - model.num_parameters() == 50 * 16
    model.save_pretrained(tmp_path)
    again = HopeForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_missing_weights_get_their_own_initial_values(build, mixer, tmp_path):
    """A checkpoint without the mixers: what is there is kept, the rest starts as a new model's."""
    from safetensors.torch import load_file, save_file

    model = build(mixer).float()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {n: w for n, w in weights.items() if ".mixer." not in n or n.endswith("0.mixer.out.weight")}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    again = HopeForCausalLM.from_pretrained(tmp_path)
    for name, parameter in again.named_parameters():
        assert parameter.isfinite().all(), name
        if name in kept:
            assert torch.equal(parameter, kept[name]), name
        elif weights[name].std() == 0:
            assert torch.equal(parameter, weights[name]), name
        else:
            assert 0.3 < parameter.std() / weights[name].std() < 3, name


# torch's tracer itself instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "mixer",
    [name if name == "attention" else pytest.param(name, marks=pytest.mark.slow) for name in [*SMALL, "levels"]],
)
def test_compiled_model_has_no_graph_break(build, ids, mixer):
    torch._dynamo.reset()
    model = build(mixer)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, **CLOSE)
        reset = torch.zeros_like(ids, dtype=torch.bool)
        torch.testing.assert_close(compiled(ids, reset=reset, use_cache=False).logits, model(ids).logits, **CLOSE)


def test_writes_off_leaves_attention_as_it_is(build, ids):
    model = build("attention")
    with torch.no_grad():
        assert torch.equal(model(ids, writes=False).logits, model(ids).logits)


def test_other_outputs(build, ids):
    model = build()
    with torch.no_grad():
        full = model(ids, output_hidden_states=True)
        assert len(full.hidden_states) == 3
        assert torch.equal(model.lm_head(full.hidden_states[-1]), full.logits)
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full.logits[:, -2:], **CLOSE)
        some = model(ids, logits_to_keep=torch.tensor([0, 3])).logits
        torch.testing.assert_close(some, full.logits[:, [0, 3]], **CLOSE)
        assert isinstance(model(ids, return_dict=False), tuple)
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, full.logits)
        assert model(ids, use_cache=False).past_key_values is None


def test_hidden_states_are_those_between_the_blocks(build, ids, mixer):
    model = build(mixer).eval()
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        assert torch.equal(states[0], model.model.embed_tokens(ids))
        torch.testing.assert_close(model.model.norm(model.model.layers[1](states[1])[0]), states[2], **CLOSE)


@pytest.mark.parametrize("mixers", [["attention", "attention"], ["attention", "tnt"]])
def test_attention_weights_are_refused_by_name(build, ids, mixers):
    model = build(mixers).eval()
    with pytest.raises(ValueError, match=f"{mixers[-1]}\\) return no attention weights"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="attention"):
        model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_attentions=True)
    assert model(ids, output_attentions=False).attentions is None


@pytest.mark.parametrize("label", [50, -1, -101])
def test_labels_outside_the_vocabulary_are_refused(build, ids, label):
    labels = ids.clone()
    labels[1, 4] = label
    with pytest.raises(ValueError, match=rf"labels contains {label}, .* 0\.\.49"):
        build()(ids, labels=labels)
    with pytest.raises(ValueError, match="dtype"):
        build()(ids, labels=ids.double())


def test_no_label_to_predict_gives_0_and_a_warning(build, ids):
    model, none = build(), torch.full_like(ids, -100)
    with pytest.warns(UserWarning, match="every label"):
        loss = model(ids, labels=none).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    for items in (0, torch.tensor(0), 7):
        assert model(ids, labels=none, num_items_in_batch=items).loss.item() == 0
    with pytest.warns(UserWarning, match="every label"):
        assert model(ids[:, :1], labels=ids[:, :1]).loss.item() == 0


def test_a_cache_is_read_but_not_changed_without_use_cache(build, ids):
    model, cache = build(), HopeCache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        first = model(ids[:, 5:], past_key_values=cache, use_cache=False).logits
        assert torch.equal(model(ids[:, 5:], past_key_values=cache).logits, first)
    assert cache.seen == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, "at least one"),
        ({"input_ids": torch.zeros(1, 3)}, "dtype"),
        ({"input_ids": torch.tensor([[3, 50]])}, "50.*tokenizer"),
        ({"input_ids": torch.tensor([[3, -1]])}, "-1"),
        ({}, "neither"),
        ({"input_ids": torch.tensor([[3]]), "inputs_embeds": torch.zeros(1, 1, 16)}, "both"),
        ({"inputs_embeds": torch.zeros(1, 1, 17)}, "17"),
        ({"inputs_embeds": torch.zeros(1, 1, 16, dtype=torch.long)}, "dtype"),
        ({"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 1)}, "attention_mask"),
        ({"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 1, 2, 2)}, "attention_mask"),
        ({"input_ids": torch.tensor([[3, 4]]), "reset": torch.zeros(1, 2)}, "reset"),
        ({"input_ids": torch.tensor([[3, 4]]), "past_key_values": ((1,),)}, "HopeCache"),
    ],
)
def test_bad_input(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build()(**arguments)


def test_a_cache_of_another_model_or_batch_is_refused(build, ids):
    cache = HopeCache()
    build()(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"mixer.rope_theta \(cache 10000.0, model 500.0\)"):
        build(rope_theta=500.0)(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="3 rows"):
        build()(ids[:2], past_key_values=cache)


def test_a_model_of_a_changed_configuration_is_checked():
    config = HopeConfig()
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match="num_attention_heads=5"):
        HopeForCausalLM(config)


def test_levels_that_move_by_the_meta_gradient_go_on_from_a_file_and_train(build, tmp_path):
    """Any split, also through a saved cache and without gradients, equals one call; checkpointed layers train alike."""
    levels = [{"period": 2, "hidden": 5}, {"period": 6, "hidden": 4}, {"expansion": 1}]
    fields = {"cms": levels, "cms_variant": "nested"}
    model = build(cms_transfer_by="gradient", **fields)
    ids = torch.randint(3, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    whole = model(ids).logits
    other = build(**fields)(ids).logits
    torch.testing.assert_close(whole[:, :6], other[:, :6], rtol=1e-9, atol=1e-10)
    assert (whole - other)[:, 6:].abs().max() > 1e-4
    with torch.inference_mode():
        cache = HopeCache()
        parts = [model(ids[:, :9], past_key_values=cache).logits]
        cache.save(tmp_path / "a.cache")
        cache = HopeCache.load(tmp_path / "a.cache", model)
        parts += [model(part, past_key_values=cache).logits for part in ids[:, 9:].split([1, 2, 8], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="cms_transfer_by"):
        build(**fields)(ids, past_key_values=cache)
    gradients = []
    for checkpointing in (False, True):
        model = build(cms_transfer_by="gradient", **fields).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert all(g is not None and g.isfinite().all() for g in gradients[-1])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def recall(batch):
    """Pairs of a key and a value, then the same pairs again."""
    keys = torch.stack([torch.randperm(4) for _ in range(batch)])
    pairs = torch.stack([keys, 4 + torch.randint(0, 4, (batch, 4))], -1).flatten(1)
    return torch.cat([pairs, pairs], 1)


@pytest.mark.parametrize("name", ["moneta", "yaad", "memora"])
def test_a_few_steps_of_training_lower_the_loss(name):
    torch.manual_seed(0)
    model = HopeForCausalLM(
        HopeConfig(
            vocab_size=16,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            mixer={"type": "memory", "memory": name, "chunk_size": 4},
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        ids = recall(16)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert sum(losses[-5:]) / 5 < 0.85 * losses[0]
