"""The cache of a Hope model: the fast state of all its layers after the tokens read so far."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nestlearn.models.files import TensorFile
from nestlearn.nn.cms import ContinuumState
from nestlearn.nn.state import (
    Tree,
    clone,
    detach,
    flatten_state,
    index_rows,
    map_tensors,
    record,
    state_bytes,
    tensors_of,
)
from nestlearn.nn.state import unflatten_state as rebuild

CACHE_FILE = TensorFile("nestlearn.HopeCache", 1, "HopeCache", "HopeCache.save")


def _differences(theirs: Any, ours: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """``(name, theirs, ours)`` of every value in which two signatures differ, named by its path."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted({*theirs, *ours})
        parts = [(f"{name}.{key}" if name else key, theirs.get(key), ours.get(key)) for key in keys]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        parts = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(theirs, ours, strict=True))]
    else:
        return [] if theirs == ours else [(name, theirs, ours)]
    return [found for key, a, b in parts for found in _differences(a, b, key)]


@record("block")
class LayerState(NamedTuple):
    """The state of one block: that of its mixer and that of its continuum memory (None before the first token)."""

    mixer: Tree = None
    cms: Tree = None


@record("segment")
class Segment(NamedTuple):
    """Rows that stand in the middle of the same segment, from which levels will learn when it is complete.

    ``rows`` are their numbers in the batch, ``ids`` the tokens read, ``learns`` whether their steps count, ``begins``
    whether the first token starts a document, ``layers`` the state before it (empty: fresh).
    """

    rows: Tensor
    ids: Tensor
    learns: Tensor
    begins: Tensor
    layers: tuple[LayerState, ...]


