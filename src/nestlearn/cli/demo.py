"""`nestlearn demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nestlearn.cli.common import Verbose, command_line, hide_progress_bars, plain_console, tune

HELP = """Train a small Hope model and a Transformer of equal size on the same text, compare them, write a report.

[bold]Example[/bold]

  nestlearn demo --out runs/demo

  nestlearn demo --pretrained smollm2-135m --out runs/demo-pretrained   # learns a page, and is asked without it
"""


def run(
    out: Annotated[Path, typer.Option(help="Folder for models, results and report.html.")] = Path("runs/demo"),
    corpus: Annotated[str, typer.Option(help="What to train on.")] = "chronicles",
    pretrained: Annotated[
        str | None, typer.Option(help="A pretrained model that learns a page, beside LoRA and the page in context.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only, to see that everything works.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run the demonstration."""
    note = tune(verbose)
    if pretrained is not None:
        hide_progress_bars()
        from nestlearn.evals.pretrained_demo import QUICK_PRETRAINED, PretrainedPlan, run_pretrained_demo

        command = command_line("demo", pretrained=pretrained, out=out)
        plan = QUICK_PRETRAINED if quick else PretrainedPlan()
        console = plain_console()
        console.print(f"Report: {run_pretrained_demo(pretrained, out, plan, console, command)}")
        return
    from nestlearn.evals.demo import QUICK_PLAN, DemoPlan, run_demo

    run_demo(out, corpus, QUICK_PLAN if quick else DemoPlan(), Console(), note)
