"""Checkpoints that are complete or absent: written under another name, hashed, then renamed.

A checkpoint is a folder `checkpoint-STEP` with the files of transformers.Trainer and `manifest.json`, which
lists every file with its size and SHA-256. `verify` reads all of it before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nestlearn.atomic import WRITE_ERRORS, publish
from nestlearn.train.errors import CheckpointError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name.

    Example:
        >>> step_of(Path("runs/a/checkpoint-20"))
        20
    """
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not a checkpoint folder: its name must be checkpoint-STEP.")
    return int(match[1])


def list_checkpoints(out: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    folder = Path(out)
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)), key=step_of)


def last_checkpoint(out: str | Path) -> Path | None:
    """The newest checkpoint folder of a run, or None."""
    found = list_checkpoints(out)
    return found[-1] if found else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """List every file of ``folder`` with size and SHA-256 in its manifest."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify(checkpoint: str | Path) -> None:
    """Check that a checkpoint is complete and unchanged.

    Raises:
        CheckpointError: if it is missing, has no manifest, or a file is missing, truncated or changed.
    """
    folder = Path(checkpoint)
    earlier = [path for path in list_checkpoints(folder.parent) if path != folder]
    fix = f" To go on from {earlier[-1]}, delete {folder} and resume again." if earlier else ""
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder {folder}.{fix}")
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} has no readable {MANIFEST} ({error}), so it is not a checkpoint of nestlearn.{fix}"
        ) from error
    for name, expected in files.items():
        problem = _problem(folder / name, expected)
        if problem:
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} {problem}. It is not used.{fix}")


def _problem(path: Path, expected: dict[str, str | int]) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"holds {size} bytes instead of {expected['bytes']} (truncated?)"
    if file_digest(path) != expected["sha256"]:
        return "has changed since it was saved (SHA-256 differs)"
    return None


@contextmanager
def explain_failure(final: Path) -> Iterator[None]:
    """Turn a failed write into a CheckpointError that names the last checkpoint."""
    try:
        yield
    except WRITE_ERRORS as error:
        kept = last_checkpoint(final.parent)
        state = f"The earlier checkpoint {kept} is intact." if kept else "No earlier checkpoint exists."
        raise CheckpointError(
            f"Could not write {final}: {error}. {state} Free some disk space, or choose another --out."
        ) from error


def publish_files(staging: Path, folder: Path) -> None:
    """Move every file of a staging folder to the same name in `folder`, each by one atomic rename.

    Weights come last: a folder with weights is a whole model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name)):
        target = folder / path.name
        if path.is_dir():
            publish_files(path, target)
        else:
            publish(path, target)
    staging.rmdir()
