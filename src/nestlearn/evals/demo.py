"""The demonstration: a small Hope model and a Transformer of equal size, trained on the same text and compared."""

from __future__ import annotations

import json
import platform
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nestlearn.atomic import write_text
from nestlearn.data import document_ids, load_corpus
from nestlearn.evals.compare import Curve, Row, compare, eval_curve
from nestlearn.evals.language import bits_per_byte, loss_by_position, state_bytes_by_context
from nestlearn.evals.report.demo import DemoResults, RunSummary, write_demo_report
from nestlearn.evals.result import EvalResult
from nestlearn.models import flops, generate_texts
from nestlearn.train import TrainConfig, TrainingInterrupted, load_model, load_tokenizer, read_log, saved_config, train
from nestlearn.train.folder import is_exported

CORPUS = "chronicles"
PROMPTS = {
    "chronicles": "Velmar Dorin was the keeper of Keshan. Tosun Aldrix was the mender of Hothis. Then Velmar ",
    "python-docs": "The for statement is used to",
}
DEFAULT_PROMPT = "In the beginning"
"""Of any other text."""

# Held-out bits per byte that DemoPlan() reaches, and the tolerance for other machines and threads.
EXPECTED = {"hope": 1.20, "transformer": 1.59}
TOLERANCE = 0.15
CONVOLUTION = {"conv_size": 4}
"""The Transformer's keys, queries and values have the short convolution that Hope's have."""

CONVOLUTION_RATE = 4e-3
"""Its learning rate: better with a convolution than the preset's 2e-3, which was found without one (docs/log.md)."""


@dataclass(frozen=True)
class DemoPlan:
    """Sizes of the demonstration; the defaults take five to eight minutes on two cores.

    Attributes:
        steps: updates of both models in the comparison at equal tokens.
        long_steps: updates of a second Transformer run with a schedule of its own. It uses at least the FLOPs and the
            time of the Hope run. 0: the first run serves for all comparisons.
        eval_length: positions of the loss by position, as long as most documents.
    """

    steps: int = 200
    long_steps: int = 320
    sequence_length: int = 1024
    batch_size: int = 2
    eval_interval: int = 25
    eval_windows: int = 16
    eval_length: int = 3072
    eval_documents: int = 24
    eval_bytes: int = 100_000
    state_lengths: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    sample_tokens: int = 300
    seed: int = 0
    overrides: tuple[tuple[str, Any], ...] = ()


QUICK_PLAN = DemoPlan(
    steps=6, long_steps=8, batch_size=4, eval_interval=2, eval_windows=4, eval_length=512, eval_documents=4,
    eval_bytes=4_000, state_lengths=(64, 256, 1024), sample_tokens=40,
)  # fmt: skip


def run_demo(out: Path, corpus: str, plan: DemoPlan, console: Console, note: str | None = None) -> Path:
    """Train, evaluate and report; returns the path of the report.

    A finished run in ``out`` is used again, so an interrupted demonstration continues.
    """
    began = [("hope", "hope-tiny", plan.steps), ("transformer", "transformer-tiny", plan.steps)]
    if plan.long_steps:
        began.append(("transformer-long", "transformer-tiny", plan.long_steps))
    runs = {name: _train(out / name, preset, steps, corpus, plan, console) for name, preset, steps in began}
    held_out = load_corpus(corpus, "validation")
    evaluations, states, samples = {}, {}, {}
    prompt = PROMPTS.get(corpus, DEFAULT_PROMPT)
    for name, run in runs.items():
        console.print(f"Evaluating {run.label} on held-out documents")
        evaluations[name] = _evaluate(run, held_out, corpus, plan)
        if name != "transformer-long":
            model, tokenizer = load_model(run.folder), load_tokenizer(run.folder)
            states[name] = state_bytes_by_context(model, plan.state_lengths)
            samples[name] = generate_texts(
                model, tokenizer, [document_ids(tokenizer, prompt)], max_new_tokens=plan.sample_tokens,
                temperature=0.7, seed=plan.seed,
            )[0]  # fmt: skip
    curves = {name: eval_curve(run.log, run.label) for name, run in runs.items()}
    rows = comparison(curves, evaluations)
    results = DemoResults(
        corpus=corpus,
        prompt=prompt,
        runs=runs,
        curves=curves,
        evaluations=evaluations,
        state_lengths=list(plan.state_lengths),
        state_bytes=states,
        samples=samples,
        rows=rows,
        training_length=plan.sequence_length,
        expected=EXPECTED,
        tolerance=TOLERANCE,
        machine=describe_machine(note),
        commands=commands(out, corpus, runs, prompt),
    )
    path = write_demo_report(results, out / "report.html")
    write_text(out / "results.json", json.dumps(_summary(results, plan), indent=1))
    _print(results, plan, path, console)
    return path


