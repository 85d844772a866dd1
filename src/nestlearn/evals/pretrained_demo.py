"""The demonstration on a pretrained model: it learns a page that nobody has seen, and is asked without the page."""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nestlearn.atomic import write_text
from nestlearn.continual import LoRA, MemorySession, protect
from nestlearn.continual.pretrained import pretrained
from nestlearn.continual.readers import FineTuningReader
from nestlearn.data.documents import Document
from nestlearn.data.invented_town import TownQuestion, invent_town
from nestlearn.evals.language import bits_per_byte
from nestlearn.evals.learning_setup import known_text
from nestlearn.evals.probes import answer_scores, question_ids
from nestlearn.evals.report.pretrained_demo import write_pretrained_report
from nestlearn.models import generate_texts
from nestlearn.models.stacking import stack_levels, unstack_levels
from nestlearn.nn import Level

LEVEL = Level(period=64, rank=16, rule="orthogonalized", lr=3.0, retain=1.0)


@dataclass(frozen=True)
class PretrainedPlan:
    """Sizes of the demonstration; the defaults take about ten minutes on two cores.

    Attributes:
        passes: of practice.
        lora_passes: of LoRA over the page, at the rate ``lora_lr``.
        level: the level on every MLP.
        lr: factor of its steps in practice.
        general_tokens: of text that the model writes, for its memory of general inputs.
        unrelated_bytes: of text that is scored before and after.
    """

    passes: int = 60
    lora_passes: int = 60
    lora_lr: float = 3e-4
    level: Level = LEVEL
    lr: float = 1.0
    general_tokens: int = 4096
    unrelated_bytes: int = 8192
    seed: int = 0


QUICK_PRETRAINED = PretrainedPlan(passes=2, lora_passes=1, general_tokens=256, unrelated_bytes=512)


@dataclass(frozen=True)
class ArmResult:
    """How a model did: on the questions, on unrelated text, and what learning cost.

    Attributes:
        scores: of each question, mean log probability per token of the right answer, of each wrong one, and of each
            near one.
        answers: what the model said.
        unrelated: bits per byte of text that has nothing to do with the page.
        seconds: of learning.
        nbytes: of what was learned.
    """

    label: str
    scores: list[tuple[float, list[float], list[float]]]
    answers: list[str]
    unrelated: float
    seconds: float = 0.0
    nbytes: int = 0

    @property
    def right(self) -> float:
        """Share of the questions whose right answer is the likeliest of four."""
        return sum(right > max(wrong) for right, wrong, _ in self.scores) / len(self.scores)

    @property
    def margin(self) -> float:
        """Right answer minus the mean of the wrong ones, nats per token, mean over the questions."""
        return _mean([right - _mean(wrong) for right, wrong, _ in self.scores])

    @property
    def near(self) -> float:
        """The same against answers to other questions about the page, for questions that have some."""
        return _mean([right - _mean(near) for right, _, near in self.scores if near])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class PretrainedResults:
    """Everything the report shows."""

    model: str
    page: str
    questions: list[TownQuestion]
    arms: list[ArmResult]
    practice: dict[str, list[float]]
    machine: str
    command: str


def run_pretrained_demo(name: str, out: Path, plan: PretrainedPlan, console: Console, command: str = "") -> Path:
    """Learn, ask and report; returns the path of the report.

    Raises:
        ValueError: the model cannot be loaded or stacked.
    """
    out.mkdir(parents=True, exist_ok=True)
    page, questions = invent_town(plan.seed)
    unrelated = known_text("python-docs", plan.unrelated_bytes)
    say = _Stages(console)
    say(f"loading {name}")
    model, tokenizer = pretrained(name, dtype=torch.bfloat16)
    ask = partial(_ask, tokenizer=tokenizer, questions=questions)
    say("asking the model as it is, and with the page in its context")
    arms = [ask("as it is", model, unrelated=unrelated), ask("page in context", model, unrelated=unrelated, page=page)]
    say("learning the page by practice")
    learned, report = _practise(model, tokenizer, page, plan, console)
    arms.append(learned(partial(ask, "practice, asked without the page", unrelated=unrelated)))
    say("learning the page by LoRA")
    arms.append(_lora(name, page, plan, ask, unrelated))
    results = PretrainedResults(name, page, questions, arms, report, _machine(), command)
    write_text(out / "results.json", json.dumps(asdict(results), indent=1, ensure_ascii=False))
    for arm in arms:
        console.print(
            f"{arm.label}: {arm.right:.0%} right (chance 25 %), margin {arm.margin:+.2f}, near {arm.near:+.2f}, "
            f"unrelated text {arm.unrelated:.3f} bits per byte, {arm.seconds:.0f} s"
        )
    return write_pretrained_report(results, out / "report.html")


