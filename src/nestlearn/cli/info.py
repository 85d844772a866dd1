"""`nestlearn info`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from nestlearn.cli.common import (
    Dtype,
    SessionFile,
    Verbose,
    hide_progress_bars,
    plain_console,
    print_json,
    read_fields,
    require_file,
)

if TYPE_CHECKING:
    from nestlearn.train.inspection import Facts

HELP = """Show parameters, FLOPs per token, state size and memory of a model, without building its weights.

With --session also what was learned, level by level; for this the weights are loaded.

[bold]Examples[/bold]

  nestlearn info hope-340m --context-length 8192

  nestlearn info hope-tiny --hidden-size 64 --mixer.chunk-size 32

  nestlearn info smollm2-135m

  nestlearn info runs/stacked --session runs/learned/session.safetensors
"""


def run(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A preset, a folder, a GGUF file, smollm2-135m, or a name on the Hugging Face Hub.")
    ],
    context_length: Annotated[int, typer.Option(min=1, help="Tokens of context for FLOPs and state.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows for the memory estimate.")] = 8,
    session: SessionFile = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Print the facts as a table or as JSON."""
    require_file(session)
    hide_progress_bars()
    facts = _facts(model, read_fields(context.args), context_length, batch_size, dtype)
    # Opened before anything is printed: a session of another model is an error, not half an answer.
    learned = None if session is None else _learned(model, session, dtype)
    if as_json:
        print_json(facts.as_dict() | ({} if learned is None else {"session": learned[0]}))
        return
    table = Table(title=model, show_header=False)
    for label, value in facts.rows():
        table.add_row(label, value)
    Console().print(table)
    if learned is not None:
        sizes, levels = learned
        plain_console().print(f"{session}: {sizes['tokens']:,} tokens read, {sizes['bytes']:,} bytes\n{levels}")


def _learned(model: str, session: Path, dtype: str | None) -> tuple[dict[str, int], str]:
    """Tokens and bytes of a session, and the table of its levels."""
    from nestlearn.continual.session import format_levels, open_session

    memory = open_session(model, session, dtype=dtype)
    return {"tokens": memory.tokens, "bytes": memory.nbytes}, format_levels(memory.describe())


def _facts(model: str, fields: dict[str, str], context_length: int, batch_size: int, dtype: str | None) -> Facts:
    """The facts of a preset or a folder of a Hope model, whose fields may be changed, or of any other model."""
    from nestlearn.continual.gguf import PACKAGED
    from nestlearn.continual.pretrained import load_config, parse_dtype
    from nestlearn.fields import unknown_name
    from nestlearn.models import presets
    from nestlearn.train import TrainConfig, build_config
    from nestlearn.train.inspection import model_facts, pretrained_facts
    from nestlearn.train.load import model_fields, resolve_model_config

    if Path(model).exists() or model in PACKAGED or (model not in presets() and ("/" in model or "." in model)):
        config = load_config(model)
        if config.model_type != "hope":
            if fields:
                raise ValueError(
                    f"--{next(iter(fields))} cannot change: {model} is a {config.model_type} model of a fixed shape. "
                    "Leave it out; only fields of presets can be changed."
                )
            return pretrained_facts(config, context_length, None if dtype is None else parse_dtype(dtype))
    elif model not in presets():
        raise ValueError(f"{model!r} is no model here, and an {unknown_name('preset', model, presets())}")
    settings = build_config({"preset": model, **fields}, model_fields(), TrainConfig())
    return model_facts(resolve_model_config(settings), context_length, batch_size)
