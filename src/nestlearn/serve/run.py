"""A server that runs: its model, its socket, and its end."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn

from nestlearn.atomic import atomic_write
from nestlearn.continual.general import protect
from nestlearn.continual.pretrained import pretrained
from nestlearn.models import HopeForCausalLM
from nestlearn.models.stacking import stack_levels, stacked_model
from nestlearn.nn import Level

from .access import LOG, JsonLines, log
from .application import app
from .keys import Keys
from .limits import Limits

GRACE = 30
"""Seconds that requests have to end when the server stops."""
_HERE = ("127.0.0.1", "localhost", "::1")


def open_model(
    name: str, folder: Path, levels: Sequence[Level], *, dtype: str | None = None, device: str | None = None
) -> tuple[Any, Any]:
    """A model with a memory, and its tokenizer.

    A pretrained model without levels gets these and a memory of general inputs. This takes a minute or more, so the
    result is kept in ``folder/model``: sessions belong to its exact weights.

    Raises:
        ValueError: there is no such model, or the folder has the stacked form of another one.
    """
    kept, source = folder / "model", folder / "model" / "source.txt"
    if kept.is_dir():
        before = source.read_text(encoding="utf-8") if source.is_file() else "?"
        if before != str(name):
            raise ValueError(
                f"{kept} has the levels of the sessions there, put on {before!r}, and the model given is {name!r}. "
                "Give that model, or another folder of sessions."
            )
        return pretrained(kept, dtype=dtype, device=device)
    model, tokenizer = pretrained(name, dtype=dtype, device=device)
    if isinstance(model, HopeForCausalLM) or _has_levels(model):
        return model, tokenizer
    log("stack", model=str(name), periods=[level.period for level in levels])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stacked = protect(stack_levels(model, levels, mode="split"), tokenizer)
    with atomic_write(kept, "the model with levels") as temporary:
        stacked.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "source.txt").write_text(str(name), encoding="utf-8")
    return pretrained(kept, dtype=dtype, device=device)


def _has_levels(model: Any) -> bool:
    try:
        stacked_model(model)
    except ValueError:
        return False
    return True


def bind(host: str, port: int, folder: Path) -> socket.socket:
    """A socket that will listen.

    Raises:
        ValueError: the port is in use, the folder cannot be made, or other machines could reach the server, which has
            no keys.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--sessions {folder} cannot be used: {error.strerror}. Name a folder, or a place where one can be made."
        ) from error
    keys = Keys(folder)
    try:
        if host not in _HERE and not any(key.revoked is None for key in keys.all()):
            raise ValueError(
                f"--host {host} lets other machines in, and there are no keys. Make one first: nestlearn serve keys "
                f"add NAME --sessions {folder}"
            )
    finally:
        keys.close()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise ValueError(
            f"--host {host} --port {port} cannot be used: {error.strerror}. Choose another port."
        ) from error
    return made


def serve(
    name: str, folder: Path, levels: Sequence[Level], *, host: str, port: int, limits: Limits, dtype: str | None = None,
    device: str | None = None,
) -> None:  # fmt: skip
    """Serve a model until SIGINT or SIGTERM. Requests then have `GRACE` seconds to end.

    Raises:
        ValueError: the model, the folder or the address cannot be used.
    """
    write_log()
    listening = bind(host, port, folder)
    with listening:
        model, tokenizer = open_model(name, folder, levels, dtype=dtype, device=device)
        application = app(model, tokenizer, folder, name=Path(name).name, limits=limits)
        config = uvicorn.Config(
            application, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE, server_header=False
        )
        shown = f"[{host}]" if ":" in host else host
        running = _Server(config, f"http://{shown}:{listening.getsockname()[1]}")
        running.run(sockets=[listening])
        if not running.started:
            raise ValueError(f"the server could not start: another one may use {folder}; the log above says why.")


class _Server(uvicorn.Server):
    """Tells its address when it listens."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self.url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            log("listen", url=self.url)


def write_log() -> None:
    """Lines of JSON on standard error; no texts, keys or names of sessions are in them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for logger, level in ((LOG, logging.INFO), (logging.getLogger("uvicorn.error"), logging.WARNING)):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
