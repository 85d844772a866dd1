"""Rows of many sessions decoded together answer as each of them alone."""

from __future__ import annotations

import random

import pytest
import torch
from tests.mixers import SMALL
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM, Level, MemorySession, stack_levels
from nestlearn.continual.session.decoding import decoder_of
from nestlearn.continual.session.key_values import RowKeyValues
from nestlearn.data import byte_tokenizer
from nestlearn.models.stacking import LevelState
from nestlearn.models.stacking.rows import LevelRows, join_rows

TEXT = "".join(f"The {n}th sheep of the {n % 3} herds is called {chr(65 + n % 26) * 3}. " for n in range(12))
TOKENIZER = byte_tokenizer()


def stacked(mode: str, **level: object) -> object:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=256, eos_token_id=257, pad_token_id=258, initializer_range=0.3,
    )  # fmt: skip
    return stack_levels(LlamaForCausalLM(config).eval(), [Level(16, lr=40, **level), Level(48, lr=40)], mode=mode)


def hope() -> object:
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        mixer=SMALL["self_modifying"], initializer_range=0.3,
    )  # fmt: skip
    return HopeForCausalLM(config).eval()


MODELS = {
    "split": lambda: stacked("split"),
    "low rank": lambda: stacked("split", rank=4),
    "add": lambda: stacked("add", hidden=8),
    "hope": hope,
}


@pytest.mark.parametrize("kind", MODELS)
def test_rows_that_come_and_go_equal_each_alone(kind: str) -> None:
    """Five sessions, one of which has read nothing, with prompts of five lengths, joined at different steps."""
    model = MODELS[kind]()
    base = MemorySession(model, TOKENIZER, compare="none")
    sessions = [base]
    for n in range(4):
        sessions.append(base.fork())
        sessions[-1].read(TEXT[16 * n :])
    prompts = [session.prompt_ids(TEXT[n : 9 * n + 5]) for n, session in enumerate(sessions)]
    expected = [alone(session, ids, 6 + n) for n, (session, ids) in enumerate(zip(sessions, prompts, strict=True))]
    assert len({tuple(tokens) for tokens in expected}) > 3

    decoder, rows, found = decoder_of(base), [], [[] for _ in sessions]
    for turn in range(20):
        if rows:
            logits = decoder.step([found[n][-1] for n in rows])
            for n, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                found[n].append(token)
        left = [place for place, n in enumerate(rows) if len(found[n]) < len(expected[n])]
        decoder.keep(left)
        rows = [rows[place] for place in left]
        if turn < len(sessions):
            row, ids = decoder.begin(sessions[turn]), prompts[turn]
            decoder.read([row], [ids[:3]]) if len(ids) > 3 else None
            found[turn].append(int(decoder.read([row], [ids[3:] if len(ids) > 3 else ids]).argmax()))
            decoder.join(row)
            rows.append(turn)
    assert found == expected and not rows


@pytest.mark.parametrize("kind", ["low rank", "hope"])
def test_prompts_read_together_are_answered_as_each_alone(kind: str) -> None:
    model = MODELS[kind]()
    base = MemorySession(model, TOKENIZER, compare="none")
    sessions = [base, *(base.fork() for _ in range(3))]
    for n, session in enumerate(sessions[1:]):
        session.read(TEXT[16 * n :])
    prompts = [session.prompt_ids(TEXT[n : 13 * n + 7]) for n, session in enumerate(sessions)]
    decoder = decoder_of(base)
    rows = [decoder.begin(session) for session in sessions]
    tokens = decoder.read(rows, prompts).argmax(-1).tolist()
    for row in rows:
        decoder.join(row)
    found = [[token] for token in tokens]
    for _ in range(4):
        for said, token in zip(found, decoder.step(tokens).argmax(-1).tolist(), strict=True):
            said.append(token)
        tokens = [said[-1] for said in found]
    assert found == [alone(session, ids, 5) for session, ids in zip(sessions, prompts, strict=True)]


def test_a_token_copies_neither_keys_nor_weights() -> None:
    """Buffers stay where they are from token to token, and while rows come and go within their room."""
    base = MemorySession(stacked("split", rank=4), TOKENIZER, compare="none")
    mine = base.fork()
    mine.read(TEXT)
    decoder = decoder_of(base)

    def begin(session: MemorySession) -> None:
        row = decoder.begin(session)
        decoder.read([row], [list(b"The sheep")])
        decoder.join(row)

    def places() -> set[int]:
        anchors = [fast.weights.anchor for fast in decoder._state.networks["model.layers.0.mlp"]]
        weights = [w.untyped_storage().data_ptr() for anchor in anchors for w in anchor.values()]
        return {*weights, *(layer.keys.untyped_storage().data_ptr() for layer in decoder._cache.layers)}

    for session in (mine, base, mine):
        begin(session)
    before, length = places(), decoder._cache.get_seq_length()
    for _ in range(30):
        decoder.step([32] * 3)
    decoder.keep([0, 2])
    begin(base)
    assert places() == before and decoder._cache.get_seq_length() == length + 30