class _Stages:
    """Says what comes next, with the time since the start."""

    def __init__(self, console: Console) -> None:
        self._console, self._began = console, time.monotonic()

    def __call__(self, text: str) -> None:
        self._console.print(f"[{time.monotonic() - self._began:4.0f} s] {text}", markup=False)


def _ask(
    label: str,
    model: Any,
    *,
    tokenizer: Any,
    questions: Sequence[TownQuestion],
    unrelated: str,
    page: str = "",
    active: Callable[[], AbstractContextManager[None]] = nullcontext,
    seconds: float = 0.0,
    nbytes: int = 0,
) -> ArmResult:
    """Scores and answers of a model, with the page in its context or without."""
    asked = [question_ids(tokenizer, f"{q.text} Answer in a few words.", page) for q in questions]
    with active():
        scores = [_scores(model, tokenizer, ids, question) for ids, question in zip(asked, questions, strict=True)]
        said = generate_texts(model, tokenizer, asked, max_new_tokens=24)
        bits = bits_per_byte(model, tokenizer, [Document(unrelated, "unrelated")], context=512, batch_size=1).value
    return ArmResult(label, scores, [text.strip() for text in said], bits, seconds, nbytes)


def _scores(
    model: Any, tokenizer: Any, asked: Sequence[int], question: TownQuestion
) -> tuple[float, list[float], list[float]]:
    answers = (question.answer, *question.wrong, *question.near)
    right, *rest = answer_scores(model, tokenizer, asked, answers)
    return right, rest[: len(question.wrong)], rest[len(question.wrong) :]


def _practise(
    model: Any, tokenizer: Any, page: str, plan: PretrainedPlan, console: Console
) -> tuple[Callable[[Callable[..., ArmResult]], ArmResult], dict[str, list[float]]]:
    """What asks the model with what it has practised, and the losses of practice."""
    began = time.monotonic()
    stacked = stack_levels(model, [plan.level], mode="split")
    protect(stacked, tokenizer, tokens=plan.general_tokens, seed=plan.seed)
    session = MemorySession(stacked, tokenizer, compare="none")

    def show(report: Any) -> None:
        if report.steps % 10 == 0 or report.steps == report.total:
            console.print(f"  {report}")

    report = session.practice(page, passes=plan.passes, lr=plan.lr, seed=plan.seed, progress=show)
    seconds = time.monotonic() - began

    def ask(asks: Callable[..., ArmResult]) -> ArmResult:
        found = asks(stacked, active=session.active, seconds=seconds, nbytes=session.nbytes)
        unstack_levels(stacked)
        return found

    return ask, {"text": report.text, "answers": report.answers}


def _lora(name: str, page: str, plan: PretrainedPlan, ask: Callable[..., ArmResult], unrelated: str) -> ArmResult:
    """LoRA over the page. Its weights are float32: rounding of bfloat16 would lose its steps."""
    model, tokenizer = pretrained(name, dtype=torch.float32)
    began = time.monotonic()
    optimizer = partial(torch.optim.AdamW, lr=plan.lora_lr, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = FineTuningReader(model, tokenizer, optimizer, 256, plan.lora_passes, LoRA(16), seed=plan.seed)
        reader.read(page)
    seconds, adapted = time.monotonic() - began, reader.model.eval()
    size = sum(p.numel() * p.element_size() for p in adapted.parameters() if p.requires_grad)
    label = "LoRA on the page, asked without it"
    return ask(label, adapted, unrelated=unrelated, seconds=seconds, nbytes=size)


def _machine() -> str:
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
