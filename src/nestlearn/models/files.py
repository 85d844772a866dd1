"""Files of weights and states: complete or absent when written, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nestlearn.atomic import atomic_write, remove_leftovers

# Pickles that transformers.Trainer writes next to the weights of a model.
_OF_A_TRAINER = {"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def refuse_pickled_weights(name: str | os.PathLike[str]) -> None:
    """Refuse a file or a folder whose weights are a pickle: reading one can run code of whoever wrote it.

    A folder that also holds safetensors is accepted, and so is a name on the Hugging Face hub.

    Raises:
        ValueError: the weights are a pickle. Nothing of it was read.

    Example:
        >>> _ = Path("pytorch_model.bin").write_bytes(b"anything")
        >>> refuse_pickled_weights(".")
        Traceback (most recent call last):
        ValueError: pytorch_model.bin is a pickle, and nestlearn reads weights from safetensors only: ...
    """
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    if any(file.suffix == ".safetensors" for file in files):
        return
    for file in files:
        if file.suffix in _PICKLES and file.name not in _OF_A_TRAINER:
            raise ValueError(
                f"{file} is a pickle, and nestlearn reads weights from safetensors only: a pickle can run code. "
                "Convert it where you trust it: load the model there, and write it with save_pretrained(folder, "
                "safe_serialization=True)."
            )


def first_non_finite_parameter(model: nn.Module) -> str | None:
    """``parameter NAME`` for the first parameter that holds a NaN or an infinity, otherwise None.

    Parameters without values here (on the meta device, because they are offloaded) are left out.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not torch.isfinite(parameter).all():
            return f"parameter {name}"
    return None


def refuse_non_finite_weights(model: nn.Module, name: str | os.PathLike[str]) -> None:
    """Refuse a loaded model whose weights hold NaN or infinite numbers.

    Args:
        model: the model.
        name: folder or name that it was loaded from, for the message.

    Raises:
        ValueError: with the name of the first parameter that is not finite.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> _ = torch.nn.init.constant_(layer.bias, float("nan"))
        >>> refuse_non_finite_weights(layer, "runs/docs")
        Traceback (most recent call last):
        ValueError: The model in runs/docs cannot be used: parameter bias holds NaN or infinite numbers. ...
    """
    damaged = first_non_finite_parameter(model)
    if damaged is not None:
        raise ValueError(
            f"The model in {name} cannot be used: {damaged} holds NaN or infinite numbers. Use an earlier checkpoint, "
            "or train again with a lower learning rate."
        )


def add_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add names, types, shapes and bytes of tensors to a digest of `hashlib`."""
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(cast(Any, x.reshape(-1).view(torch.uint8).numpy()))


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """A digest of all that a file of tensors with a JSON header holds.

    Example:
        >>> tensors = {"x": torch.zeros(2)}
        >>> checksum(tensors, {"seen": 3}) == checksum(tensors, {"seen": 4})
        False
    """
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    add_tensors(digest, tensors)
    return digest.hexdigest()


class TensorFile(NamedTuple):
    """A kind of safetensors file with a header of JSON and a checksum of both.

    Args:
        format: the name of the kind in the file.
        version: of the format.
        noun: what a file holds, for errors.
        writer: the function that writes such files, for errors.

    Example:
        >>> kind = TensorFile("documentation.example", 1, "example", "kind.write")
        >>> kind.write(Path("a.example"), {"x": torch.ones(2)}, {"seen": 3})
        >>> kind.read(Path("a.example"))
        ({'x': tensor([1., 1.])}, {'seen': 3})
    """

    format: str
    version: int
    noun: str
    writer: str

    def write(
        self, path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], advice: str = "free some space"
    ) -> None:
        """Write a file; see `nestlearn.atomic.atomic_write`.

        Raises:
            OSError: it cannot be written; what was at ``path`` is untouched.
            ValueError: ``path`` holds something else than a file of this kind.
        """
        self._refuse_to_replace(path)
        # Tensors may share memory (an anchor equal to the weights); a safetensors file holds each on its own.
        held = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
        header = {"format": self.format, "version": self.version, **header}
        text = json.dumps({**header, "checksum": checksum(held, header)})
        with atomic_write(path, f"the {self.noun}", advice) as temporary:
            save_file(held, str(temporary), {"nestlearn": text})

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of a file. Nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, corrupted, of another kind or of another version.
        """
        remove_leftovers(path.parent)
        if not path.is_file():
            raise FileNotFoundError(f"there is no {self.noun} file {path}.")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = _header(file)
                if header.get("format") != self.format:
                    raise ValueError(
                        f"{path} is a safetensors file, but not a {self.noun}; was it written by {self.writer}?"
                    )
                if header.get("version") != self.version:
                    raise ValueError(
                        f"{path} is a {self.noun} of format version {header.get('version')}; this nestlearn reads "
                        f"version {self.version}. Load it with the version that saved it."
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is truncated, corrupted or not a {self.noun} ({error}). Restore it from a copy."
            ) from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
        if header.pop("checksum", None) != checksum(tensors, header):
            raise ValueError(f"{path} is corrupted: its content does not match its checksum. Restore it from a copy.")
        return tensors, {name: value for name, value in header.items() if name not in ("format", "version")}

    def _refuse_to_replace(self, path: Path) -> None:
        """Files of other kinds stay: a name given by mistake must not destroy a text or a model."""
        if not path.is_file() or not path.stat().st_size:
            return
        try:
            with safe_open(str(path), framework="pt") as file:
                known = _header(file).get("format") == self.format
        except (SafetensorError, OSError, ValueError):
            known = False
        if not known:
            raise ValueError(
                f"{path} holds something else than a {self.noun}, and is kept. Choose another name, or remove the file."
            )


def _header(file: Any) -> dict[str, Any]:
    """The header of an open file; empty if it has none."""
    header = json.loads((file.metadata() or {}).get("nestlearn") or "{}")
    return header if isinstance(header, dict) else {}
