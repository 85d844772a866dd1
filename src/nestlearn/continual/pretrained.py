"""Pretrained models from a folder or the Hugging Face hub, and sessions over them from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from nestlearn.continual.session import MemorySession
from nestlearn.data.hub import hub_unreachable
from nestlearn.models.files import refuse_non_finite_weights, refuse_pickled_weights


def load_pretrained(name: str, **options: Any) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a folder, or a name on the hub.
        options: of ``AutoModelForCausalLM.from_pretrained``, such as ``dtype``.

    Raises:
        ValueError: there is no such model, its files are damaged or lack a tokenizer, or its weights are a pickle or
            hold NaN or infinite numbers.

    Example:
        >>> model, tokenizer = load_pretrained("runs/docs")                                  # doctest: +SKIP
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is no model folder: it has no config.json. Name the folder that a model is saved in."
        )
    unreachable = hub_unreachable(name)
    if unreachable and not _is_cached(name):
        raise ValueError(
            f"{name!r} is no folder here, was not downloaded before, and the Hugging Face Hub cannot be reached "
            f"({unreachable}). Give the folder that a model is saved in, or try again with a network."
        )
    options["local_files_only"] = options.get("local_files_only", False) or unreachable is not None
    refuse_pickled_weights(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=options["local_files_only"])
    except Exception as error:
        raise ValueError(f"no tokenizer can be loaded from {name!r}: {_first_line(error)}.") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **{**options, "use_safetensors": True})
    except Exception as error:
        raise ValueError(
            f"no causal language model can be loaded from {name!r}: {_first_line(error)}. Give a folder with "
            "config.json and model.safetensors, or a name on the Hugging Face hub."
        ) from error
    refuse_non_finite_weights(model, name)
    return model.eval(), tokenizer


def _is_cached(name: str) -> bool:
    """Whether a model of the Hub was downloaded before."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # a path, no name on the Hub
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def open_session(name: str, file: Path | None, **options: Any) -> MemorySession:
    """A session over a model: the one saved in ``file`` if it exists, otherwise a new one.

    Args:
        name: of the model, see `load_pretrained`.
        file: of the session; None for a new one.
        options: of a new `MemorySession`.

    Raises:
        ValueError: the model cannot be loaded or has no memory, or the file is of another model.
    """
    if file is not None and file.exists() and options:
        raise ValueError(f"{file} has settings of its own; leave out {', '.join(options)}, or begin a new session.")
    model, tokenizer = load_pretrained(name)
    if file is not None and file.exists():
        return MemorySession.load(file, model, tokenizer)
    return MemorySession(model, tokenizer, **options)
