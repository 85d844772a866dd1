"""The report of the demonstration on a pretrained model."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from nestlearn.evals.report import page
from nestlearn.evals.report.plots import BLUE, ORANGE, Line, Panel, chart

if TYPE_CHECKING:
    from nestlearn.evals.pretrained_demo import PretrainedResults


def write_pretrained_report(results: PretrainedResults, path: Path) -> Path:
    """Write the report, under a temporary name first, and return its path."""
    base, _, practised, lora = results.arms
    lead = (
        f"{escape(results.model)} learned a page about a town that does not exist, and was asked "
        f"{len(results.questions)} questions about it, in other words than the page's and without the page."
    )
    tiles = [
        (f"{base.right:.0%} → {practised.right:.0%}", "right answers of four choices, before and after practice"),
        (f"{base.margin:+.2f} → {practised.margin:+.2f}", "margin: right minus wrong answers, nats per token"),
        (_change(practised.unrelated, base.unrelated), "bits per byte of unrelated text after practice"),
        (_change(lora.unrelated, base.unrelated), f"the same after LoRA, which answers {lora.right:.0%} right"),
    ]
    sections = [*_comparison(results), *_curves(results), *_answers(results), page.heading("The page")]
    sections += [page.sample("", results.page), page.paragraph(f"Machine: {escape(results.machine)}.", "note")]
    commands = [results.command] if results.command else []
    title = "What a pretrained model learned from a page"
    return page.write_page(path, title, lead, sections, tiles=tiles, commands=commands)


def _change(now: float, before: float) -> str:
    return f"{100 * (now / before - 1):+.2f} %"


def _comparison(results: PretrainedResults) -> list[str]:
    before = results.arms[0].unrelated
    rows = [
        [
            arm.label,
            f"{arm.right:.0%}",
            f"{arm.margin:+.2f}",
            f"{arm.near:+.2f}",
            f"{arm.unrelated:.3f} ({_change(arm.unrelated, before)})",
            f"{arm.seconds:.0f}" if arm.seconds else "",
            f"{arm.nbytes / 1e6:.1f}" if arm.nbytes else "",
        ]
        for arm in results.arms
    ]
    header = ("", "right (chance 25 %)", "margin", "near", "unrelated text, bits/byte", "seconds", "MB learned")
    note = (
        "Margin: log probability per token of the right answer minus the mean of three wrong ones of the same kind, "
        "which are not on the page. Near: the same against answers to other questions about the page, where mere "
        "familiarity helps nobody. Seconds of practice include the estimate of the memory of general inputs, made once "
        "for a model."
    )
    return [page.heading("Compared"), page.table(header, rows), page.paragraph(note, "note")]


def _curves(results: PretrainedResults) -> list[str]:
    curves = [("text", results.practice["text"], BLUE), ("answers", results.practice["answers"], ORANGE)]
    lines = [Line(name, range(1, len(y) + 1), y, color) for name, y, color in curves if len(y) > 1]
    if not lines:
        return []
    svg = chart([Panel(lines, "step", "loss of practice, nats per token")])
    note = "Every step reads the page and answers eight questions made from it."
    return [page.heading("Practice"), page.figure(svg, note)]


def _answers(results: PretrainedResults) -> list[str]:
    found = [page.heading("Answers")]
    for i, question in enumerate(results.questions):
        said = [(arm.label, escape(arm.answers[i]) or "(nothing)") for arm in results.arms]
        found += [
            page.paragraph(f"<strong>{escape(question.text)}</strong> The page says: {escape(question.answer)}."),
            page.definitions(said),
        ]
    return found
