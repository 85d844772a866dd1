"""`nestlearn demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nestlearn.cli.common import Verbose, tune

HELP = """Train a small Hope model and a Transformer of equal size on the same text, compare them, write a report.

[bold]Example[/bold]

  nestlearn demo --out runs/demo
"""


def run(
    out: Annotated[Path, typer.Option(help="Folder for models, results and report.html.")] = Path("runs/demo"),
    corpus: Annotated[str, typer.Option(help="What to train on.")] = "chronicles",
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only, to see that everything works.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run the demonstration."""
    from nestlearn.evals.demo import QUICK_PLAN, DemoPlan, run_demo

    note = tune(verbose)
    run_demo(out, corpus, QUICK_PLAN if quick else DemoPlan(), Console(), note)
