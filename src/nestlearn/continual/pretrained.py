"""Causal language models and their tokenizers by name: a folder, a GGUF file, a packaged model, or a Hub name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from nestlearn.data.hub import hub_unreachable
from nestlearn.fields import unknown_name
from nestlearn.models.files import refuse_non_finite_weights, refuse_pickled_weights

from .gguf import PACKAGED, gguf_folder, is_gguf, packaged_file

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
}  # fmt: skip
"""Number formats of weights by name."""


def pretrained(
    name: str | Path, *, dtype: str | torch.dtype | None = None, device: str | None = None, **options: Any
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a folder, a GGUF file, a name of `nestlearn.continual.gguf.PACKAGED` (``smollm2-135m``), or a name on the
            Hugging Face Hub.
        dtype: ``"fp32"`` or ``"bf16"``; the format of the saved weights by default. Weights of a GGUF file are
            dequantized to float32.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, or ``"auto"`` to spread the layers over all devices.
        options: of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: there is no such model, its files are damaged or lack a tokenizer, its weights are a pickle or hold
            NaN or infinite numbers, or the format or device does not exist.

    Example:
        >>> model, tokenizer = pretrained("smollm2-135m")                                    # doctest: +SKIP
    """
    if dtype is not None:
        options["dtype"] = parse_dtype(dtype)
    if device is not None:
        options["device_map"] = check_device(device)
    source, local = model_source(name)
    options["local_files_only"] = options.get("local_files_only", False) or local
    refuse_pickled_weights(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=options["local_files_only"])
    except Exception as error:
        raise ValueError(f"no tokenizer can be loaded from {source!r}: {_first_line(error)}.") from error
    return _load_model(source, options), tokenizer


def load_config(name: str | Path) -> PretrainedConfig:
    """The configuration of a model; see `pretrained`.

    Raises:
        ValueError: there is no such model, or its configuration is damaged.
    """
    source, local = model_source(name)
    try:
        return AutoConfig.from_pretrained(source, local_files_only=local)
    except Exception as error:
        raise ValueError(f"the configuration of {source!r} cannot be read: {_first_line(error)}.") from error


def model_source(name: str | Path) -> tuple[str, bool]:
    """Where transformers loads a model from: a folder or a name on the Hub; and whether all of it is on this machine.

    A GGUF file is converted into a folder when it is used for the first time.

    Raises:
        ValueError: there is no such model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(_checked_folder(path)), True
    if str(name) in PACKAGED:
        return str(gguf_folder(packaged_file(str(name)))), True
    if is_gguf(path):
        return str(gguf_folder(path)), True
    refuse_pickled_weights(path)
    if path.is_file():
        raise ValueError(f"{path} is a file, but no GGUF file. Give the folder that a model is saved in.")
    return str(name), _check_hub(str(name))


def _checked_folder(path: Path) -> Path:
    if not (path / "config.json").is_file():
        inside = sorted(path.glob("*.gguf"))
        fix = f"Give its GGUF file: {inside[0]}." if inside else "Name the folder that a model is saved in."
        raise ValueError(f"{path} is no model folder: it has no config.json. {fix}")
    return path


def _check_hub(name: str) -> bool:
    """Whether the model of a Hub name must come from the cache.

    Raises:
        ValueError: the name is none of the Hub, or the Hub cannot be reached and the cache does not hold the model.
    """
    close = difflib.get_close_matches(name.lower(), PACKAGED, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"there is no file or folder {name!r}.{hint} Give a folder with config.json, a GGUF file, "
            f"{' or '.join(map(repr, PACKAGED))}, or a name on the Hugging Face Hub such as 'Qwen/Qwen3-0.6B'."
        ) from error
    unreachable = hub_unreachable(name)
    if unreachable and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise ValueError(
            f"{name!r} is no model folder and no file here, was not downloaded before, and the Hugging Face Hub cannot "
            f"be reached ({unreachable}).{hint} Give the folder that a model is saved in, or try again with a network."
        )
    return unreachable is not None


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """A number format by name.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> parse_dtype("bf16")
        torch.bfloat16
    """
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise unknown_name("dtype", name, tuple(DTYPES))
    return DTYPES[name]


def check_device(name: str) -> str:
    """The name of a device, if this machine has it; ``"auto"`` stands for all devices.

    Raises:
        ValueError: an unknown device, or one that is not there.

    Example:
        >>> check_device("cpu")
        'cpu'
    """
    if name == "auto":
        return name
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:  # torch says in both ways that a device is absent
        raise ValueError(
            f"the device {name!r} cannot be used: {_first_line(error)}. Use cpu, cuda, cuda:1, mps or auto, as far as "
            "this machine and this build of torch have them."
        ) from error
    return name


def _load_model(source: str, options: dict[str, Any]) -> Any:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, **{**options, "use_safetensors": True, "output_loading_info": True}
        )
    except Exception as error:
        raise ValueError(
            f"no causal language model can be loaded from {source!r}: {_first_line(error)}. Give a folder with "
            "config.json and model.safetensors, a GGUF file, or a name on the Hugging Face Hub."
        ) from error
    model, report = loaded
    # transformers fills what is missing with random numbers, and only warns.
    wrong = [
        f"{kind}: {sorted(map(str, report[kind]))[0]}" for kind in ("missing_keys", "mismatched_keys") if report[kind]
    ]
    if wrong:
        raise ValueError(f"The weights in {source} do not fit its config.json ({'; '.join(wrong)}). Copy it again.")
    refuse_non_finite_weights(model, source)
    return model.eval()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
