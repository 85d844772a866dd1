"""`nestlearn serve`."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from nestlearn.cli.common import Device, Dtype, Verbose, hide_progress_bars, plain_console, tune
from nestlearn.cli.stack import LEVELS, parse_levels

HELP = """Serve a model to many users, each with a memory, over the API of OpenAI.

A pretrained model without levels gets them at the first start. Sessions are in the folder --sessions, which one server
at a time uses. Without keys the server answers this machine only:

  nestlearn serve keys add NAME --sessions DIR     prints a new key, once
  nestlearn serve keys list --sessions DIR
  nestlearn serve keys revoke NAME --sessions DIR

[bold]Examples[/bold]

  nestlearn serve smollm2-135m --sessions sessions

  nestlearn serve runs/smollm2 --sessions sessions --host 0.0.0.0 --port 8080 --memory 4G
"""


def run(
    model: Annotated[
        str, typer.Argument(help="A folder, a GGUF file, smollm2-135m or a Hub name; or the word keys.")
    ] = "smollm2-135m",
    words: Annotated[list[str] | None, typer.Argument(help="After keys: add NAME, list, or revoke NAME.")] = None,
    sessions: Annotated[Path, typer.Option(help="Folder of the sessions.")] = Path("sessions"),
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine need keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    memory: Annotated[str, typer.Option(help="Bytes of sessions kept in memory, such as 500M or 2G.")] = "2G",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1024,
    rows: Annotated[int, typer.Option(min=1, help="Answers generated at the same time.")] = 32,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that wait; further ones get status 429.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="Longest time of a request.")] = 600.0,
    body: Annotated[str, typer.Option(help="Largest body of a request, such as 8M.")] = "8M",
    quota: Annotated[str | None, typer.Option(help="Bytes of all sessions of one key, such as 1G.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Serve until Ctrl-C or SIGTERM, or manage keys."""
    if model == "keys":
        _keys(words or [], sessions)
        return
    if words:
        raise ValueError(f"Unexpected arguments {' '.join(words)}. Only 'keys' takes further words.")
    tune(verbose)
    hide_progress_bars()
    _require_extra()
    from nestlearn.serve import Limits
    from nestlearn.serve.run import serve

    limits = Limits(
        memory=parse_bytes(memory), body=parse_bytes(body), tokens=tokens, rows=rows, waiting=waiting, seconds=seconds,
        quota=None if quota is None else parse_bytes(quota),
    )  # fmt: skip
    serve(model, sessions, parse_levels(LEVELS), host=host, port=port, limits=limits, dtype=dtype, device=device)


def parse_bytes(text: str) -> int:
    """A number of bytes, with K, M, G or T for powers of 1,024.

    Example:
        >>> parse_bytes("1.5K")
        1536
    """
    unit = text.strip().upper().removesuffix("B")[-1:]
    power = "KMGT".find(unit) + 1 if unit else 0
    number = text.strip().upper().removesuffix("B")
    try:
        count = int(float(number[:-1] if power else number) * 1024**power)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text!r} is no number of bytes; write 1000000, 500M or 2G.") from error
    if count < 1:
        raise ValueError(f"{text!r} must be at least one byte.")
    return count


def _require_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"serving needs {error.name}. Install the extra: pip install 'nestlearn[serve]'.") from error


def _keys(words: list[str], folder: Path) -> None:
    """Add, list or revoke keys. A server that runs takes notice at once."""
    _require_extra()
    from nestlearn.serve.keys import Keys

    with closing(Keys(folder)) as keys:
        match words:
            case ["add", name]:
                said = f"{keys.add(name)}\nThis key of {name} is shown once; only a digest of it is kept."
            case ["revoke", name]:
                keys.revoke(name)
                said = f"The key of {name} has ended; its sessions stay."
            case ["list"]:
                said = "\n".join(map(_shown, keys.all())) or "There are no keys."
            case _:
                raise ValueError(f"keys {' '.join(words)}: write keys add NAME, keys list or keys revoke NAME.")
    plain_console().print(said)


def _shown(key: Any) -> str:
    def day(seconds: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))

    ended = "" if key.revoked is None else f", revoked {day(key.revoked)}"
    return f"{key.name:32}  {key.shown}...  made {day(key.created)} UTC{ended}"
