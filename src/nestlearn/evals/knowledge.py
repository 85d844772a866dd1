"""Knowledge incorporation: a model reads facts once and is tested on them after more and more other text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nestlearn.continual.readers import Reader
from nestlearn.data.invented_facts import Fact
from nestlearn.evals.result import EvalResult

_ANSWER_TOKENS = 16


def ask(reader: Reader, facts: Sequence[Fact], max_new_tokens: int = _ANSWER_TOKENS) -> list[bool]:
    """For each fact, whether the reader's answer to its question begins with the right value."""
    answers = [reader.generate(fact.question, max_new_tokens=max_new_tokens, stop="\n") for fact in facts]
    return [_same(answer, fact.value) for answer, fact in zip(answers, facts, strict=True)]


def _same(answer: str, value: str) -> bool:
    words = answer.strip().rstrip(".").split()
    return bool(words) and words[0].rstrip(".,;").lower() == value.lower()


def facts_text(facts: Sequence[Fact], wordings: Sequence[int] = (0, 1)) -> str:
    """The facts as a document: every fact once in each wording, one sentence a line."""
    return "".join(f"{fact.statement(wording)}\n" for wording in wordings for fact in facts)


def knowledge_incorporation(
    reader: Reader,
    facts: Sequence[Fact],
    distractor: str,
    lengths: Sequence[int] = (0, 1000, 4000, 16000),
    *,
    wordings: Sequence[int] = (0, 1),
    known: Sequence[Fact] = (),
    seed: int = 0,
    command: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> EvalResult:
    """Accuracy of a reader that has read the facts, by the amount of other text read since.

    The reader answers before it reads anything (its guesses), after the facts, and each time the distractor reaches the
    next length. It reads the distractor once, from its start. Forks of the reader answer, so questions teach nothing.

    Args:
        reader: any `Reader`; it does not change.
        facts: to read and to answer.
        distractor: text without relation to the facts.
        lengths: characters of the distractor read before each round of questions, increasing from 0.
        wordings: of the statements read; each fact is stated once in each, so ``(0, 1) * 5`` states it ten times.
        known: facts that the reader knew before; their accuracy shows the cost of reading.
        seed: recorded, for the choice of facts.
        command: recorded; repeats the evaluation.
        progress: called with each accuracy.

    Returns:
        Accuracy at the last length. ``details["accuracy"]``: at every length; ``details["before"]``: before reading;
        ``details["known"]``: on the known facts, before reading and at every length.

    Raises:
        ValueError: no facts, lengths out of order, or a distractor that is too short.

    Example:
        >>> knowledge_incorporation(session, invent_facts(4, seed=0), book)                  # doctest: +SKIP
    """
    _check(facts, distractor, lengths)
    started = time.perf_counter()
    details = _rounds(reader, facts, distractor, lengths, wordings, known, progress)
    details["chance"] = _accuracy_of_guessing(facts)
    n, value = len(facts), details["accuracy"][-1]
    return EvalResult(
        task="knowledge_incorporation",
        version=1,
        metric="accuracy",
        value=value,
        stderr=(value * (1 - value) / n) ** 0.5,
        n=n,
        seed=seed,
        seconds=time.perf_counter() - started,
        command=command,
        config={"lengths": list(lengths), "wordings": list(wordings), "facts": n, "known": len(known)},
        details=details,
    )


def _check(facts: Sequence[Fact], distractor: str, lengths: Sequence[int]) -> None:
    if not facts:
        raise ValueError("there are no facts to read; use invent_facts(people=..., seed=...).")
    if list(lengths) != sorted(set(lengths)) or not lengths or lengths[0] < 0:
        raise ValueError(f"lengths={list(lengths)} must be different numbers of characters in increasing order.")
    if len(distractor) < lengths[-1]:
        raise ValueError(f"the distractor has {len(distractor)} characters, the last length asks for {lengths[-1]}.")


def _rounds(
    reader: Reader,
    facts: Sequence[Fact],
    distractor: str,
    lengths: Sequence[int],
    wordings: Sequence[int],
    known: Sequence[Fact],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Accuracies before reading and at every length."""
    before = _accuracy(ask(reader.fork(), facts))
    progress(f"before reading: {before:.2f}")
    kept = [_accuracy(ask(reader.fork(), known))] if known else []
    accuracies: list[float] = []
    for after in _after_lengths(reader.fork(), facts_text(facts, wordings), distractor, lengths):
        accuracies.append(_accuracy(ask(after, facts)))
        kept += [_accuracy(ask(after, known))] if known else []
        progress(f"after {lengths[len(accuracies) - 1]} characters of other text: {accuracies[-1]:.2f}")
    return {"accuracy": accuracies, "before": before, "known": kept}


def _after_lengths(reader: Reader, told: str, distractor: str, lengths: Sequence[int]) -> Iterator[Reader]:
    """For each length, a copy of the reader after the facts and that many characters of the distractor."""
    reader.read(told)
    read = 0
    for length in lengths:
        if length > read:
            reader.read(distractor[read:length])
            read = length
        yield reader.fork()


def _accuracy(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def _accuracy_of_guessing(facts: Sequence[Fact]) -> float:
    return sum(1 / len(fact.choices) for fact in facts) / len(facts)
