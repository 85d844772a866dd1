"""`nestlearn plan`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nestlearn.cli.common import Verbose, plain_console, print_json, read_fields, tune

if TYPE_CHECKING:
    from nestlearn.train.planning import Choice, Plan

HELP = """Say what a training run will take, before it starts: memory of each device, tokens per second, days, and the
strategy that fits. No weight is made.

The speed of a GPU is that of a roofline model: its assumptions are printed. --gpu cpu measures this machine for some
seconds. Every field of the run and of the model is an option too, as for train.

[bold]Examples[/bold]

  nestlearn plan hope-340m --gpus 8 --gpu h100 --context 8192 --tokens 20B

  nestlearn plan hope-1.3b --gpus 64 --gpu h200 --context 8192 --tokens 100B --optimizer m3 --out big.yaml

  nestlearn plan hope-tiny --gpu cpu --dtype float32 --context 512 --tokens 10M
"""
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "states of the optimizer",
    "copies": "copies of weights and gradients",
    "activations": "activations and fast states",
    "reserved": "libraries and the allocator",
}


def run(
    context: typer.Context,
    preset: Annotated[str, typer.Argument(help="A preset, or a folder with a model.")],
    gpus: Annotated[int, typer.Option(min=1, help="Devices, one process each.")] = 1,
    gpu: Annotated[str, typer.Option(help="b200, h200, h100, a100, l40s, 4090, or cpu: this machine.")] = "h100",
    length: Annotated[int, typer.Option("--context", min=2, help="Tokens of a sequence.")] = 2048,
    tokens: Annotated[str, typer.Option(help="Tokens to read, such as 20B or 500M.")] = "1B",
    strategy: Annotated[str, typer.Option(help="auto, ddp, fsdp or hsdp.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences of one device at once.")] = None,
    update_tokens: Annotated[str, typer.Option(help="Tokens of one update, on all devices.")] = "512K",
    out: Annotated[Path | None, typer.Option(help="YAML file for `nestlearn train --config`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Resolve the settings, plan, and print what was found."""
    if strategy not in ("auto", "ddp", "fsdp", "hsdp"):
        raise ValueError(f"--strategy {strategy!r} is none of auto, ddp, fsdp, hsdp.")
    amounts = {"--tokens": read_amount("--tokens", tokens), "update": read_amount("--update-tokens", update_tokens)}
    tune(verbose)
    from nestlearn.train import TrainConfig, build_config
    from nestlearn.train.load import model_fields
    from nestlearn.train.planning import gpu as find_gpu
    from nestlearn.train.planning import plan, this_processor

    given = {"preset": preset, "sequence_length": length, "dtype": "bfloat16"} | read_fields(context.args)
    settings = build_config(given, model_fields(), TrainConfig())
    device = this_processor(gpus, settings.dtype) if gpu.lower() == "cpu" else find_gpu(gpu, settings.dtype)
    found = plan(
        settings,
        device,
        gpus,
        tokens=amounts["--tokens"],
        strategy=strategy,  # pyright: ignore[reportArgumentType]
        batch_size=batch_size,
        update_tokens=int(amounts["update"]),
    )
    if out is not None:
        _write(out, found)
    if as_json:
        print_json(_as_dict(found))
        return
    _print(found, preset, out)


def read_amount(name: str, text: str) -> float:
    """A number with K, M, B or T behind it.

    Raises:
        ValueError: no such number, or none above zero.

    Example:
        >>> read_amount("--tokens", "1.5B")
        1500000000.0
    """
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in UNITS and text[-1:] else (text, "")
    try:
        value = float(number) * UNITS[unit]
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise ValueError(f"{name} {text!r} is no amount of tokens. Write one such as 500M, 20B or 1000000.")
    return value


def _settings(found: Plan) -> dict[str, Any]:
    """The fields that differ from the defaults, as `nestlearn train --config` reads them."""
    from nestlearn.train import TrainConfig

    plain = TrainConfig().to_dict()
    return {name: value for name, value in found.settings.to_dict().items() if value != plain[name]} | {
        "preset": found.settings.preset
    }


def _write(out: Path, found: Plan) -> None:
    import yaml

    from nestlearn.atomic import write_text

    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, yaml.safe_dump(_settings(found), sort_keys=False))


def _as_dict(found: Plan) -> dict[str, Any]:
    return {
        "device": found.device.name,
        "devices": found.devices,
        "parameters": found.parameters,
        "training_flops_per_token": found.flops_per_token,
        "chosen": _choice(found.chosen),
        "others": [_choice(choice) for choice in found.others],
        "days": found.days,
        "mfu": found.mfu,
        "assumptions": list(found.device.assumptions),
        "settings": _settings(found),
    }


def _choice(choice: Choice) -> dict[str, Any]:
    memory = {name: round(size) for name, size in choice.memory._asdict().items()}
    rest = {"memory": memory | {"total": round(choice.memory.total)}, "tokens_per_second": choice.tokens_per_second}
    return choice._asdict() | rest


def _print(found: Plan, preset: str, out: Path | None) -> None:
    chosen, console = found.chosen, plain_console()
    table = Table(show_header=False, title=f"{preset} on {found.devices} × {found.device.name}")
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("FLOPs per token, training", f"{found.flops_per_token:,}")
    table.add_row("strategy", _name(chosen))
    batch = f"{chosen.batch} × {found.settings.sequence_length:,} tokens on each device"
    table.add_row("batch", batch if chosen.accumulation == 1 else f"{batch}, {chosen.accumulation} times per update")
    table.add_row("memory of a device", f"{chosen.memory.total / 1e9:.2f} of {found.device.memory / 1e9:.0f} GB")
    for name, size in chosen.memory._asdict().items():
        table.add_row(f"  {PARTS[name]}", f"{size / 1e9:.2f} GB")
    table.add_row("tokens per second", f"{chosen.tokens_per_second:,.0f}")
    if found.mfu is not None:
        table.add_row("MFU", f"{found.mfu:.0%}")
    updates = f"{found.settings.steps:,} updates of {chosen.tokens:,} tokens"
    table.add_row("time", f"{_time(found.days)} for {updates}")
    console.print(table)
    for other in found.others:
        fits = "" if other.memory.total <= found.device.memory else ", does not fit"
        console.print(
            f"{_name(other)}, batch {other.batch}: {other.memory.total / 1e9:.2f} GB{fits}, "
            f"{other.tokens_per_second:,.0f} tokens/s"
        )
    console.print("Assumed: " + "; ".join(found.device.assumptions) + ".")
    if out is not None:
        console.print(f"Settings: {out}. Run: {_command(found, out)}")


def _name(choice: Choice) -> str:
    size = "" if choice.shard_size is None else f" in groups of {choice.shard_size}"
    return f"{choice.strategy}{size}{', gradient checkpointing' if choice.checkpointing else ''}"


def _time(days: float) -> str:
    for unit, name in ((1.0, "days"), (24.0, "hours"), (1440.0, "minutes")):
        if days * unit >= 2:
            return f"{days * unit:,.1f} {name}"
    return f"{days * 86_400:,.0f} seconds"


def _command(found: Plan, out: Path) -> str:
    from nestlearn.train.planning.devices import PER_MACHINE

    run = f"-m nestlearn train --config {out} --corpus NAME --out runs/{out.stem}"
    if found.devices == 1:
        return f"python {run}"
    nodes, each = max(1, found.devices // PER_MACHINE), min(found.devices, PER_MACHINE)
    several = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 " if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {each} {run}"