class HopeCache:
    """The fast state of every layer: fast weights, convolution tails, keys and values of attention.

    The model reads and updates it in place (``past_key_values``). Its size does not grow with the context unless a
    layer is full attention. Reading a text in any split with one cache equals reading it at once.

    Example:
        >>> cache = HopeCache()
        >>> cache.get_seq_length()
        0
    """

    is_compileable = False

    def __init__(self) -> None:
        self.layers: list[LayerState] = []
        # Unfinished segments; empty for models without levels that learn from the loss.
        self.segments: list[Segment] = []
        self.seen = 0
        self.signature: dict[str, Any] | None = None
        # Rows to reset before their next real token; None if there are none.
        self.pending_reset: Tensor | None = None

    def __repr__(self) -> str:
        return f"HopeCache(layers={len(self.layers)}, rows={self.batch_size}, seen={self.seen}, bytes={self.nbytes()})"

    @property
    def batch_size(self) -> int:
        """Rows held; 0 before the first token."""
        tensors = tensors_of(self.layers)
        return tensors[0].shape[0] if tensors else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, padding included (what `generate` continues from)."""
        del layer_idx
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: fast weights cannot return to an earlier token. Use `fork` before reading instead."""
        raise ValueError(
            f"a HopeCache cannot drop its last {tokens_to_remove} tokens: they have changed the fast weights. Fork the "
            "cache before you read tokens that may be dropped later."
        )

    # -- rows ---------------------------------------------------------------------------------------------------

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Forget everything, or start a new document in the given rows with their next real token.

        A new document keeps what levels with ``reset=False`` have learned; forgetting everything does not.

        Args:
            rows: Bool[batch] mask or a list of row numbers; None for all.

        Raises:
            ValueError: a row the cache does not have.
        """
        if rows is None:
            self.layers, self.segments, self.seen, self.pending_reset = [], [], 0, None
            return
        size, index = self.batch_size, torch.as_tensor(rows, device="cpu")
        if index.dtype != torch.bool:
            if any(not 0 <= row < size for row in index.flatten().tolist()):
                raise ValueError(f"rows={index.tolist()} names a row the cache lacks; it holds 0..{size - 1}.")
            index = torch.zeros(size, dtype=torch.bool).index_fill(0, index.long().flatten(), True)
        elif index.shape != (size,):
            raise ValueError(f"rows has shape {tuple(index.shape)}, but the cache holds {size} rows.")
        if not tensors_of(self.layers):
            return
        mask = index.to(tensors_of(self.layers)[0].device)
        self.pending_reset = mask if self.pending_reset is None else self.pending_reset | mask

    def _map_rows(self, index: Tensor) -> None:
        self.layers = index_rows(self.layers, index)
        self.segments = [moved for segment in self.segments if (moved := _moved(segment, index)) is not None]
        if self.pending_reset is not None:
            self.pending_reset = self.pending_reset.index_select(0, index.to(self.pending_reset.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]`` (beam search)."""
        self._map_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows only."""
        self._map_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times (before a beam search from a cache of one row per prompt)."""
        self._map_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    # -- copies -------------------------------------------------------------------------------------------------

    def _map(self, change: Callable[[Tree], Tree]) -> HopeCache:
        """A cache whose parts are ``change`` of this one's."""
        other = HopeCache()
        other.seen, other.signature = self.seen, self.signature
        other.layers, other.segments = change((self.layers, self.segments))
        other.pending_reset = change(self.pending_reset)
        return other

    def fork(self) -> HopeCache:
        """An independent copy: both can go on reading different texts."""
        return self._map(clone)

    def to(self, device: torch.device | str) -> HopeCache:
        """The cache on another device (this one is left as it is)."""
        return self._map(lambda tree: map_tensors(lambda x: x.to(device), tree))

    def detach(self) -> HopeCache:
        """The cache without its autograd graph (truncated backpropagation through time)."""
        return self._map(detach)

    def forget(self, levels: Iterable[int]) -> HopeCache:
        """The cache with some levels of every continuum memory (by number, 0 the fastest) at their initial weights.

        An unfinished segment goes on without what these levels had learned. The caches share tensors.

        Example:
            >>> from nestlearn import HopeConfig, HopeForCausalLM
            >>> levels = [{"period": 4, "hidden": 8}, {"period": 6, "hidden": 8}]
            >>> model = HopeForCausalLM(HopeConfig(hidden_size=16, num_hidden_layers=1, cms=levels)).eval()
            >>> cache = model(torch.zeros(1, 9, dtype=torch.long), use_cache=True).past_key_values
            >>> [level is None for level in cache.forget([0]).layers[0].cms.levels]
            [True, False]
        """
        chosen, other = set(levels), self._map(lambda tree: tree)
        other.layers = [_forget(layer, chosen) for layer in self.layers]
        other.segments = [s._replace(layers=tuple(_forget(layer, chosen) for layer in s.layers)) for s in self.segments]
        return other

    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return state_bytes((self.layers, self.segments))

    # -- use by a model -----------------------------------------------------------------------------------------

    def check(self, signature: dict[str, Any], batch: int) -> None:
        """Raise ValueError unless the cache is empty or holds the state of such a model for that many rows."""
        if not self.layers:
            return
        if self.signature is not signature and self.signature != signature:
            changed = _differences(self.signature or {}, signature)
            raise ValueError(
                "the cache was filled by a model of another configuration; different: "
                + ", ".join(f"{name} (cache {theirs!r}, model {ours!r})" for name, theirs, ours in changed)
                + ". Use the cache with the model that filled it, or start with a new HopeCache()."
            )
        if self.batch_size not in (0, batch):
            raise ValueError(
                f"the cache holds {self.batch_size} rows, the input has {batch}. Select or repeat rows "
                "(batch_select_indices, batch_repeat_interleave), or start with a new HopeCache()."
            )

    def update(
        self, layers: list[LayerState], time: int, signature: dict[str, Any], segments: list[Segment] | None = None
    ) -> None:
        """Replace the states by those after ``time`` more columns."""
        self.layers, self.seen, self.signature = layers, self.seen + time, signature
        self.segments = segments or []

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, complete or absent; its JSON header holds the structure and a checksum.

        Raises:
            OSError: the file cannot be written; what was at ``path`` before is untouched.
            ValueError: ``path`` holds a file of another kind, which stays.
        """
        tensors, header = self.to_tree()
        CACHE_FILE.write(Path(path), tensors, header)

    def to_tree(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named tensors on the CPU and a header for JSON, to be stored in another file; see `from_tree`.

        Example:
            >>> tensors, header = HopeCache().to_tree()
            >>> HopeCache.from_tree(tensors, header).get_seq_length()
            0
        """
        tree = {"layers": [tuple(layer) for layer in self.layers], "pending_reset": self.pending_reset}
        if self.segments:
            tree["segments"] = self.segments
        tensors, spec = flatten_state(tree, "cache")
        tensors = {name: x.detach().cpu() for name, x in tensors.items()}
        return tensors, {"seen": self.seen, "signature": self.signature, "spec": spec}

    @classmethod
    def from_tree(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> HopeCache:
        """The cache of `to_tree`.

        Raises:
            ValueError: the header is not that of a HopeCache, or a tensor is missing.
        """
        try:
            tree = rebuild(tensors, header["spec"])
            cache = cls()
            cache.layers = [LayerState(*layer) for layer in tree["layers"]]
            cache.pending_reset = tree["pending_reset"]
            cache.segments = tree.get("segments", [])
            cache.seen, cache.signature = int(header["seen"]), header["signature"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"an incomplete HopeCache header ({error!r})") from error
        return cache

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any = None, device: torch.device | str = "cpu") -> HopeCache:
        """Read a file of `save`. Nothing is unpickled.

        Args:
            path: the file.
            model: the model (or its config) that will use the cache. It is checked against the file now; without it,
                at the first forward pass.
            device: of the tensors.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, corrupted, not a HopeCache, or of another model configuration.
        """
        path = Path(path)
        tensors, header = CACHE_FILE.read(path)
        try:
            cache = cls.from_tree(tensors, header)
        except ValueError as error:
            raise ValueError(f"{path} has {error}. Restore it from a copy.") from error
        if model is not None:
            cache.check(getattr(model, "config", model).state_signature(), cache.batch_size)
        return cache.to(device)


def _forget(layer: LayerState, levels: set[int]) -> LayerState:
    """The layer's state with some levels at their initial weights (None)."""
    if layer.cms is None:
        return layer
    kept = (None if i in levels else level for i, level in enumerate(layer.cms.levels))
    return layer._replace(cms=ContinuumState(tuple(kept)))


def _moved(segment: Segment, index: Tensor) -> Segment | None:
    """The segment in a batch whose row i is the former row ``index[i]``; None if none of its rows is left."""
    places = {row: place for place, row in enumerate(segment.rows.tolist())}
    rows = [(new, places[old]) for new, old in enumerate(index.tolist()) if old in places]
    if not rows:
        return None
    device = segment.rows.device
    new, old = (torch.tensor(part, device=device) for part in zip(*rows, strict=True))
    return cast(Segment, index_rows(segment, old))._replace(rows=new)
