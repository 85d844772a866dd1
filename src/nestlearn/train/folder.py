"""The folder of a run: a lock for one process, and the settings and corpus that a resumed run must share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nestlearn.atomic import locked, remove_leftovers, write_text
from nestlearn.train import checkpoint
from nestlearn.train.config import CONFIG_FILE, TrainConfig, check_resume
from nestlearn.train.errors import CheckpointError

LOCK_FILE = ".lock"
_DIGEST = "corpus_digest"
_PROCESSES = "processes"


@contextmanager
def claim_folder(out: Path) -> Iterator[None]:
    """Lock the run folder ``out`` for this process. Create it if needed, and remove it again if it stays empty.

    The operating system releases the lock when the process ends, in whatever way. In a distributed run the first
    process holds the lock for all.

    Raises:
        ValueError: another process is training into this folder, or it cannot be created.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    with ExitStack() as stack:
        try:
            missing = [path for path in (out, *out.parents) if not path.exists()]
            stack.callback(_remove_empty, missing)
            stack.enter_context(locked(out / LOCK_FILE, wait=False))
        except BlockingIOError as error:
            raise ValueError(
                f"Another process is training into {out}. Wait until it ends, or choose another --out."
            ) from error
        except OSError as error:
            raise ValueError(
                f"Cannot use {out} for a run: {error}. Choose another --out, or check the rights of the folder."
            ) from error
        remove_leftovers(out)
        yield


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # not empty: the run is there to be kept
        for folder in folders:
            folder.rmdir()


def starting_point(config: TrainConfig, resume: bool) -> Path | None:
    """The checkpoint that a run continues from, None to begin at step 0.

    A run that ended before its first checkpoint begins again, with or without ``resume``.

    Raises:
        ValueError: the folder holds a run and ``resume`` is false, or a setting differs from the saved run's.
        CheckpointError: there is no run to resume, or its last checkpoint is damaged.
    """
    out = Path(config.out)
    last = checkpoint.last_checkpoint(out)
    if not resume:
        if last is not None or is_exported(out):
            raise ValueError(
                f"{out} already holds a run. Continue it with --resume, choose another --out, or delete the folder."
            )
        return None
    check_resume(saved_config(out), config)
    if last is None:
        if is_exported(out):
            raise CheckpointError(
                f"{out} holds a trained model, but no checkpoint to resume from. To train the model further, start a "
                f"new run with --preset {out} and another --out."
            )
        return None
    checkpoint.verify(last)
    done = checkpoint.step_of(last)
    if done > config.steps or (done == config.steps and _is_exported_from(last, out)):
        raise ValueError(f"{last} already has {done} of {config.steps} steps. Ask for more with --steps.")
    return last


def is_exported(out: Path) -> bool:
    """Whether the trained model itself lies in the folder, as at the end of a run."""
    return any(out.glob("model*.safetensors"))


def _is_exported_from(last: Path, out: Path) -> bool:
    """Whether the model in ``out`` is the one of the checkpoint: a run may end between saving the two."""
    names = [path.name for path in last.glob("model*.safetensors")]
    digest = checkpoint.file_digest
    if not names:  # weights in parts
        return is_exported(out)
    return all((out / name).exists() and digest(out / name) == digest(last / name) for name in names)


def save_settings(config: TrainConfig, digest: str | None, count: int) -> None:
    """Write the settings of a run, for how many processes they were given, and the digest of its corpus."""
    content = config.to_dict() | {_DIGEST: digest, _PROCESSES: count}
    write_text(Path(config.out) / CONFIG_FILE, json.dumps(content, indent=1))


def saved_config(out: str | Path) -> TrainConfig:
    """The settings that a run was started with.

    Raises:
        CheckpointError: the folder holds no readable run.
    """
    content = _saved_settings(out)
    for name in (_DIGEST, _PROCESSES):
        content.pop(name, None)
    try:
        return TrainConfig(**content)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{out} holds no run to resume: {CONFIG_FILE} cannot be used ({error}).") from error


def processes() -> int:
    """How many processes train (torchrun)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def saved_processes(out: str | Path) -> int:
    """For how many processes the settings of a run were given."""
    return int(_saved_settings(out).get(_PROCESSES, 1))


def check_corpus(config: TrainConfig, digest: str | None) -> None:
    """Refuse to resume on another text.

    Raises:
        ValueError: the corpus is not the one that the saved run was started with.
    """
    saved = _saved_settings(config.out).get(_DIGEST)
    if saved != digest:
        raise ValueError(
            f"The corpus {config.corpus!r} has changed since the run in {config.out} began (digest {saved}, now "
            f"{digest}), so --resume would go on with another text. Restore the text (python-docs and python-source "
            "change with the version of Python), or start a new run with another --out."
        )


def _saved_settings(out: str | Path) -> dict:
    path = Path(out) / CONFIG_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{out} holds no run to resume: {path.name} cannot be read ({error}).") from error
