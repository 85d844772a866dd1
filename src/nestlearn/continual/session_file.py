"""Session files: one safetensors file with a JSON header, complete or absent, tied to the model it belongs to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nestlearn.models.files import add_tensors, checksum, whole_file

FORMAT = "nestlearn.MemorySession"
VERSION = 1

# What a configuration says about a run, and not about what the model computes.
_VOLATILE = {
    "transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id",
}  # fmt: skip


def fingerprint(model: nn.Module) -> str:
    """A digest of all weights of a model and of its configuration: what is learned beside them belongs to them alone.

    Reads every weight, about a second per gigabyte.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = getattr(model, "config", None)
    if config is not None:
        told = {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    add_tensors(digest, model.state_dict())
    return digest.hexdigest()


def write_session(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a session file under a temporary name in the same folder, then rename it.

    Whatever happens meanwhile (no space, a kill), ``path`` holds either what it held before or the whole new session.

    Raises:
        OSError: it cannot be written; what was at ``path`` is untouched.
    """
    # Tensors may share memory; a safetensors file holds each on its own.
    tensors = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    header = {"format": FORMAT, "version": VERSION, **header}
    text = json.dumps({**header, "checksum": checksum(tensors, header)})
    advice = "the session in memory is whole; check free space and rights, and save again"
    with whole_file(path, "the session", advice) as temporary:
        save_file(tensors, str(temporary), {"nestlearn": text})


def read_session(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a session file; nothing is ever unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, corrupted, foreign, or of another format version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no session file {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("nestlearn")
            header = json.loads(text) if text else None
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is a safetensors file, but not a session; was it written by MemorySession.save?"
                )
            if header.get("version") != VERSION:
                raise ValueError(
                    f"{path} is a session of format version {header.get('version')}; this nestlearn reads version "
                    f"{VERSION}. Load it with the version that saved it."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is truncated, corrupted or not a session ({error}). Restore it from a copy."
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    written = header.pop("checksum", None)
    if checksum(tensors, header) != written:
        raise ValueError(f"{path} is corrupted: its content does not match its checksum. Restore it from a copy.")
    return tensors, header
