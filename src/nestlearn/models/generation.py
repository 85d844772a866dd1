"""Text generation: prompts to texts, sampling, stop words, and the padding of rows that have ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer


@torch.inference_mode()
def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    **options: Any,
) -> list[str]:
    """Continue prompts, given as tokens; returns the continuations alone.

    Shorter prompts of a batch are padded on the left, and padding is masked. A row ends at the end-of-text token or
    before the first of the words ``stop``.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        prompts: tokens of each prompt, for example by `nestlearn.data.document_ids`.
        max_new_tokens: the most tokens of a continuation.
        temperature: 0 takes the most likely token each time; above 0, tokens are drawn.
        top_p: draw from the smallest set of tokens with this much probability.
        seed: of the samples. With it, the random state of the process does not change.
        stop: a word, or several.
        on_text: of a single prompt, called with each new piece of the continuation as soon as it is known. The pieces
            together are the result.
        options: further arguments of ``model.generate`` (``streamer``, ``repetition_penalty``, ...).

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> from nestlearn.data import byte_tokenizer, document_ids
        >>> model, tokenizer = HopeForCausalLM(HopeConfig(mixer="attention", num_hidden_layers=1)), byte_tokenizer()
        >>> prompts = [document_ids(tokenizer, text) for text in ("a", "abc")]
        >>> len(generate_texts(model.eval(), tokenizer, prompts, max_new_tokens=2))
        2
    """
    words = [word for word in ([stop] if isinstance(stop, str) else stop) if word]
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), None)
    length = max(map(len, prompts))
    ids = torch.tensor([[pad or 0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    arguments: dict[str, Any] = {"attention_mask": mask.to(model.device), "pad_token_id": pad}
    arguments |= _sampling(max_new_tokens, temperature, top_p, seed, model.device)
    if ends := end_tokens(model, tokenizer):
        arguments["eos_token_id"] = ends
    if words:
        arguments["stopping_criteria"] = StoppingCriteriaList([StopAt(tokenizer, words, length)])
    if on_text is not None:
        if len(prompts) != 1:
            raise ValueError(f"on_text follows one prompt, and {len(prompts)} were given. Leave it out.")
        arguments["streamer"] = TextPieces(tokenizer, words, on_text)
    output = model.generate(ids.to(model.device), **{**arguments, **options})
    texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return [cut_at(text, words) for text in texts]


def _sampling(
    max_new_tokens: int, temperature: float, top_p: float, seed: int | None, device: torch.device
) -> dict[str, Any]:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (always the most likely token) or above.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1.")
    greedy: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    # The largest of the scores with noise is the draw, so `generate` itself need not sample.
    return {**greedy, "logits_processor": drawing(temperature, top_p, seed, device)} if temperature else greedy


def drawing(temperature: float, top_p: float, seed: int | None, device: torch.device) -> LogitsProcessorList:
    """Scores whose largest is a draw at this temperature; at 0 they stay as they are."""
    if not temperature:
        return LogitsProcessorList()
    return LogitsProcessorList(
        [TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(top_p), GumbelNoise(seed, device)]
    )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The end of a text; instruction-tuned models end a turn by further tokens (Gemma's <end_of_turn>, for example)."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return sorted({*(known if isinstance(known, list) else []), tokenizer.eos_token_id} - {None})


def cut_at(text: str, words: Sequence[str]) -> str:
    """The text before the first of the words.

    Example:
        >>> cut_at("Paris. Next", [". ", "!"])
        'Paris'
    """
    ends = [text.index(word) for word in words if word in text]
    return text[: min(ends)] if ends else text


class GrowingText:
    """The text of tokens that come one by one, in pieces that are final.

    It holds back what may turn out to be a stop word or half a character. Each token costs the same, however long the
    text has become: only the newest tokens are decoded again.

    Args:
        tokenizer: of the tokens.
        words: the text ends before the first of them.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> text = GrowingText(byte_tokenizer(), ["stop"])
        >>> [text.add(token) for token in b"a stool, stop"]
        ['a', ' ', '', '', '', 'stoo', 'l', ',', ' ', '', '', '', '']
        >>> text.stopped, text.text
        (True, 'a stool, ')
    """

    def __init__(self, tokenizer: Any, words: Sequence[str]) -> None:
        self._tokenizer, self._words = tokenizer, [word for word in words if word]
        self._longest = max(map(len, self._words), default=0)
        self._window: list[int] = []
        self._known = 0  # tokens of the window whose text is in `_decoded`
        self._decoded = ""
        self.stopped = False
        self.text = ""

    def add(self, token: int) -> str:
        """Take a token; returns the text that is final by now and was not returned before."""
        if self.stopped:
            return ""
        self._window.append(token)
        before, now = self._decode(self._window[: self._known]), self._decode(self._window)
        # A token may hold a part of a character, which is decoded as U+FFFD until the rest comes.
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._take(now[len(before) :])
        self._window, self._known = self._window[self._known :], len(self._window) - self._known
        return self._say(len(self._decoded) - self._held())

    def end(self) -> str:
        """The rest of the text: no more tokens come."""
        if not self.stopped:
            before, now = self._decode(self._window[: self._known]), self._decode(self._window)
            self._take(now[len(before) :])
        return self._say(len(self._decoded))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _take(self, new: str) -> None:
        start = max(len(self._decoded) - self._longest + 1, 0)
        self._decoded += new
        ends = [at for word in self._words if (at := self._decoded.find(word, start)) >= 0]
        if ends:
            self._decoded, self.stopped = self._decoded[: min(ends)], True

    def _held(self) -> int:
        if self.stopped:
            return 0
        open_ends = (word[:length] for word in self._words for length in range(1, len(word)))
        return max((len(end) for end in open_ends if self._decoded.endswith(end)), default=0)

    def _say(self, end: int) -> str:
        new = self._decoded[len(self.text) : end]
        self.text += new
        return new


class TextPieces(BaseStreamer):
    """Passes new text on while `generate` runs; see `GrowingText`.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> said = []
        >>> pieces = TextPieces(byte_tokenizer(), ["\\nYou:"], said.append)
        >>> for token in (b"prompt", b"a", b"\\n", b"Y", b"es", "\u00e9".encode()[:1], "\u00e9".encode()[1:]):
        ...     pieces.put(torch.tensor(list(token)))
        >>> pieces.end()
        >>> said
        ['a', '\\nYe', 's', '\u00e9']
    """

    def __init__(self, tokenizer: Any, words: Sequence[str], on_text: Callable[[str], None]) -> None:
        self._text, self._on_text = GrowingText(tokenizer, words), on_text
        self._begun = False

    def put(self, value: Tensor) -> None:
        """Take new tokens; the first call brings the prompt."""
        if self._begun:
            for token in value.flatten().tolist():
                self._say(self._text.add(token))
        self._begun = True

    def end(self) -> None:
        """The continuation is complete."""
        self._say(self._text.end())

    def _say(self, text: str) -> None:
        if text:
            self._on_text(text)


class StopAt(StoppingCriteria):
    """Ends a row when its new text contains one of the words."""

    def __init__(self, tokenizer: Any, words: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.words, self.prompt_length = tokenizer, tuple(words), prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del scores, kwargs
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        done = [any(word in text for word in self.words) for text in texts]
        return torch.tensor(done, device=input_ids.device)


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise, so that the largest score is a draw from softmax(scores).

    With a seed the noise comes from a generator of its own. Then the drawing does not change the random state of the
    process, nor does it depend on what other threads draw.
    """

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        del input_ids
        exponential = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self.generator)
        return scores.float() - exponential.log()


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember where each row ended.

    After its end a row gets pad tokens until all rows have ended, but `generate` marks them as real in its attention
    mask. A memory would learn from them; `hide` returns the mask without them.

    Args:
        criteria: the criteria of `generate`. The library pads rows only if one of them has an end token.

    Example:
        >>> from transformers.generation import EosTokenCriteria
        >>> rows = EndedRows([EosTokenCriteria(2)])
        >>> ids = torch.tensor([[5, 2], [5, 6]])
        >>> rows(ids, None).tolist()
        [True, False]
        >>> rows.hide(None, torch.tensor([[5, 2, 0], [5, 6, 7]])).tolist()
        [[1, 1, 0], [1, 1, 1]]
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self._pads = any(hasattr(one, "eos_token_id") for one in criteria)
        self._ends: Int[Tensor, "b"] | None = None

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Any, **kwargs: Any) -> Bool[Tensor, "b"]:  # type: ignore[override]
        """True for rows that end with the newest column."""
        done = super().__call__(cast(Any, input_ids), scores, **kwargs)
        # One row alone is never padded. Otherwise the loop of the library looks at these values in every step, too.
        if self._pads and len(done) > 1 and bool(done.any()):
            length = torch.full_like(done, input_ids.shape[1], dtype=torch.long)
            known = torch.full_like(length, torch.iinfo(torch.long).max) if self._ends is None else self._ends
            self._ends = torch.where(done, torch.minimum(known, length), known)
        return done

    def hide(self, attention_mask: Tensor | None, input_ids: Int[Tensor, "b t"]) -> Tensor | None:
        """The attention mask with 0 in the columns that came after the end of their row.

        Args:
            attention_mask: as `generate` keeps it; its last columns are those of ``input_ids``. None: all are real.
            input_ids: all columns so far.
        """
        if self._ends is None:
            return attention_mask
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        real = (columns < self._ends.to(input_ids.device)[:, None]).long()
        if attention_mask is None:
            return real
        real = real.to(attention_mask)
        return torch.cat([attention_mask[:, : -real.shape[1]], attention_mask[:, -real.shape[1] :] * real], 1)