@pytest.mark.parametrize("seed", range(4))
def test_weights_of_rows_in_buffers_are_the_joined_ones(seed: int) -> None:
    """Rows come and go in any order, some before their weights were ever copied."""
    model = stacked("split", rank=4)
    base, draw = MemorySession(model, TOKENIZER, compare="none"), random.Random(seed)
    states = [LevelState()]
    for n in range(3):
        session = base.fork()
        session.read(TEXT[16 * n :])
        states.append(session._cursor.memory.levels)
    rows, held = LevelRows(model), []
    for _ in range(40):
        if draw.random() < 0.6:
            held.append(draw.choice(states))
            rows.append(held[-1])
        else:
            kept = sorted(draw.sample(range(len(held)), draw.randint(0, len(held))))
            held = [held[i] for i in kept]
            rows.keep(kept)
        if draw.random() < 0.5:
            mine, joined = rows.state(), join_rows(model, held) if held else LevelState()
            assert mine.networks.keys() == joined.networks.keys()
            for path, levels in joined.networks.items():
                for found, expected in zip(mine.networks[path], levels, strict=True):
                    torch.testing.assert_close(found and found.weights.anchor, expected and expected.weights.anchor)


def test_keys_and_values_in_buffers_are_padded_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """New room holds anything: a mask hides it from attention, but not a NaN."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: x.new_full(shape, torch.nan))
    layer, held, draw = RowKeyValues(), [], random.Random(0)
    for turn in range(60):
        if len(held) < 2 or (turn % 7 == 0 and len(held) < 9):
            new = torch.randn(1, 2, draw.randint(1, 200), 3)
            layer.join(new, -new)
            held.append(new[0])
        elif turn % 5 == 0:
            rows = sorted(draw.sample(range(len(held)), len(held) - 1))
            held = [held[i] for i in rows]
            layer.keep(rows, max(x.shape[1] for x in held))
        new = torch.randn(len(held), 2, 1, 3)
        keys, values = layer.update(new, -new)
        held = [torch.cat([x, token], 1) for x, token in zip(held, new, strict=True)]
        width = max(x.shape[1] for x in held)
        expected = torch.stack([F.pad(x, (0, 0, width - x.shape[1], 0)) for x in held])
        torch.testing.assert_close(keys, expected)
        torch.testing.assert_close(values, -expected)


def test_a_row_of_other_shapes_cannot_join_and_harms_no_other() -> None:
    base = MemorySession(stacked("split", rank=4), TOKENIZER, compare="none")
    base.read(TEXT)
    other = MemorySession(stacked("split", rank=3), TOKENIZER, compare="none")
    other.read(TEXT)
    decoder = decoder_of(base)
    good, bad = decoder.begin(base), decoder.begin(other)
    for row in (good, bad):  # each alone can be read
        logits = decoder.read([row], [list(b"The sheep")])
    assert torch.isfinite(logits).all()
    decoder.join(good)
    with pytest.raises(ValueError, match="those of another model"):
        decoder.join(bad)
    assert decoder.step([32]).shape == (1, 259)


@pytest.mark.parametrize("tokens", [(3,), (2, 3), (4, 5)])
def test_products_of_few_tokens_are_those_of_a_linear_map(tokens: tuple[int, ...]) -> None:
    from torch import nn

    from nestlearn.models.blocked import BlockedLinear, block_products

    torch.manual_seed(0)
    plain, x = nn.Linear(24, 128), torch.randn(*tokens, 24)
    made = nn.Sequential(nn.Linear(24, 128), nn.Linear(24, 128).bfloat16(), nn.Linear(24, 100))
    made[0].load_state_dict(plain.state_dict())
    block_products(made)
    assert [type(layer) for layer in made] == [BlockedLinear, nn.Linear, nn.Linear]
    with torch.no_grad():
        found = made[0](x)
    assert torch.allclose(found, plain(x), atol=1e-6) and found.is_contiguous() and torch.equal(made[0](x), plain(x))


def alone(session: MemorySession, ids: list[int], count: int) -> list[int]:
    """Greedy tokens by the library's own loop."""
    with session._backend.generating(session._cursor.memory, len(ids)) as state, torch.inference_mode():
        options = {"attention_mask": torch.ones(1, len(ids), dtype=torch.long), **state, "eos_token_id": None}
        output = session.model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=count, pad_token_id=258, **options
        )
    return output[0, len(ids) :].tolist()
