"""Tokens are exact bytes: any text comes back, before and after saving."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nestlearn.data import Document, byte_tokenizer, bytes_per_token, train_bpe
from nestlearn.data.tokenizers import encode, is_byte_tokenizer

BYTES = byte_tokenizer()
CORPUS = [
    Document("the cat sat on the mat; the rat sat on the cat's hat. " * 20, "a"),
    Document("naïve café " * 20, "b"),
]
BPE = train_bpe(CORPUS, 280)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(texts)
def test_tokens_are_bytes_and_come_back(text: str) -> None:
    ids = BYTES(text).input_ids
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text
    assert encode(BYTES, [text])[0].tolist() == ids


@given(texts)
def test_bpe_comes_back(text: str) -> None:
    ids = BPE(text).input_ids
    assert BPE.decode(ids) == text
    assert encode(BPE, [text])[0].tolist() == ids
    assert bytes_per_token(BPE)[ids].sum() == len(text.encode())


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    size = len(tokenizer)
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<s>", "</s>", "<pad>"]
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>"]) == [size - 3, size - 2, size - 1]
    assert tokenizer.decode([size - 3, *tokenizer("hi").input_ids, size - 2], skip_special_tokens=True) == "hi"
    assert bytes_per_token(tokenizer)[-3:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_text_cannot_spell_a_special_token(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "a <s>struck</s> word <pad>"
    ids = tokenizer(text).input_ids
    assert max(ids) < len(tokenizer) - 3
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_saved_and_loaded(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "the cat <s> naïve  café\n\t 🐈 "
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == tuple(
        range(len(tokenizer) - 3, len(tokenizer))
    )
    assert is_byte_tokenizer(loaded) == is_byte_tokenizer(tokenizer)


def test_left_padding_for_generation() -> None:
    batch = BYTES(["a", "bcd"], padding=True, padding_side="left")
    assert batch.input_ids == [[258, 258, 97], [98, 99, 100]]
    assert batch.attention_mask == [[0, 0, 1], [1, 1, 1]]


def test_sizes() -> None:
    assert len(BYTES) == 259
    assert is_byte_tokenizer(BYTES)
    assert len(BPE) == 280
    assert not is_byte_tokenizer(BPE)
    assert len(BPE("the cat").input_ids) < 7
    assert bytes_per_token(BYTES).tolist() == [1] * 256 + [0] * 3


def test_training_again_gives_the_same_tokens() -> None:
    assert train_bpe(CORPUS, 280).get_vocab() == BPE.get_vocab()


def test_bpe_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="vocab_size is 200; it must be at least 259"):
        train_bpe(CORPUS, 200)
    with pytest.raises(ValueError, match="too small for vocab_size=5000: it has pairs for"):
        train_bpe(CORPUS, 5000)
    assert len(train_bpe(CORPUS, 259)("the cat").input_ids) == 7


def sentencepiece_like() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "\u2581cat": 1, "s": 2, "<0x0A>": 3, "é": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_bytes_of_sentencepiece_tokens() -> None:
    assert bytes_per_token(sentencepiece_like()).tolist() == [0, 4, 1, 1, 2]


def test_bytes_of_other_tokens_are_undefined() -> None:
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(TypeError, match="do not spell out their bytes"):
        bytes_per_token(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))
