"""Byte-level Hugging Face tokenizers.

Decoding returns the text exactly. No special tokens are added; packing puts `<s>` before and `</s>` after each
document. A `<s>` in a text becomes three characters, never the token, so a document cannot reset the model's state.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Int64
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nestlearn.data.control_tokens import LiteralText, control_tokens
from nestlearn.data.documents import Document

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_NO_LIMIT = int(1e30)  # the value transformers uses for "no maximum length"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in which byte b is token b, and 256 is `<s>`, 257 `</s>`, 258 `<pad>`.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer("é!").input_ids
        [195, 169, 33]
        >>> tokenizer.decode([195, 169, 33])
        'é!'
    """
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer)


def train_bpe(corpus: Iterable[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding over bytes, learned from a corpus, with the special tokens of `byte_tokenizer`.

    Args:
        corpus: the training split.
        vocab_size: number of tokens, including the 256 bytes and 3 special tokens.

    Raises:
        ValueError: `vocab_size` is below 259, or the corpus is too small for it.
    """
    smallest = 256 + 3
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {smallest}: 256 bytes and 3 special tokens.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3,  # the special tokens follow, as in the byte tokenizer
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in corpus), trainer)
    learned = tokenizer.get_vocab_size() + 3
    if learned < vocab_size:
        raise ValueError(
            f"The corpus is too small for vocab_size={vocab_size}: it has pairs for {learned} tokens. "
            f"Use vocab_size={learned} or less, or more text."
        )
    return _finished(tokenizer)


def bytes_per_token(tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, "vocab"]:
    """Bytes of text of each token, 0 for special tokens. They convert nats per token into bits per byte.

    Byte-level vocabularies (ours, GPT-2, Llama 3, Qwen, ...) and SentencePiece ones (Llama 2, Gemma, ...) are known.

    Raises:
        TypeError: the tokenizer is of another kind, so its tokens do not spell out their text.
    """
    size = len(tokenizer)
    special = set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    byte_level = _is_byte_level(tokenizer)
    counts = torch.zeros(size, dtype=torch.int64)
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(size)))):
        if index in special or token is None:
            continue
        if index in added:
            counts[index] = len(token.encode())
        elif byte_level:
            counts[index] = sum(1 if letter in letters else len(letter.encode()) for letter in token)
        else:
            counts[index] = _sentencepiece_bytes(token)
    return counts


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text. A control token spelled out in a text becomes its letters."""
    if is_byte_tokenizer(tokenizer):  # ids are the bytes; the general way takes fifty times as long
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]
    encoded = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    controls = control_tokens(tokenizer).keys()
    return [
        np.asarray(ids if controls.isdisjoint(ids) else LiteralText(tokenizer).ids(text), dtype=np.int32)
        for text, ids in zip(texts, encoded["input_ids"], strict=True)
    ]


def document_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of the start of a document: the start token, if the tokenizer has one, then those of the text.

    Example:
        >>> document_ids(byte_tokenizer(), "ab")
        [256, 97, 98]
    """
    start = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]
    return [*start, *encode(tokenizer, [text])[0].tolist()]


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether token b is byte b."""
    return len(tokenizer) == 259 and tokenizer.convert_ids_to_tokens(list(range(256))) == _byte_letters()


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([BOS, EOS, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=_NO_LIMIT,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _byte_letters() -> list[str]:
    """The printable letter of each byte in a byte-level vocabulary, in byte order.

    Printable Latin-1 characters are their own letters; the 68 others are U+0100, U+0101, ... in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others: Iterator[int] = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(f"{type(tokenizer).__name__} has no tokenizers backend; use a fast tokenizer.")
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder"))
    if '"ByteLevel"' in decoder:
        return True
    if '"Metaspace"' in decoder or "\\u2581" in decoder:
        return False
    raise TypeError(
        f"Tokens of {type(tokenizer).__name__} do not spell out their bytes (decoder {decoder[:80]}), so bits per byte "
        "are undefined. Use a byte-level or SentencePiece tokenizer."
    )


def _sentencepiece_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode())
