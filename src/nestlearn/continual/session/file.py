"""Session files, and the fingerprint of the model that a session belongs to."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nestlearn.models.files import TensorFile, add_tensors
from nestlearn.models.stacking.plan import SETTINGS

SESSION_FILE = TensorFile("nestlearn.MemorySession", 1, "session", "MemorySession.save")

# Settings of a configuration that do not change what the model computes.
_VOLATILE = {
    "transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "auto_map",
}  # fmt: skip


def fingerprint(model: nn.Module) -> str:
    """A digest of the configuration and of all weights of a model.

    Settings of stacked levels that belong to a session, and the memory of general inputs, do not count: what was
    learned with others is still a change of the same weights.

    It reads every weight, which takes about a second per gigabyte, and again only after an operation of torch has
    changed one in place or replaced one. Changes through ``Tensor.data`` go unnoticed.
    """
    text, held = _config_text(model), [*model.parameters(), *model.buffers()]
    if any(w.is_meta or w.is_inference() for w in held):
        return _digest(model, text)
    now = [(w, w._version) for w in held]
    known = _KNOWN.get(model)
    if known is None or known[0] != text or not _same(known[1], now):
        known = _KNOWN[model] = text, now, _digest(model, text)
    return known[2]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[str, list[tuple[Tensor, int]], str]] = weakref.WeakKeyDictionary()


def _same(before: list[tuple[Tensor, int]], now: list[tuple[Tensor, int]]) -> bool:
    return len(before) == len(now) and all(a is b and v == w for (a, v), (b, w) in zip(before, now, strict=True))


def _config_text(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    if config is None:
        return ""
    kept = {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}
    kept["stacking"] = _shapes_of(kept.get("stacking"))
    return json.dumps(kept, sort_keys=True, default=str)


def _digest(model: nn.Module, config: str) -> str:
    digest = hashlib.blake2b(config.encode(), digest_size=16)
    weights = {name: w for name, w in model.state_dict().items() if ".general_" not in name}
    if any(w.is_meta for w in weights.values()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model  # takes long to import, and few need it

        weights = get_state_dict_offloaded_model(model)
    add_tensors(digest, weights)
    return digest.hexdigest()


def _shapes_of(stacking: Any) -> Any:
    """The description of a stacked model without what a session may change."""
    if not isinstance(stacking, dict):
        return stacking
    levels = [{name: x for name, x in level.items() if name not in SETTINGS} for level in stacking["levels"]]
    return {name: levels if name == "levels" else x for name, x in stacking.items() if name != "general"}


def check_fingerprint(path: Path, header: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ValueError if the session in a file was learned with another model."""
    mine = fingerprint(model)
    if header.get("fingerprint") != mine:
        raise ValueError(
            f"{path} is a session over another model: a {header.get('model')} with fingerprint "
            f"{header.get('fingerprint')}, this is a {type(model).__name__} with {mine}. What it has learned belongs "
            "to the exact weights, levels and dtype with which it was learned; load those."
        )
