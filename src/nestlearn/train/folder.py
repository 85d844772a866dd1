"""The folder of a run: a lock for one process, and the settings and corpus that a resumed run must share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from nestlearn.train import checkpoint
from nestlearn.train.config import CONFIG_FILE, TrainConfig, check_resume
from nestlearn.train.errors import CheckpointError

LOCK_FILE = ".lock"
_DIGEST = "corpus_digest"


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
    try:
        missing = [path for path in (out, *out.parents) if not path.exists()]
        lock = _locked(out)
    except OSError as error:
        raise ValueError(
            f"Cannot use {out} for a run: {error}. Choose another --out, or check the rights of the folder."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            (out / LOCK_FILE).unlink()
        lock.close()
        with suppress(OSError):  # a folder that is not empty stays
            for path in missing:
                path.rmdir()


def _locked(out: Path) -> IO[str]:
    """The open lock file of a folder, locked."""
    path = out / LOCK_FILE
    while True:
        out.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+")
        except FileNotFoundError:  # the previous owner has just removed the empty folder
            continue
        try:
            _lock(file)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise ValueError(
                f"Another process is training into {out}. Wait until it ends, or choose another --out."
            ) from error
        except OSError:
            file.close()
            raise
        # The previous owner may have removed the file after it was opened here; then the lock is on nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()


def _lock(file: IO[str]) -> None:
    """Take the operating system's lock on an open file, without waiting.

    Raises:
        OSError: another process holds it.
    """
    if os.name == "posix":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(0)
        getattr(msvcrt, "locking")(file.fileno(), getattr(msvcrt, "LK_NBLCK"), 1)  # noqa: B009


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
    return all((out / name).exists() and digest(out / name) == digest(last / name) for name in names)


def save_settings(config: TrainConfig, digest: str | None) -> None:
    """Write the settings of a run and the digest of its corpus into its folder."""
    content = config.to_dict() | {_DIGEST: digest}
    checkpoint.write_text(Path(config.out) / CONFIG_FILE, json.dumps(content, indent=1))


def saved_config(out: str | Path) -> TrainConfig:
    """The settings that a run was started with.

    Raises:
        CheckpointError: the folder holds no readable run.
    """
    content = _saved_settings(out)
    content.pop(_DIGEST, None)
    try:
        return TrainConfig(**content)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{out} holds no run to resume: {CONFIG_FILE} cannot be used ({error}).") from error


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
