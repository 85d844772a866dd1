"""Evaluations measure what they say, checked against a plain loop."""

import json
import math
from pathlib import Path

import pytest
import torch
from tests.mixers import SMALL

from nestlearn import HopeCache, HopeConfig, HopeForCausalLM
from nestlearn.data import Document, byte_tokenizer
from nestlearn.evals import EvalResult, bits_per_byte, loss_by_position, state_bytes_by_context
from nestlearn.evals.language import CONDITIONS, bucket_edges, ratio_with_stderr, read_segments
from nestlearn.models import generate_texts

TOKENIZER = byte_tokenizer()


def make_model(mixer: str = "self_modifying", **options) -> HopeForCausalLM:
    torch.manual_seed(0)
    config = HopeConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mixer=SMALL[mixer] | options,
        reset_token_id=256, bos_token_id=256, eos_token_id=257, pad_token_id=258,
        initializer_range=0.3,
    )  # fmt: skip
    return HopeForCausalLM(config).double().eval()


def corpus(*lengths: int) -> list[Document]:
    generator = torch.Generator().manual_seed(1)
    letters = "abcdefgh é"
    texts = ["".join(letters[i] for i in torch.randint(0, 10, (n,), generator=generator)) for n in lengths]
    return [Document(text, str(number)) for number, text in enumerate(texts)]


@torch.no_grad()
def plain_bits(model: HopeForCausalLM, documents: list[Document], context: int) -> float:
    nats = size = 0
    for document in documents:
        tokens = [256, *document.text.encode(), 257]
        size += len(document.text.encode())
        for start in range(0, len(tokens) - 1, context):
            piece = torch.tensor(tokens[start : start + context + 1])
            logits = model(piece[None, :-1]).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
    return nats / math.log(2) / size


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
def test_bits_per_byte_equals_a_plain_loop(mixer: str):
    model, documents = make_model(mixer), corpus(5, 40, 23, 70)
    result = bits_per_byte(model, TOKENIZER, documents, context=16, batch_size=3)
    assert result.value == pytest.approx(plain_bits(model, documents, 16), rel=1e-6)
    assert (result.n, result.details["bytes"]) == (4, sum(len(d.text.encode()) for d in documents))
    assert result.stderr is not None and result.stderr > 0
    assert not model.training


def test_bits_per_byte_stops_after_the_bytes_asked_for():
    model, documents = make_model("attention"), corpus(30, 30, 30, 30)
    assert bits_per_byte(model, TOKENIZER, documents, max_bytes=40).n == 2
    with pytest.raises(ValueError, match="no documents"):
        bits_per_byte(model, TOKENIZER, [])


def test_training_mode_is_restored():
    model = make_model("attention").train()
    bits_per_byte(model, TOKENIZER, corpus(20, 30))
    assert model.training


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
def test_segments_equal_one_reading(mixer: str):
    model = make_model(mixer)
    tokens = torch.randint(0, 256, (2, 41), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), tokens[:, 1:], reduction="none")
        for segment in (7, 16, 64):
            losses, cache = read_segments(model, tokens, None, segment)
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
            assert isinstance(cache, HopeCache)


def test_loss_by_position_in_all_conditions():
    model, documents = make_model(), corpus(100, 90, 20, 80, 200)
    result = loss_by_position(model, TOKENIZER, documents, length=64, batch_size=2, segment=10)
    curves = result.details["bits_per_byte"]
    assert result.n == 4 and set(curves) == set(CONDITIONS)
    edges = result.details["edges"]
    rows = torch.tensor([[256, *d.text.encode(), 257][:65] for d in documents if len(d.text.encode()) > 62])
    with torch.no_grad():
        for name, writes in (("on", True), ("off", False)):
            logits = model(rows[:, :-1], writes=writes).logits
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
            sizes = (rows[:, 1:] < 256).double()
            for bucket, value in enumerate(curves[name]):
                part = slice(edges[bucket], edges[bucket + 1])
                expected = nats[:, part].sum() / math.log(2) / sizes[:, part].sum()
                assert value == pytest.approx(expected.item(), rel=1e-5)
    assert [value is None for value in curves["shuffled"]] == [low < 32 for low in edges[:-1]]
    # Another row's memories give other losses; no writes, too.
    assert curves["shuffled"][-1] != curves["on"][-1] != curves["off"][-1]


def test_without_writes_a_models_state_does_not_matter():
    """Exchanging states changes nothing where nothing was written and convolutions of width 1 carry nothing."""
    model = make_model(conv_size=1)
    tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, cache = read_segments(model, tokens[:, :17], None, 8, writes=False)
        cache.reorder_cache(torch.tensor([1, 0]))
        exchanged, _ = read_segments(model, tokens[:, 16:], cache, 8, writes=False)
        whole, _ = read_segments(model, tokens, None, 8, writes=False)
    torch.testing.assert_close(exchanged, whole[:, 16:])


def test_too_short_documents_and_unknown_conditions_are_refused():
    model = make_model("attention")
    with pytest.raises(ValueError, match=r"Only 1 of 2 documents have more than 64 tokens \(the longest has 80\)"):
        loss_by_position(model, TOKENIZER, corpus(70, 10), length=64)
    with pytest.raises(ValueError, match="Unknown condition 'of'"):
        loss_by_position(model, TOKENIZER, corpus(70, 70), length=64, conditions=["of"])


def test_state_of_memories_stays_and_of_attention_grows():
    lengths = (16, 64, 256)
    fixed = state_bytes_by_context(make_model(), lengths)
    growing = state_bytes_by_context(make_model("attention"), lengths, segment=32)
    assert max(fixed) <= 1.5 * min(fixed)
    assert growing[0] < growing[1] < growing[2]


@pytest.mark.parametrize("length", [16, 100, 256, 1024, 4096])
def test_bucket_edges_cover_every_position_once(length: int):
    edges = bucket_edges(length)
    assert edges[0] == 0 and edges[-1] == length and edges == sorted(set(edges))


def test_ratio_and_its_error():
    assert ratio_with_stderr([1.0], [2.0]) == (0.5, None)
    assert math.isnan(ratio_with_stderr([], [])[0])
    value, error = ratio_with_stderr([1.0, 3.0], [1.0, 1.0])
    assert (value, error) == (2.0, pytest.approx(1.0))


def test_results_round_trip(tmp_path: Path):
    result = EvalResult(
        task="t", version=1, metric="m", value=1.5, stderr=None, n=2, seed=0, seconds=0.1, details={"nan": math.nan}
    )
    result.save(tmp_path / "a" / "r.json")
    loaded = EvalResult.load(tmp_path / "a" / "r.json")
    assert (loaded.value, loaded.details) == (1.5, {"nan": None})
    content = json.loads((tmp_path / "a" / "r.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps(content | {"schema": 99}))
    (tmp_path / "cut.json").write_text('{"schema": 1, "ta')
    for name in ("old.json", "cut.json", "none.json"):
        with pytest.raises(ValueError, match="not a saved evaluation result|is an evaluation result of schema 99"):
            EvalResult.load(tmp_path / name)


def test_samples_depend_on_their_seed_only():
    model = make_model("attention")
    texts = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 7)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        texts.append(generate_texts(model, TOKENIZER, [[97, 98]], max_new_tokens=20, temperature=0.8, seed=seed))
        assert torch.equal(before, torch.get_rng_state())
    assert texts[0] == texts[1] != texts[2]
    greedy = [generate_texts(model, TOKENIZER, [[97, 98]], max_new_tokens=5, seed=s) for s in (0, 1)]
    assert greedy[0] == greedy[1]
