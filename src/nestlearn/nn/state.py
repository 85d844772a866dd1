"""Operations on the state of a layer: a tree whose every tensor has the batch row as its first dimension.

A tree is a tensor, ``None``, a bool, number or string, or a NamedTuple, tuple, list or dict of trees. Tensors hold what
was learned from the tokens read; everything else is static: the same for all rows, and known without looking at the
tensors (so that compiled code may branch on it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from nestlearn.memory import Gates, State

Tree = Any
"""A state tree; see the module documentation."""

Record = TypeVar("Record", bound=type)

_RECORDS: dict[str, type] = {}
"""Classes of records by the name that files give them."""


def record(name: str) -> Callable[[Record], Record]:
    """Class decorator: a NamedTuple that a state holds, under the name that files know it by.

    Files keep the name and the fields, so that the class may be renamed and moved.

    Raises:
        ValueError: the name is that of another class.

    Example:
        >>> from typing import NamedTuple
        >>> @record("documentation.counter")
        ... class Counter(NamedTuple):
        ...     count: torch.Tensor
        >>> tensors, spec = flatten_state(Counter(torch.ones(2)))
        >>> unflatten_state(tensors, spec)
        Counter(count=tensor([1., 1.]))
    """

    def register(cls: Record) -> Record:
        known = _RECORDS.setdefault(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the record name {name!r} of {cls.__qualname__} belongs to {known} already; use another.")
        _RECORDS[name] = cls
        return cls

    return register


record("memory")(State)
record("gates")(Gates)


def _is_record(tree: Tree) -> bool:
    return isinstance(tree, tuple) and hasattr(tree, "_fields")


def _rebuild(tree: Tree, children: list[Tree]) -> Tree:
    """The container ``tree`` with other children, in the order of `children_of`."""
    if isinstance(tree, dict):
        return dict(zip(tree, children, strict=True))
    return type(tree)(*children) if _is_record(tree) else type(tree)(children)


def children_of(tree: Tree) -> list[tuple[str, Tree]] | None:
    """(name, child) pairs of a container in a fixed order; None for a leaf."""
    if isinstance(tree, dict):
        return [(str(name), child) for name, child in tree.items()]
    if _is_record(tree):
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, (tuple, list)):
        return [(str(i), child) for i, child in enumerate(tree)]
    return None


def map_tensors(fn: Callable[[Tensor], Tensor], state: Tree) -> Tree:
    """The same tree with ``fn`` applied to every tensor.

    Example:
        >>> map_tensors(lambda x: x + 1, {"a": torch.zeros(1), "b": None})
        {'a': tensor([1.]), 'b': None}
    """
    children = children_of(state)
    if children is not None:
        return _rebuild(state, [map_tensors(fn, child) for _, child in children])
    return fn(state) if isinstance(state, Tensor) else state


def tensors_of(state: Tree) -> list[Tensor]:
    """All tensors of the tree, in a fixed order."""
    children = children_of(state)
    if children is not None:
        return [tensor for _, child in children for tensor in tensors_of(child)]
    return [state] if isinstance(state, Tensor) else []


def index_rows(state: Tree, index: Tensor) -> Tree:
    """Row ``i`` of the result is row ``index[i]`` of the state (beam search reorders and repeats rows so)."""
    return map_tensors(lambda x: x.index_select(0, index.to(x.device)), state)


def put_rows(state: Tree, rows: Tensor, new: Tree) -> Tree:
    """The state with row ``rows[i]`` replaced by row i of ``new``, a tree of the same structure."""
    if isinstance(state, Tensor):
        return state.index_copy(0, rows.to(state.device), new)
    children, others = children_of(state), children_of(new)
    if children is None or others is None:
        return state
    found = dict(others)
    merged = [put_rows(child, rows, found[name]) for name, child in children]
    return _rebuild(state, merged)


def reset_rows(state: Tree, fresh: Tree, rows: Tensor) -> Tree:
    """The state with the rows where ``rows`` (Bool[B]) is True taken from ``fresh``.

    ``fresh`` has the same structure and B rows (or 1 row, used for all). The rows now stand at different phases, so a
    static flag ``aligned`` becomes False.

    Raises:
        ValueError: the two trees differ in structure or shape.
    """
    if isinstance(state, Tensor):
        if not isinstance(fresh, Tensor) or state.shape[1:] != fresh.shape[1:]:
            raise ValueError(
                f"cannot reset rows: the state has a tensor of shape {tuple(state.shape)} where the fresh state has "
                f"{tuple(fresh.shape) if isinstance(fresh, Tensor) else type(fresh).__name__}. "
                "Make the fresh state with the same module and batch size."
            )
        return torch.where(rows.to(state.device).view(-1, *[1] * (state.dim() - 1)), fresh, state)
    children, others = children_of(state), children_of(fresh)
    if children is None:
        return state
    if others is None or [name for name, _ in children] != [name for name, _ in others]:
        raise ValueError(
            f"cannot reset rows: the state holds {[name for name, _ in children]} where the fresh state holds "
            f"{None if others is None else [name for name, _ in others]}. Make the fresh state with the same module."
        )
    merged = [
        False if name == "aligned" and isinstance(child, bool) else reset_rows(child, other, rows)
        for (name, child), (_, other) in zip(children, others, strict=True)
    ]
    return _rebuild(state, merged)


def detach(state: Tree) -> Tree:
    """The state cut from the autograd graph (truncated backpropagation through time)."""
    return map_tensors(Tensor.detach, state)


def clone(state: Tree) -> Tree:
    """A copy that shares no memory with the state."""
    return map_tensors(lambda x: x.clone(memory_format=torch.contiguous_format), state)


def state_bytes(state: Tree) -> int:
    """Bytes held by the tensors of the tree; tensors that share memory (an anchor, an expanded initial) count once."""
    sizes = {}
    for x in tensors_of(state):
        storage = x.untyped_storage()
        key = (x.device, storage.data_ptr()) if storage.data_ptr() else id(x)
        sizes[key] = storage.nbytes()
    return sum(sizes.values())


def flatten_state(state: Tree, prefix: str = "state") -> tuple[dict[str, Tensor], Any]:
    """Split a tree into named tensors and a description that JSON can hold.

    Returns:
        ``(tensors, spec)``; ``unflatten_state(tensors, spec)`` gives the tree back.

    Raises:
        TypeError: a leaf is neither a tensor nor None, bool, int, float or str, or a NamedTuple has no name
            (see `record`).
    """
    children = children_of(state)
    if children is None:
        if isinstance(state, Tensor):
            return {prefix: state}, {"tensor": prefix}
        if state is None or isinstance(state, (bool, int, float, str)):
            return {}, {"value": state}
        raise TypeError(f"a state holds a {type(state).__name__} at {prefix}; only tensors, None and JSON scalars fit.")
    tensors: dict[str, Tensor] = {}
    specs = []
    for name, child in children:
        found, spec = flatten_state(child, f"{prefix}.{name}")
        tensors.update(found)
        specs.append(spec)
    kind = "dict" if isinstance(state, dict) else "list" if isinstance(state, list) else "tuple"
    described: dict[str, Any] = {"kind": kind, "names": [name for name, _ in children], "children": specs}
    if _is_record(state):
        described |= {"kind": "record", "type": _record_name(type(state))}
    return tensors, described


def _record_name(cls: type) -> str:
    name = next((name for name, known in _RECORDS.items() if known is cls), None)
    if name is None:
        raise TypeError(
            f"a state holds a {cls.__qualname__}, a NamedTuple that files have no name for. Give it one where it is "
            f'defined: @nestlearn.nn.state.record("my_package.{cls.__name__.lower()}").'
        )
    return name


def _record_type(name: str) -> type:
    """The class of a registered name."""
    if name not in _RECORDS:
        raise ValueError(
            f"the state needs the record type {name!r}, which nothing has registered. Import the package that defines "
            "it, or load the file with the version of nestlearn that saved it."
        )
    return _RECORDS[name]


def unflatten_state(tensors: dict[str, Tensor], spec: Any) -> Tree:
    """The tree described by ``spec`` with the given tensors; inverse of `flatten_state`.

    Raises:
        ValueError: the description is malformed, or names a tensor or a record type that does not exist.
    """
    if not isinstance(spec, dict):
        raise ValueError(f"a state description must be a mapping, received {type(spec).__name__}; the file is foreign.")
    if "tensor" in spec:
        if spec["tensor"] not in tensors:
            raise ValueError(f"the state needs the tensor {spec['tensor']!r}, which the file lacks; it is incomplete.")
        return tensors[spec["tensor"]]
    if "value" in spec:
        return spec["value"]
    if not spec.keys() >= {"kind", "names", "children"} or len(spec["names"]) != len(spec["children"]):
        raise ValueError(f"a state description has the keys {sorted(spec)}, which no tree has; the file is foreign.")
    children = [unflatten_state(tensors, child) for child in spec["children"]]
    if spec["kind"] == "dict":
        return dict(zip(spec["names"], children, strict=True))
    if spec["kind"] != "record":
        return children if spec["kind"] == "list" else tuple(children)
    record = _record_type(spec["type"])
    # A field with a default may have come after the file was written.
    fields: list[str] = list(record._fields)  # pyright: ignore[reportAttributeAccessIssue]
    defaults: dict[str, Any] = record._field_defaults  # pyright: ignore[reportAttributeAccessIssue]
    known = len(spec["names"])
    if fields[:known] != spec["names"] or not all(name in defaults for name in fields[known:]):
        raise ValueError(
            f"the state holds a {spec['type']} with the fields {spec['names']}, this version of nestlearn has "
            f"{fields}. Load it with the version that saved it."
        )
    return record(*children)
