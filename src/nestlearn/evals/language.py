"""Language-model evaluations on held-out documents: bits per byte, and loss by position in the context."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.data import bytes_per_token, document_ids
from nestlearn.evals.result import EvalResult
from nestlearn.models import HopeForCausalLM

CONDITIONS = ("on", "off", "shuffled")


class TooFewDocumentsError(ValueError):
    """A corpus has fewer documents of the asked length than an evaluation needs."""


def document_tokens(tokenizer: Any, text: str) -> list[int]:
    """`<s> text </s>` as token ids, the form in which documents are trained on.

    A tokenizer without a start or an end token leaves it out. Control tokens spelled out in the text are letters.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*document_ids(tokenizer, text), *end]


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token in nats, float32 [batch, t], from logits [batch, t, vocabulary]."""
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def ratio_with_stderr(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float | None]:
    """R = Σ a_i / Σ b_i and its standard error over the n items: sqrt(n/(n-1) Σ (a_i - R b_i)²) / Σ b_i.

    Example:
        >>> ratio_with_stderr([2.0, 2.0], [1.0, 1.0])
        (2.0, 0.0)
    """
    total, n = sum(denominators), len(denominators)
    if not total:
        return math.nan, None
    ratio = sum(numerators) / total
    if n < 2:
        return ratio, None
    squares = sum((a - ratio * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return ratio, math.sqrt(squares * n / (n - 1)) / total


def describe_model(model: Any) -> dict[str, Any]:
    """What identifies a model in a result: its type, size and the fields of its architecture."""
    config = model.config
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mixer", "vocab_size")
    described = {name: getattr(config, name) for name in fields if hasattr(config, name)}
    return {"parameters": sum(p.numel() for p in model.parameters()), **described}


def _pieces(
    documents: Iterable[Any], tokenizer: Any, context: int, max_bytes: int | None
) -> Iterator[tuple[int, list[int]]]:
    """(document number, up to context + 1 tokens): each target of each document is in exactly one piece."""
    read = 0
    for number, document in enumerate(documents):
        tokens = document_tokens(tokenizer, document.text)
        for start in range(0, len(tokens) - 1, context):
            yield number, tokens[start : start + context + 1]
        read += len(document.text.encode("utf-8"))
        if max_bytes is not None and read >= max_bytes:
            return


def _batch(pieces: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and mask [batch, t], padded on the right."""
    length = max(len(piece) for piece in pieces) - 1
    inputs = torch.full((len(pieces), length), pad)
    targets = torch.full((len(pieces), length), pad)
    mask = torch.zeros(len(pieces), length, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        tokens = torch.tensor(piece)
        inputs[row, : len(piece) - 1], targets[row, : len(piece) - 1] = tokens[:-1], tokens[1:]
        mask[row, : len(piece) - 1] = True
    return inputs.to(device), targets.to(device), mask.to(device)


@torch.no_grad()
def bits_per_byte(
    model: Any,
    tokenizer: Any,
    corpus: Iterable[Any],
    *,
    context: int = 256,
    max_bytes: int | None = None,
    batch_size: int = 16,
    writes: bool = True,
    command: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> EvalResult:
    """Bits per byte of held-out documents: Σ loss / (ln 2 · Σ bytes).

    Each document is read from its own start in pieces of `context` tokens, each piece with fresh state, so that
    a model is asked for what it was trained for. The end of a document is predicted too and counts no byte.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        tokenizer: the tokenizer it was trained with.
        corpus: documents with a `text`.
        context: tokens per piece; the training length is the fair choice.
        max_bytes: stop after the document that reaches this many bytes.
        batch_size: pieces per forward pass.
        writes: False reads with inner learning switched off.
        command: recorded in the result.
        progress: called with the share that is done.

    Raises:
        ValueError: if the corpus holds no text.
    """
    began = time.perf_counter()
    byte_counts = bytes_per_token(tokenizer)
    pieces = sorted(_pieces(corpus, tokenizer, context, max_bytes), key=lambda piece: len(piece[1]), reverse=True)
    if not pieces:
        raise ValueError("The corpus holds no documents to evaluate on.")
    nats, sizes = {}, {}
    with _evaluating(model):
        for start in range(0, len(pieces), batch_size):
            progress(f"bits per byte: {start / len(pieces):.0%} of {len(pieces)} pieces")
            chunk = pieces[start : start + batch_size]
            # Padding is masked, so any token may stand for a pad token that the tokenizer lacks.
            inputs, targets, mask = _batch([tokens for _, tokens in chunk], tokenizer.pad_token_id or 0, model.device)
            logits = model(inputs, attention_mask=mask.long(), use_cache=False, **_writes(writes)).logits
            loss = (token_nats(logits, targets) * mask).sum(1).double().tolist()
            size = (byte_counts.to(model.device)[targets] * mask).sum(1).tolist()
            for (number, _), row_loss, row_size in zip(chunk, loss, size, strict=True):
                nats[number] = nats.get(number, 0.0) + row_loss
                sizes[number] = sizes.get(number, 0) + row_size
    value, stderr = ratio_with_stderr([nats[i] / math.log(2) for i in nats], [sizes[i] for i in nats])
    return EvalResult(
        task="bits_per_byte", version=1, metric="bits per byte", value=value, stderr=stderr, n=len(nats), seed=0,
        seconds=time.perf_counter() - began, command=command,
        config={"context": context, "max_bytes": max_bytes, "writes": writes, "model": describe_model(model)},
        details={"bytes": sum(sizes.values()), "nats": sum(nats.values())},
    )  # fmt: skip


def _writes(writes: bool) -> dict[str, bool]:
    # Only said when switched off, so that any causal language model can be read with writes on.
    return {} if writes else {"writes": False}


class _evaluating:
    """Puts a model in evaluation mode and restores the mode it had."""

    def __init__(self, model: Any):
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_error: object) -> None:
        self.model.train(self.was_training)


def bucket_edges(length: int) -> list[int]:
    """Edges of position buckets: doubling up to length / 16, then every length / 16.

    Example:
        >>> bucket_edges(256)
        [0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256]
    """
    width = max(1, length // 16)
    early, edge = [], 16
    while edge < width:
        early.append(edge)
        edge *= 2
    regular = list(range(width, length + 1, width))
    if regular[-1] != length:
        regular[-1] = length
    return [0, *early, *regular]


@torch.no_grad()
def loss_by_position(
    model: Any,
    tokenizer: Any,
    corpus: Iterable[Any],
    *,
    length: int,
    documents: int = 64,
    batch_size: int = 16,
    segment: int = 512,
    conditions: Sequence[str] | None = None,
    command: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> EvalResult:
    """Bits per byte by position in the context, with inner learning on, off, and with exchanged memories.

    Every row is one document from its own start, so that equal columns are equal positions. Conditions:
        "on"        the model as it is.
        "off"       no writes: every memory stays in its initial state (attention is not affected).
        "shuffled"  each row reads the first half of its document, then goes on with the state of another row:
                    if the state carries what was read, the second half gets worse.

    Args:
        length: positions to measure; may exceed the training length.
        documents: how many documents, the first of the corpus that are long enough.
        batch_size: rows per forward pass, at least 2 to exchange states.
        segment: tokens per forward pass; the state is carried on, so this changes memory use only.
        conditions: by default all for a Hope model, and "on" alone for models without inner learning.
        command: recorded in the result.
        progress: called with the share that is done.

    Returns:
        A result whose `details` hold `edges`, and per condition `bits_per_byte` and `stderr` of each bucket
        (None where a condition says nothing: "shuffled" before the exchange).

    Raises:
        TooFewDocumentsError: if fewer than two documents are long enough.
    """
    began = time.perf_counter()
    inner = isinstance(model, HopeForCausalLM)
    conditions = conditions or (CONDITIONS if inner else CONDITIONS[:1])
    unknown = [name for name in conditions if name not in CONDITIONS]
    if unknown:
        raise ValueError(f"Unknown condition {unknown[0]!r}. Choose from {', '.join(CONDITIONS)}.")
    rows = _long_documents(corpus, tokenizer, length, documents)
    nats, sizes = _losses(model, tokenizer, rows, conditions, batch_size, segment, progress)
    edges = bucket_edges(length)
    curves = {name: _bucketed(losses, sizes, edges, name, length) for name, losses in nats.items()}
    first = nats[conditions[0]].double().sum(1) / math.log(2)
    value, stderr = ratio_with_stderr(first.tolist(), sizes.sum(1).tolist())
    return EvalResult(
        task="loss_by_position", version=1, value=value, stderr=stderr, n=len(rows), seed=0,
        seconds=time.perf_counter() - began, command=command,
        metric=f"bits per byte over {length} positions" + (f", writes {conditions[0]}" if inner else ""),
        config={"length": length, "exchange_at": length // 2, "model": describe_model(model)},
        details={
            "edges": edges,
            "bits_per_byte": {name: [ratio for ratio, _ in curve] for name, curve in curves.items()},
            "stderr": {name: [error for _, error in curve] for name, curve in curves.items()},
        },
    )  # fmt: skip


def _losses(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    conditions: Sequence[str],
    batch_size: int,
    segment: int,
    progress: Callable[[str], None],
) -> tuple[dict[str, Tensor], Tensor]:
    """Loss in nats for each condition, and the bytes of each target, both [documents, length]."""
    byte_counts = bytes_per_token(tokenizer).to(model.device)
    nats: dict[str, list[Tensor]] = {name: [] for name in conditions}
    sizes: list[Tensor] = []
    with _evaluating(model):
        for batch in _row_batches(rows, batch_size):
            progress(f"loss by position: {sum(map(len, sizes)) / len(rows):.0%} of {len(rows)} documents")
            tokens = batch.to(model.device)
            sizes.append(byte_counts[tokens[:, 1:]])
            losses = _read_conditions(model, tokens, conditions, segment)
            for name in conditions:
                nats[name].append(losses[name])
    return {name: torch.cat(parts) for name, parts in nats.items()}, torch.cat(sizes)


def _long_documents(corpus: Iterable[Any], tokenizer: Any, length: int, documents: int) -> list[list[int]]:
    rows, seen, longest = [], 0, 0
    for document in corpus:
        seen += 1
        tokens = document_tokens(tokenizer, document.text)
        longest = max(longest, len(tokens))
        if len(tokens) > length:
            rows.append(tokens[: length + 1])
        if len(rows) == documents:
            break
    if len(rows) < 2:
        raise TooFewDocumentsError(
            f"Only {len(rows)} of {seen} documents have more than {length} tokens (the longest has {longest}); "
            "at least 2 are needed. Use a smaller length or longer documents."
        )
    return rows


def _row_batches(rows: list[list[int]], batch_size: int) -> Iterator[Tensor]:
    """Batches of at least two rows each: a single row has no other state to exchange with."""
    tokens = torch.tensor(rows)
    count = max(1, len(rows) // max(2, batch_size))
    yield from torch.tensor_split(tokens, count)


def _read_conditions(model: Any, tokens: Tensor, conditions: Sequence[str], segment: int) -> dict[str, Tensor]:
    """Loss [batch, length] in nats for each condition; NaN before the exchange of "shuffled"."""
    half = (tokens.shape[1] - 1) // 2
    losses = {}
    if "on" in conditions or "shuffled" in conditions:
        before, cache = read_segments(model, tokens[:, : half + 1], None, segment)
        other = cache.fork() if "shuffled" in conditions else None
        if "on" in conditions:
            after, _ = read_segments(model, tokens[:, half:], cache, segment)
            losses["on"] = torch.cat([before, after], 1)
        if other is not None:
            other.reorder_cache(torch.arange(len(tokens), device=tokens.device).roll(1))
            after, _ = read_segments(model, tokens[:, half:], other, segment)
            losses["shuffled"] = torch.cat([torch.full_like(before, math.nan), after], 1)
    if "off" in conditions:
        losses["off"], _ = read_segments(model, tokens, None, segment, writes=False)
    return losses


def read_segments(model: Any, tokens: Tensor, cache: Any, segment: int, writes: bool = True) -> tuple[Tensor, Any]:
    """Loss [batch, t] in nats of tokens [batch, t + 1], read in segments that hand the state on; and that state."""
    losses = []
    for start in range(0, tokens.shape[1] - 1, segment):
        part = tokens[:, start : start + segment + 1]
        output = model(part[:, :-1], past_key_values=cache, use_cache=True, **_writes(writes))
        cache = output.past_key_values
        losses.append(token_nats(output.logits, part[:, 1:]))
    return torch.cat(losses, 1), cache


def _bucketed(
    nats: Tensor, sizes: Tensor, edges: list[int], name: str, length: int
) -> list[tuple[float | None, float | None]]:
    curve: list[tuple[float | None, float | None]] = []
    for low, high in pairwise(edges):
        if name == "shuffled" and low < length // 2:
            curve.append((None, None))
            continue
        bits = (nats[:, low:high].double().sum(1) / math.log(2)).tolist()
        curve.append(ratio_with_stderr(bits, sizes[:, low:high].sum(1).tolist()))
    return curve


@torch.no_grad()
def state_bytes_by_context(model: Any, lengths: Sequence[int], segment: int = 512) -> list[int]:
    """Bytes of state one row holds after reading each of `lengths` tokens (ascending).

    Constant for a model of fixed-size memories; attention keeps keys and values of every token.
    """
    with _evaluating(model):
        cache, read, sizes = None, 0, []
        for length in lengths:
            while read < length:
                count = min(segment, length - read)
                tokens = torch.zeros(1, count, dtype=torch.long, device=model.device)
                cache = model(tokens, past_key_values=cache, use_cache=True).past_key_values
                read += count
            sizes.append(int(cache.nbytes()) if cache is not None else 0)
    return sizes
