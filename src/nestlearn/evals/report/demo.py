"""The report of `nestlearn demo`."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from nestlearn.evals.compare import Curve, Row
from nestlearn.evals.report import page
from nestlearn.evals.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, Line, Panel, chart
from nestlearn.evals.result import EvalResult


@dataclass(frozen=True)
class RunSummary:
    """One training run of the demonstration; ``flops_per_token`` counts forward and backward."""

    folder: Path
    label: str
    preset: str
    steps: int
    learning_rate: float
    parameters: int
    flops_per_token: int
    log: list[dict[str, Any]]

    def last(self, key: str) -> float:
        """The last value of ``key`` in the log."""
        return next(line[key] for line in reversed(self.log) if key in line)


@dataclass(frozen=True)
class DemoResults:
    """Everything the report shows. Keys of the mappings: "hope", "transformer", "transformer-long"."""

    corpus: str
    prompt: str
    runs: dict[str, RunSummary]
    curves: dict[str, Curve]
    evaluations: dict[str, dict[str, EvalResult]]
    state_lengths: list[int]
    state_bytes: dict[str, list[int]]
    samples: dict[str, str]
    rows: list[Row]
    training_length: int
    expected: dict[str, float]
    tolerance: float
    machine: str
    commands: list[str]


COLORS = {"hope": BLUE, "transformer": ORANGE, "transformer-long": ORANGE}


def write_demo_report(results: DemoResults, path: Path) -> Path:
    """Write the report, under a temporary name first, and return its path."""
    hope, transformer = results.runs["hope"], results.runs["transformer"]
    lead = (
        "A Hope model has no attention. Its layers are small memories that go on learning while they read: every token "
        "changes their weights a little, at inference too. Here one was trained next to a Transformer of the same size "
        f"({hope.parameters:,} and {transformer.parameters:,} parameters, both with short convolutions) on the same "
        f"{hope.last('tokens'):,.0f} bytes of {escape(_corpus_name(results.corpus))}. Then both predicted documents "
        "that neither had seen."
    )
    sections = [
        *_learning(results),
        *_positions(results),
        *_state(results),
        *_samples(results),
        *_numbers(results),
        *_expected(results),
    ]
    title = "Hope and a Transformer, trained side by side"
    return page.write_page(path, title, lead, sections, tiles=_tiles(results), commands=results.commands)


def _tiles(results: DemoResults) -> list[tuple[str, str]]:
    """The four most important numbers."""
    names = ("hope", "transformer")
    value = [f"{results.evaluations[name]['bits_per_byte'].value:.2f}" for name in names]
    far = [f"{_curve(results, name, 'on')[-1] or 0.0:.2f}" for name in names]
    size = [_size(results.state_bytes[name][-1]) for name in names]
    last = results.evaluations["hope"]["loss_by_position"].config["length"]
    speed = results.runs["transformer"].last("seconds") / results.runs["hope"].last("seconds")
    return [
        (
            " vs ".join(value),
            "bits per byte on held-out documents, Hope vs Transformer, after the same text (lower is better)",
        ),
        (
            " vs ".join(far),
            f"bits per byte at position {last:,}, {last // results.training_length} times the training length",
        ),
        (" vs ".join(size), f"state of one sequence after {results.state_lengths[-1]:,} bytes"),
        (f"{speed:.2f} ×", "training speed of Hope relative to the Transformer on this machine"),
    ]


def _corpus_name(corpus: str) -> str:
    known = {
        "python-docs": "Python's own documentation",
        "chronicles": "generated chronicles, whose invented names come back within a document and in no other",
    }
    return known.get(corpus, corpus)


def _curve(results: DemoResults, name: str, condition: str) -> list[float | None]:
    return results.evaluations[name]["loss_by_position"].details["bits_per_byte"][condition]


def _learning(results: DemoResults) -> list[str]:
    values = [value for curve in results.curves.values() for value in curve.bits_per_byte]
    y_range, panels = (min(values) - 0.1, max(values) + 0.1), []
    for axis, label in (("tokens", "bytes read"), ("flops", "FLOPs"), ("seconds", "seconds")):
        lines = []
        for name, curve in results.curves.items():
            if name == "transformer-long" and axis == "tokens":
                continue
            if name == "transformer" and axis != "tokens" and "transformer-long" in results.curves:
                continue
            label_of = results.runs["transformer"].label if name == "transformer-long" else curve.label
            lines.append(Line(label_of, getattr(curve, axis), curve.bits_per_byte, COLORS[name]))
        y_label = "held-out bits per byte" if axis == "tokens" else ""
        panels.append(Panel(lines, label, y_label, y_range=y_range, x_format=_short))
    training = [
        Line(run.label, *_training_points(run), color=COLORS[name], width=1.4)
        for name, run in results.runs.items()
        if name != "transformer-long"
    ]
    longer = results.runs.get("transformer-long")
    extra = (
        f" In the two panels on the right the Transformer is a second run of {longer.steps:,} steps with a schedule of "
        "its own, so that it spends at least as much computation and time as Hope."
        if longer
        else " In the two panels on the right the curves end where their runs end."
    )
    return [
        page.heading("Learning"),
        page.figure(
            chart(panels),
            f"Bits per byte on held-out text during training, against text read, computation and time.{extra}",
        ),
        page.figure(
            chart([Panel(training, "bytes read", "training bits per byte", x_format=_short)], height=2.8),
            "The same on the training text; each point is a mean over five steps.",
        ),
    ]


def _training_points(run: RunSummary) -> tuple[list[float], list[float | None]]:
    lines = [line for line in run.log if "bits_per_byte" in line]
    return [line["tokens"] for line in lines], [line["bits_per_byte"] for line in lines]


def _positions(results: DemoResults) -> list[str]:
    result = results.evaluations["hope"]["loss_by_position"]
    edges, length = result.details["edges"], result.config["length"]
    middle = [(low + high) / 2 for low, high in pairwise(edges)]
    lines = [
        Line("Hope", middle, _curve(results, "hope", "on"), BLUE, band=result.details["stderr"]["on"]),
        Line("Hope, writes off", middle, _curve(results, "hope", "off"), PURPLE, style="--"),
        Line("Hope, memories exchanged", middle, _curve(results, "hope", "shuffled"), GREEN, style=":", width=2.4),
        Line("Transformer", middle, _curve(results, "transformer", "on"), ORANGE),
        Line("Transformer, caches exchanged", middle, _curve(results, "transformer", "shuffled"), GREY, style=":"),
    ]
    marks = [(results.training_length, "training length"), (length // 2, "exchange")]
    highest = max(value for line in lines for value in line.y if value is not None)
    lowest = min(value for line in lines for value in line.y if value is not None)
    panel = Panel(
        lines, "position in the document (bytes)", "bits per byte", marks=marks,
        y_range=(lowest - 0.1, highest + 0.2),
    )  # fmt: skip
    return [
        page.heading("Does reading help?"),
        page.figure(
            chart([panel], height=4.2),
            f"Loss by position in {result.n} held-out documents, each read from its own start. "
            "<b>Writes off</b>: the same weights, but no memory learns while reading (inner step size 0). "
            f"<b>Exchanged</b>: after {length // 2:,} bytes every document goes on with the memories of another one; "
            "the distance to the solid line is what the memories held about this document. The dashed vertical line "
            f"marks the training length of {results.training_length} bytes; no model was trained on later positions. "
            "The band is one standard error over documents.",
        ),
    ]


def _state(results: DemoResults) -> list[str]:
    lines = [
        Line(results.runs[name].label, results.state_lengths, [float(size) for size in sizes], COLORS[name])
        for name, sizes in results.state_bytes.items()
    ]
    panel = Panel(lines, "context length (bytes read)", "state of one sequence", x_log=True, y_log=True,
                  x_format=lambda value: f"{value:,.0f}", y_format=lambda value: _size(value))  # fmt: skip
    return [
        page.heading("Size of the state"),
        page.figure(
            chart([panel], height=3.0),
            "What a model stores of one sequence to continue it. Hope's memories have a fixed size; attention stores "
            "keys and values of every token.",
        ),
    ]


def _samples(results: DemoResults) -> list[str]:
    parts = [page.heading("Samples"), page.paragraph("The prompt is marked; the model wrote the rest.")]
    for name in ("hope", "transformer"):
        parts.append(page.paragraph(f"<b>{escape(results.runs[name].label)}</b>"))
        parts.append(page.sample(results.prompt, results.samples[name]))
    return parts


def _numbers(results: DemoResults) -> list[str]:
    rows = [[row.label, row.amount, f"{row.hope:.3f}", f"{row.transformer:.3f}"] for row in results.rows]
    best = [2 if row.hope < row.transformer else 3 for row in results.rows]
    runs = [
        ["preset", *(run.preset for run in results.runs.values())],
        ["parameters", *(f"{run.parameters:,}" for run in results.runs.values())],
        ["learning rate", *(f"{run.learning_rate:g}" for run in results.runs.values())],
        ["steps", *(f"{run.steps:,}" for run in results.runs.values())],
        ["bytes read", *(f"{run.last('tokens'):,.0f}" for run in results.runs.values())],
        ["FLOPs", *(f"{run.last('flops'):.3g}" for run in results.runs.values())],
        ["seconds", *(f"{run.last('seconds'):,.0f}" for run in results.runs.values())],
        ["bytes per second", *(f"{run.last('tokens') / run.last('seconds'):,.0f}" for run in results.runs.values())],
        ["bits per byte, held-out documents", *(_with_error(results.evaluations[name]) for name in results.runs)],
    ]
    return [
        page.heading("The numbers"),
        page.paragraph("Held-out bits per byte; the better one in bold."),
        page.table(["compared at", "amount", "Hope", "Transformer"], rows, best),
        page.table(["run", *(run.label for run in results.runs.values())], runs),
        page.definitions(
            [
                (
                    "bits per byte",
                    "the loss in bits divided by the bytes of text it predicts; 8 for a model that knows nothing, "
                    "lower is better",
                ),
                (
                    "FLOPs",
                    "floating-point operations of the model, forward and backward, from its formula; a "
                    "multiply-add counts 2",
                ),
                ("seconds", "time in training steps, without evaluation and saving"),
                (
                    "learning rate",
                    "Hope: of its preset; Transformer: the better of 2e-3 and 4e-3 on this text; cosine schedules",
                ),
            ]
        ),
    ]


def _with_error(evaluations: dict[str, EvalResult]) -> str:
    result = evaluations["bits_per_byte"]
    return f"{result.value:.3f} ± {result.stderr or 0:.3f}"


def _expected(results: DemoResults) -> list[str]:
    expected = ", ".join(
        f"{results.runs[name].label} {value:.2f} ± {results.tolerance:.2f}" for name, value in results.expected.items()
    )
    return [
        page.paragraph(
            f"With the default settings expect, in bits per byte on held-out documents: {escape(expected)}. "
            "Times depend on the machine, losses a little on its thread count. "
            f"Made with: {escape(results.machine)}.",
            "note",
        )
    ]


def _short(value: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _size(count: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
