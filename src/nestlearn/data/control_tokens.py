"""Encoding of text in which only the program, never the text, writes control tokens (start, end, marks of turns)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that mean more than their letters, by id.

    These are the special tokens, and the added tokens that are written in brackets (``<tool_call>``, ``[INST]``) or
    that the chat template writes. Other added tokens (words, runs of blanks) are ordinary text.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> control_tokens(byte_tokenizer())
        {256: '<s>', 257: '</s>', 258: '<pad>'}
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    unknown = getattr(tokenizer, "unk_token_id", None)
    # The unknown token stands for letters outside the vocabulary; it controls nothing.
    special = set(tokenizer.all_special_ids) - {unknown}
    added = {index: str(token) for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    known = {index: str(tokenizer.convert_ids_to_tokens(index)) for index in special} | added
    return {
        index: text
        for index, text in sorted(known.items())
        if index in special or (index != unknown and text.strip() and (_BRACKETED.fullmatch(text) or text in template))
    }


_BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)


def control_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that the program wrote: a control token spelled out in it becomes that token.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> control_ids(byte_tokenizer(), "<s>a")
        [256, 97]
    """
    # Tokenizers of this package split special tokens unless told otherwise.
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
    return list(encoded["input_ids"])


class LiteralText:
    """Encodes the text of users: a control token spelled out in it becomes its letters.

    Args:
        tokenizer: any Hugging Face tokenizer, fast or slow.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> LiteralText(byte_tokenizer()).ids("<s>")
        [60, 115, 62]
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.controls = control_tokens(tokenizer)
        spelled = sorted({text for text in self.controls.values() if len(text) > 1}, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spelled))) if spelled else None

    def ids(self, text: str) -> list[int]:
        """Token ids of a text without control tokens.

        Raises:
            ValueError: the tokenizer has only a control token for a character.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        if not self.controls.keys() & set(encoded["input_ids"]):
            return list(encoded["input_ids"])
        return self._refuse_controls([token for piece in self.pieces(text) for token in self._encode(piece)], text)

    def pieces(self, text: str) -> list[str]:
        """The text, cut within every control token that is spelled out in it."""
        found, rest = [], text
        while self._spelled is not None and (match := self._spelled.search(rest)):
            found.append(rest[: match.start() + 1])
            rest = rest[match.start() + 1 :]
        # A tokenizer that normalizes (case, blanks) may still find a control token.
        whole = (*found, rest) if rest or not found else tuple(found)
        return [part for piece in whole for part in (piece if self._sees_control(piece) else [piece])]

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation by the tokenizer's chat template, up to the start of the answer.

        Args:
            messages: ``{"role": ..., "content": ...}``; control tokens spelled out in contents become letters.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        return [
            token for piece in self.templated(messages, answer=True) for token in control_ids(self.tokenizer, piece)
        ]

    def templated(self, messages: Sequence[Mapping[str, str]], *, answer: bool) -> list[str]:
        """The text of a conversation by the chat template, cut so that `control_ids` of each piece finds the control
        tokens that the template wrote, and no others.

        Args:
            messages: see `conversation`.
            answer: whether the text ends with the start of an answer.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template, by which a conversation becomes text. Give the text itself, or "
                "set tokenizer.chat_template as the model was trained with."
            )
        cut = _absent_character(message["content"] for message in messages)
        given = [{**message, "content": cut.join(self.pieces(message["content"]))} for message in messages]
        text: str = self.tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=answer)
        return text.split(cut)

    def _encode(self, piece: str) -> list[int]:
        encoded = self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(encoded["input_ids"])

    def _sees_control(self, piece: str) -> bool:
        return bool(self.controls.keys() & set(control_ids(self.tokenizer, piece)))

    def _refuse_controls(self, ids: list[int], text: str) -> list[int]:
        wrong = self.controls.keys() & set(ids)
        if wrong:
            names = ", ".join(repr(self.controls[token]) for token in sorted(wrong))
            raise ValueError(f"the tokenizer reads a part of {text[:80]!r} as the control token {names}. Remove it.")
        return ids


def _absent_character(texts: Iterable[str]) -> str:
    """A character of the private use area that no text contains."""
    used = set().union(*map(set, texts))
    return next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in used)
