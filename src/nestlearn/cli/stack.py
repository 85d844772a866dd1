"""`nestlearn stack`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from nestlearn.atomic import atomic_write
from nestlearn.cli.common import (
    Dtype,
    ModelName,
    Progress,
    Verbose,
    command_line,
    hide_progress_bars,
    plain_console,
    tune,
)

HELP = """Put levels of memory on a pretrained language model, and save it.

The output of the model stays the same until it reads. LEVELS are joined by commas, fastest first: a period in tokens,
then options of the level, each after a colon: 64,512:rank=8:lr=0.5,frozen. The default is the setting that read best
in docs/results/pretrained-reading.md.

[bold]Examples[/bold]

  nestlearn stack smollm2-135m --out runs/smollm2

  nestlearn stack Qwen/Qwen3-0.6B --out runs/qwen --dtype bf16

  nestlearn stack model.gguf --levels 64:rank=8 --general manual.txt --out runs/mine

  nestlearn stack runs/llama --levels 32:rank=8,256:rank=8 --mode add --layers last:4 --out runs/stacked
"""

LEVELS = "64:rank=16:rule=orthogonalized:lr=3:retain=1"

_OPTIONS: dict[str, Callable[[str], Any]] = {
    "expansion": float, "rule": str, "lr": float, "retain": float, "clip": float, "hidden": int, "rank": int,
    "momentum": float,
}  # fmt: skip


def parse_levels(text: str) -> list[Any]:
    """``64,512:rank=8:lr=0.5,frozen`` as a list of `Level`.

    Raises:
        ValueError: a word that does not start with a period, an unknown option, or a value that cannot be read.
    """
    from nestlearn.nn import Level

    levels = []
    for word in text.split(","):
        period, *options = word.strip().split(":")
        if period != "frozen" and not period.isdecimal():
            raise ValueError(
                f"--levels: {word!r} does not begin with a period in tokens (or 'frozen'). "
                "Write levels as 64,512:rank=8."
            )
        given: dict[str, Any] = {}
        for option in options:
            name, _, value = option.partition("=")
            if name not in _OPTIONS:
                known = ", ".join(sorted(_OPTIONS))
                raise ValueError(f"--levels: unknown option {name!r} in {word!r}; known: {known}.")
            try:
                given[name] = _OPTIONS[name](value)
            except ValueError as error:
                raise ValueError(f"--levels: {name}={value!r} in {word!r} cannot be read.") from error
        levels.append(Level(period=None if period == "frozen" else int(period), **given))
    return levels


def run(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the stacked model.")],
    levels: Annotated[str, typer.Option(help="Levels, fastest first, such as 64,512:rank=8.")] = LEVELS,
    mode: Annotated[str, typer.Option(help="split, add or copy.")] = "split",
    layers: Annotated[str, typer.Option(help="all, last:N, or numbers joined by commas.")] = "all",
    mlp: Annotated[str | None, typer.Option(help="Pattern of the MLP modules' paths, for other models.")] = None,
    general: Annotated[
        Path,
        typer.Option(
            help="Text file: what is learned leaves answers to such text alone. 'own': the model writes it. 'none'."
        ),
    ] = Path("own"),
    dtype: Dtype = None,
    verbose: Verbose = False,
) -> None:
    """Stack the levels and save the model."""
    tune(verbose)
    hide_progress_bars()
    from nestlearn.continual.general import protect
    from nestlearn.continual.pretrained import pretrained
    from nestlearn.data.text_files import read_text
    from nestlearn.models.stacking import level_parameters, stack_levels

    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} is a file or a folder that is not empty; choose another folder, or remove it first.")
    chosen_levels = parse_levels(levels)
    text = None if str(general) in ("own", "none") else read_text(general)
    chosen = [int(n) for n in layers.split(",")] if layers.replace(",", "").isdecimal() else layers
    with Progress() as progress:
        progress(f"loading {model}")
        loaded, tokenizer = pretrained(model, dtype=dtype)
        progress("stacking levels")
        stacked = stack_levels(loaded, chosen_levels, layers=chosen, mode=cast(Any, mode), mlp=mlp)
        if str(general) != "none":
            progress(f"remembering general inputs ({general})")
            protect(stacked, tokenizer, text)
        progress(f"saving {out}")
        with atomic_write(out, "the stacked model") as folder:
            stacked.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    added = sum(parameter.numel() for parameter in level_parameters(stacked).values())
    plan = stacked.stack_plan
    periods = ", ".join("frozen" if period is None else f"{period:,}" for period in plan.periods)
    plain_console().print(
        f"Saved {out}: levels of {periods} tokens on {len(plan.paths)} MLPs (mode {mode}); "
        f"their initial weights are {added:,} parameters.\n"
        f"Let it learn: {command_line('learn', out)} --stream FILE --out FOLDER"
    )