def _train(folder: Path, preset: str, steps: int, corpus: str, plan: DemoPlan, console: Console) -> RunSummary:
    config = TrainConfig(
        preset=preset,
        corpus=corpus,
        out=str(folder),
        steps=steps,
        learning_rate=None if preset.startswith("hope") else CONVOLUTION_RATE,
        sequence_length=plan.sequence_length,
        batch_size=plan.batch_size,
        seed=plan.seed,
        eval_interval=plan.eval_interval,
        eval_windows=plan.eval_windows,
        save_interval=max(1, steps // 2),
        keep_checkpoints=1,
        log_interval=5,
        model=dict(plan.overrides) | ({} if preset.startswith("hope") else {"mixer": CONVOLUTION}),
    )
    label = {"hope": "Hope", "transformer": "Transformer"}.get(folder.name, "Transformer, longer")
    begun = (folder / "train_config.json").exists()
    if begun and saved_config(folder) != config:
        raise ValueError(
            f"{folder} holds a run with other settings (another --corpus, or with and without --quick). "
            "Choose another --out, or delete the folder."
        )
    if begun and is_exported(folder) and read_log(folder)[-1]["step"] == steps:
        console.print(f"{folder} is already trained; using it.")
    else:
        console.print(f"Training {label} ({preset}): {steps} steps of {config.tokens_per_step:,} tokens")
        try:
            train(config, resume=begun, console=console)
        except TrainingInterrupted as stop:
            quick = " --quick" if plan == QUICK_PLAN else ""
            command = f"nestlearn demo --out {shlex.quote(str(folder.parent))} --corpus {shlex.quote(corpus)}{quick}"
            raise TrainingInterrupted(stop.step, stop.checkpoint, stop.exit_code, command) from stop
    model_config = load_model(folder).config
    return RunSummary(
        folder=folder,
        label=label,
        preset=preset,
        steps=steps,
        learning_rate=config.peak_learning_rate(),
        parameters=sum(p.numel() for p in load_model(folder).parameters()),
        flops_per_token=3 * int(flops(model_config, plan.sequence_length)),
        log=read_log(folder),
    )


def _evaluate(run: RunSummary, held_out: Any, corpus: str, plan: DemoPlan) -> dict[str, EvalResult]:
    model, tokenizer = load_model(run.folder), load_tokenizer(run.folder)
    command = f"nestlearn eval {run.folder} --corpus {corpus} --task"
    results = {
        "bits_per_byte": bits_per_byte(
            model,
            tokenizer,
            held_out,
            context=plan.sequence_length,
            max_bytes=plan.eval_bytes,
            command=f"{command} bits_per_byte --context {plan.sequence_length} --max-bytes {plan.eval_bytes}",
        ),
        "loss_by_position": loss_by_position(
            model,
            tokenizer,
            held_out,
            length=plan.eval_length,
            documents=plan.eval_documents,
            command=f"{command} loss_by_position --length {plan.eval_length} --documents {plan.eval_documents}",
        ),
    }
    for task, result in results.items():
        result.save(run.folder / "evals" / f"{task}.json")
    return results


def comparison(curves: dict[str, Curve], evaluations: dict[str, dict[str, EvalResult]]) -> list[Row]:
    """Hope and Transformer at equal steps, FLOPs and seconds, and on whole held-out documents."""
    longest = curves.get("transformer-long", curves["transformer"])
    rows = [
        compare("equal steps (same tokens)", "tokens", curves["hope"], curves["transformer"]),
        compare("equal FLOPs", "flops", curves["hope"], longest),
        compare("equal seconds", "seconds", curves["hope"], longest),
    ]
    final = [evaluations[name]["bits_per_byte"].value for name in ("hope", "transformer")]
    far = [evaluations[name]["loss_by_position"] for name in ("hope", "transformer")]
    last = [result.details["bits_per_byte"]["on"][-1] for result in far]
    edges = far[0].details["edges"]
    rows.append(Row("held-out documents, equal steps", "", final[0], final[1]))
    rows.append(Row(f"positions {edges[-2]:,} to {edges[-1]:,}, equal steps", "", last[0], last[1]))
    return rows


def commands(out: Path, corpus: str, runs: dict[str, RunSummary], prompt: str) -> list[str]:
    """Shell commands that repeat the demonstration and its parts."""
    lines = ["# everything on this page", f"nestlearn demo --out {out}", "", "# one of its runs, and its evaluation"]
    hope = runs["hope"]
    length, batch = (getattr(saved_config(hope.folder), name) for name in ("sequence_length", "batch_size"))
    lines += [
        f"nestlearn train --preset {hope.preset} --corpus {corpus} --out runs/again --steps {hope.steps} "
        f"--sequence-length {length} --batch-size {batch}",
        f"nestlearn eval {hope.folder} --corpus {corpus} --length 1024",
        "",
        "# let it write",
        f'nestlearn generate {hope.folder} "{prompt}"',
        "",
        "# the learning-rate grid behind the presets",
        "python benchmarks/learning_rate_grid.py",
    ]
    return lines


def describe_machine(note: str | None = None) -> str:
    """System, threads and versions that the numbers were measured with."""
    parts = [
        f"{platform.system()} {platform.machine()}",
        f"{torch.get_num_threads()} threads",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
    ]
    return ", ".join(parts + ([note] if note else []))


def _summary(results: DemoResults, plan: DemoPlan) -> dict[str, Any]:
    return {
        "version": 1,
        "plan": asdict(plan),
        "machine": results.machine,
        "rows": [asdict(row) for row in results.rows],
        "runs": {
            name: {**{k: v for k, v in asdict(run).items() if k not in ("log", "folder")}, "last": run.log[-2:]}
            for name, run in results.runs.items()
        },
        "state_bytes": {"lengths": results.state_lengths, **results.state_bytes},
    }


def _print(results: DemoResults, plan: DemoPlan, path: Path, console: Console) -> None:
    table = Table(title="Held-out bits per byte (lower is better)")
    for column in ("", "Hope", "Transformer"):
        table.add_column(column, justify="left" if not column else "right")
    for row in results.rows:
        table.add_row(row.label, f"{row.hope:.3f}", f"{row.transformer:.3f}")
    console.print(table)
    if plan == DemoPlan() and results.corpus == CORPUS:
        for name, expected in results.expected.items():
            value = results.evaluations[name]["bits_per_byte"].value
            verdict = "as expected" if abs(value - expected) <= results.tolerance else "NOT as expected"
            console.print(
                f"{results.runs[name].label}: {value:.3f} bits per byte on held-out documents, {verdict} "
                f"({expected:.2f} ± {results.tolerance:.2f})"
            )
    console.print(f"Report: {path}", soft_wrap=True)
