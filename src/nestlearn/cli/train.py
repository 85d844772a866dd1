"""`nestlearn train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nestlearn.cli.common import Verbose, plain_console, print_json, read_fields, tune

HELP = """Train a model and save it, its tokenizer and its log in a folder.

Every field of the training run and of the model is an option too: --sequence-length 512, --batch-size 8,
--learning-rate 3e-3, --hidden-size 64, --mixer attention, ... ; --dry-run prints them all, resolved. --mixer.NAME sets
an option of the mixer, as in --mixer.chunk-size 32.
--optimizer is adamw, m3, muon, dgd, dgd-inverse, delta-momentum or deep-momentum; --optimizer.NAME sets an option of
it.

[bold]Examples[/bold]

  nestlearn train --preset hope-tiny --corpus python-docs --out runs/docs

  nestlearn train --preset transformer-tiny --corpus "text:notes/*.md" --tokenizer bpe:2048 --out runs/notes

  nestlearn train --preset hope-tiny --optimizer m3 --optimizer.slow-period 20 --out runs/m3

  nestlearn train --config run.yaml --out runs/a --steps 2000 --dry-run

  nestlearn train --resume --out runs/docs

  torchrun --nproc-per-node 8 -m nestlearn train --strategy fsdp --preset hope-340m --corpus hf:NAME --out runs/big
"""


def run(
    context: typer.Context,
    preset: Annotated[str | None, typer.Option(help="A preset, or a folder with a model to train further.")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="python-docs, python-source, text:PATH (file, folder, glob) or hf:NAME[:CONFIG].")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the model, checkpoints and train.jsonl.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file with any of the fields.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")] = False,
    verbose: Verbose = False,
) -> None:
    """Resolve the settings, train, and print what the run reached."""
    from nestlearn.train import build_config, read_config_file, saved_config, train
    from nestlearn.train.load import describe_settings, model_fields, prepare_model_config, prepare_tokenizer

    named = {"preset": preset, "corpus": corpus, "out": out}
    given = {key: value for key, value in named.items() if value is not None} | read_fields(context.args)
    values = {**(read_config_file(config) if config else {}), **given}
    resume = resume or _restarted(Path(values.get("out", "runs/train")))
    base = saved_config(values.get("out", "runs/train")) if resume else None
    settings = build_config(values, model_fields(), base)
    if dry_run:
        print_json(describe_settings(settings, prepare_model_config(settings, prepare_tokenizer(settings))))
        return
    tune(verbose)
    result = train(settings, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        plain_console().print(
            f"Saved {result.out}: {result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s; "
            f"held-out {result.eval_bits_per_byte:.3f} bits per byte."
        )


def _restarted(out: Path) -> bool:
    """Whether torchrun starts the processes again (``--max-restarts``), with the command that began the run."""
    from nestlearn.train.config import CONFIG_FILE

    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (out / CONFIG_FILE).is_file()
