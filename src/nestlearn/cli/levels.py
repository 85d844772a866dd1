"""`nestlearn levels`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestlearn.cli.common import Dtype, Progress, Verbose, hide_progress_bars, plain_console, print_json, tune

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 2**25
"""Parameters of a preset below which its weights are always made."""

HELP = """Show a model and its optimizer as nested levels: what learns from what, how often, by which rule.

With --stream the model is trained on the text, in memory only, and every level is measured and switched off in turn:
the report says which levels do nothing. Levels on a pretrained model are measured while it reads. --out writes the page
(.html), the figures (.json) or the table (.txt).

[bold]Examples[/bold]

  nestlearn levels hope-tiny

  nestlearn levels hope-tiny --optimizer m3 --out levels.html

  nestlearn levels runs/mine --stream notes.txt --batches 8 --out health.html
"""


def run(
    model: Annotated[
        str, typer.Argument(help="A preset, a folder, a GGUF file, smollm2-135m, or a name on the Hugging Face Hub.")
    ],
    stream: Annotated[Path | None, typer.Option(help="Text file to measure the levels on.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Its name, or none; default: adamw, for levels on a pretrained model none.")
    ] = None,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate of the optimizer.")] = 1e-3,
    batches: Annotated[int, typer.Option(min=1, help="Batches of the stream.")] = 4,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 256,
    switch_off: Annotated[bool, typer.Option(help="Run the stream again without each level.")] = True,
    out: Annotated[Path | None, typer.Option(help="File for the report: .html, .json or .txt.")] = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Print the table of the levels, or of what was measured."""
    tune(verbose)
    hide_progress_bars()
    from nestlearn.atomic import write_text
    from nestlearn.data.text_files import read_text
    from nestlearn.levels import measure, nested_system

    text = None if stream is None else read_text(stream)
    with Progress() as progress:
        progress(f"loading {model}")
        loaded, tokenizer = _load(model, dtype, weights=text is not None)
        system = nested_system(loaded, _optimizer(loaded, optimizer, lr))
        report: Any = system
        if text is not None:
            progress("measuring the levels")
            report = measure(system, _batches(tokenizer, text, rows, length), steps=batches, switch_off=switch_off)
    if out is not None:
        texts = {".html": report.to_html, ".json": lambda: _json_text(report.as_dict())}
        write_text(out, texts.get(out.suffix, lambda: f"{report}\n")())
    if as_json:
        print_json(report.as_dict())
    else:
        plain_console().print(str(report) + ("" if out is None else f"\nSaved {out}"))


def _load(name: str, dtype: str | None, weights: bool) -> tuple[Any, Any]:
    """A model and its tokenizer; of a preset with random weights, or without any if they are not needed."""
    from nestlearn.continual.pretrained import pretrained
    from nestlearn.data.tokenizers import byte_tokenizer
    from nestlearn.models import HopeConfig, HopeForCausalLM, presets
    from nestlearn.models.flops import meta_model

    if name in presets() and not Path(name).exists():
        config = HopeConfig.from_preset(name)
        model = meta_model(config)
        # Tracing shapes alone takes longer than making a small model and running it.
        small = sum(p.numel() for p in model.parameters()) < SMALL
        return (HopeForCausalLM(config) if weights or small else model), byte_tokenizer()
    return pretrained(name, dtype=dtype)


def _optimizer(model: Any, name: str | None, lr: float) -> Any:
    import torch

    from nestlearn.levels.stacked import learns_by_reading
    from nestlearn.train.optimizers import ENGINE, build_optimizer

    name = name or ("none" if learns_by_reading(model) else ENGINE)
    if name == "none":
        return None
    if name == ENGINE:
        return torch.optim.AdamW(model.parameters(), lr=lr)
    return build_optimizer(name, model, lr=lr, adamw_lr=lr, weight_decay=0.0, betas=(0.9, 0.95), options={})


def _batches(tokenizer: Any, text: str, rows: int, length: int) -> list[Tensor]:
    """Batches of consecutive tokens; a text shorter than one batch gives one of fewer rows, or of one shorter row."""
    import torch

    from nestlearn.data.tokenizers import encode

    ids = torch.as_tensor(encode(tokenizer, [text])[0]).long()
    if len(ids) < 2:
        raise ValueError(f"--stream holds {len(ids)} tokens; levels are measured on two or more.")
    whole = ids[: len(ids) // length * length].view(-1, length) if len(ids) >= length else ids.unsqueeze(0)
    return list(whole.split(rows))


def _json_text(content: dict[str, Any]) -> str:
    import json

    return json.dumps(content, indent=1) + "\n"
