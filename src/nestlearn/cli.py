"""The `nestlearn` command: argument parsing and printing only; the work is done by the packages below."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nestlearn import __version__, cli_bench, cli_eval, cli_learn
from nestlearn.fields import MAX_SEED

app = typer.Typer(
    name="nestlearn",
    help="Train, evaluate and run models that keep learning from what they read.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
ANY_FIELD = {"allow_extra_args": True, "ignore_unknown_options": True}
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more, and show tracebacks of errors.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"nestlearn {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of the program itself; `app` has its help."""


TRAIN_HELP = """Train a model and save it, its tokenizer and its log in a folder.

Every field of the training run and of the model is an option too: --sequence-length 512, --batch-size 8,
--learning-rate 3e-3, --hidden-size 64, --mixer attention, ... ; --dry-run prints them all, resolved.
--optimizer is adamw, m3, muon, dgd, delta-momentum or deep-momentum; --optimizer.NAME sets an option of it.

[bold]Examples[/bold]

  nestlearn train --preset hope-tiny --corpus python-docs --out runs/docs

  nestlearn train --preset transformer-tiny --corpus "text:notes/*.md" --tokenizer bpe:2048 --out runs/notes

  nestlearn train --preset hope-tiny --optimizer m3 --optimizer.slow-period 20 --out runs/m3

  nestlearn train --config run.yaml --out runs/a --steps 2000 --dry-run

  nestlearn train --resume --out runs/docs

  torchrun --nproc-per-node 8 -m nestlearn train --preset hope-340m --corpus hf:NAME --dtype bfloat16 --out runs/big
"""


def _pairs(arguments: list[str]) -> dict[str, str]:
    """`--name value` and `--name=value` as a mapping; a flag without value means true."""
    pairs: dict[str, str] = {}
    position = 0
    while position < len(arguments):
        word = arguments[position]
        if not word.startswith("--"):
            raise ValueError(f"Unexpected argument {word!r}. Fields are given as --name value.")
        name, equals, value = word[2:].partition("=")
        following = arguments[position + 1] if position + 1 < len(arguments) else None
        if not equals and following is not None and not following.startswith("--"):
            value, position = following, position + 1
        elif not equals:
            value = "true"
        pairs[name] = value
        position += 1
    return pairs


@app.command(help=TRAIN_HELP, context_settings=ANY_FIELD)
def train(
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
    from nestlearn.train import build_config, read_config_file, saved_config
    from nestlearn.train import train as run
    from nestlearn.train.load import describe, model_fields, prepare_model_config, prepare_tokenizer

    named = {"preset": preset, "corpus": corpus, "out": out}
    given = {key: value for key, value in named.items() if value is not None} | _pairs(context.args)
    values = {**(read_config_file(config) if config else {}), **given}
    base = saved_config(values.get("out", "runs/train")) if resume else None
    settings = build_config(values, model_fields(), base)
    if dry_run:
        _print_json(describe(settings, prepare_model_config(settings, prepare_tokenizer(settings))))
        return
    _tune(verbose)
    result = run(settings, resume=resume)
    if os.environ.get("RANK", "0") != "0":
        return
    Console().print(
        f"Saved {result.out}: {result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s; "
        f"held-out {result.eval_bits_per_byte:.3f} bits per byte."
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Folder with a saved model.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the sampling.")] = 0,
    verbose: Verbose = False,
) -> None:
    """Continue a text.

    [bold]Example[/bold]

      nestlearn generate runs/docs "The for statement" --max-new-tokens 100 --temperature 0.7
    """
    from nestlearn.evals.sample import continue_text
    from nestlearn.train import load_model, load_tokenizer

    _tune(verbose)
    text = continue_text(
        load_model(model),
        load_tokenizer(model),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    Console(highlight=False, markup=False, soft_wrap=True).print(prompt + text)


app.command(name="eval", help=cli_eval.HELP)(cli_eval.evaluate)


@app.command(context_settings=ANY_FIELD)
def info(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A preset, or a folder with a saved model.")],
    context_length: Annotated[int, typer.Option(min=1, help="Tokens of context for FLOPs and state.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows for the memory estimate.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Show parameters, FLOPs per token, state size and memory of a model, without building its weights.

    [bold]Examples[/bold]

      nestlearn info hope-340m --context-length 8192

      nestlearn info hope-tiny --hidden-size 64 --mixer deltanet
    """
    from nestlearn.train import TrainConfig, build_config
    from nestlearn.train.inspection import model_facts
    from nestlearn.train.load import model_fields, resolve_model_config

    settings = build_config({"preset": model, **_pairs(context.args)}, model_fields(), TrainConfig())
    facts = model_facts(resolve_model_config(settings), context_length, batch_size)
    if as_json:
        _print_json(facts.as_dict())
        return
    table = Table(title=model, show_header=False)
    for label, value in facts.rows():
        table.add_row(label, value)
    Console().print(table)


app.command(help=cli_bench.HELP)(cli_bench.bench)
app.command(help=cli_learn.STACK_HELP)(cli_learn.stack)
app.command(help=cli_learn.LEARN_HELP, context_settings={"allow_extra_args": True})(cli_learn.learn)
app.command(help=cli_learn.CHAT_HELP)(cli_learn.chat)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for models, results and report.html.")] = Path("runs/demo"),
    corpus: Annotated[str, typer.Option(help="What to train on.")] = "python-docs",
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only, to see that everything works.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train a small Hope model and a Transformer of equal size on the same text, compare them, write a report.

    [bold]Example[/bold]

      nestlearn demo --out runs/demo
    """
    from nestlearn.evals.demo import QUICK_PLAN, DemoPlan, run_demo

    note = _tune(verbose)
    run_demo(out, corpus, QUICK_PLAN if quick else DemoPlan(), Console(), note)


def _tune(verbose: bool) -> str | None:
    from nestlearn.train.allocator import tune_allocator

    note = tune_allocator()
    if verbose and note:
        Console(stderr=True).print(f"Allocator: {note}")
    return note


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=1))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors are one readable message on standard error and a non-zero exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    verbose = "--verbose" in words or "-v" in words
    if not verbose:
        warnings.filterwarnings("ignore")
        logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app(words, standalone_mode=True)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # A run stopped by a signal is no fault; its error names the exit status that a shell expects.
        status = getattr(error, "exit_code", None)
        if status is not None:
            _fail(str(error), status, title="Stopped")
        if verbose:
            traceback.print_exc()
        _fail(str(error) or type(error).__name__, 1)
    except KeyboardInterrupt:
        _fail("Stopped at once; nothing since the last checkpoint is saved.", 130, title="Stopped")


def _fail(message: str, code: int, title: str = "Error") -> None:
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{title}: {message}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
