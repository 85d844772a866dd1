"""What a forward pass of any model does, whatever its modules are called: where it attends, what it carries on."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "bmm", "matmul", "baddbmm", "addmm"}


class AttentionFinder(TorchDispatchMode):
    """Finds the modules that compute attention: a softmax of products of activations, multiplied with activations.

    It follows the products of two tensors that depend on the input (no weights) through scaling and masks to a
    softmax, and on to the next product. Fused kernels are known by the name of torch's operator.

    Example:
        >>> layer = nn.MultiheadAttention(4, 2)
        >>> with AttentionFinder(layer) as finder, torch.no_grad():
        ...     _ = layer(*[torch.randn(3, 1, 4)] * 3)
        >>> finder.found
        ['']
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.weights = {storage_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.found: list[str] = []
        self._running: list[str] = []
        # Tensors are held, so that no other tensor gets their identity.
        self._scores: dict[int, Tensor] = {}
        self._shares: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> AttentionFinder:
        self._hooks = [
            register_module_forward_pre_hook(lambda module, _: self._running.append(self.names.get(id(module), ""))),
            register_module_forward_hook(lambda *_: self._leave(), always_call=True),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self._scores.clear()
        self._shares.clear()

    def _leave(self) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.strip("_")
        first = out[0] if isinstance(out, tuple | list) and out else out
        if name.startswith("scaled_dot_product"):
            self._record()
        elif isinstance(first, Tensor):
            self._follow(name, first, [x for x in args if isinstance(x, Tensor)])
        return out

    def _follow(self, name: str, out: Tensor, inputs: list[Tensor]) -> None:
        if name in PRODUCTS:
            active = [x for x in inputs if storage_of(x) not in self.weights]
            if len(active) >= 2 and any(id(x) in self._shares for x in active):
                self._record()
            elif len(active) >= 2:
                self._scores[id(out)] = out
            return
        for known in (self._scores, self._shares):
            if any(id(x) in known and x.numel() == out.numel() for x in inputs):
                marks = self._shares if name.endswith("softmax") else known
                marks[id(out)] = out

    def _record(self) -> None:
        where = self._running[-1] if self._running else ""
        if where not in self.found:
            self.found.append(where)


def storage_of(tensor: Tensor) -> int:
    """The identity of a tensor's memory; views share it."""
    with contextlib.suppress(RuntimeError):
        return tensor.untyped_storage()._cdata
    return id(tensor)


def example_of(model: Any, length: int = 8) -> dict[str, Tensor] | None:
    """An input for a model of transformers, made from its configuration; None for other models.

    Token ids, images and mel spectrograms, as far as the forward pass has arguments for them.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    names, made = arguments(model), {}
    text = getattr(config, "get_text_config", lambda: config)()
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary:
        ids = (torch.arange(length, device=device) % (vocabulary - 1) + 1).unsqueeze(0)
        made["input_ids"] = ids
        if getattr(config, "is_encoder_decoder", False):
            made["decoder_input_ids"] = ids
    vision = getattr(config, "vision_config", config)
    if (size := getattr(vision, "image_size", None)) is not None:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        made["pixel_values"] = torch.zeros(1, getattr(vision, "num_channels", 3), height, width, device=device)
    if (bins := getattr(config, "num_mel_bins", None)) is not None:
        made["input_features"] = torch.zeros(1, bins, 2 * getattr(config, "max_source_positions", 50), device=device)
    found = {name: value for name, value in made.items() if name in names}
    return found if model.main_input_name in found else None


def arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of a forward pass by name; of an adapter of PEFT, which passes them on, those of its model."""
    inner = getattr(model, "get_base_model", lambda: model)()
    return inspect.signature(inner.forward).parameters


def call(model: nn.Module, example: Any, **settings: Any) -> Any:
    """The model's answer to a tensor, a tuple of arguments, or a mapping of named ones."""
    if isinstance(example, Mapping):
        return model(**example, **settings)
    return model(*(example if isinstance(example, tuple | list) else (example,)), **settings)


@contextlib.contextmanager
def undisturbed(model: nn.Module, train: bool = False) -> Iterator[None]:
    """Run the model in one mode, and leave modes, buffers and random numbers as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    devices = sorted({b.device.index for b in model.parameters() if b.is_cuda and b.device.index is not None})
    with torch.random.fork_rng(devices):
        model.train(train)
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def attention_of(model: nn.Module, example: Any) -> list[str]:
    """Names of the modules that attend to the example."""
    with undisturbed(model), torch.no_grad(), AttentionFinder(model) as finder:
        call(model, example)
    return finder.found


def changing_buffers(model: nn.Module, example: Any) -> list[str]:
    """Names of floating-point buffers that a forward pass in training mode changes, such as running means."""
    with undisturbed(model, train=True), torch.no_grad():
        before = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point() and not b.is_meta}
        call(model, example)
        after = dict(model.named_buffers())
        return [name for name, b in before.items() if name in after and not torch.equal(b, after[name])]


def carried_state(model: nn.Module, length: int) -> dict[str, Tensor]:
    """Tensors that a model of transformers carries from token to token (``past_key_values``), by their path.

    Empty for models without, and for other models.
    """
    example = example_of(model, length)
    if example is None or not {"use_cache", "past_key_values", "cache_params"} & set(arguments(model)):
        return {}
    with undisturbed(model), torch.no_grad():
        output = call(model, example, use_cache=True)
    for name in ("past_key_values", "cache_params"):
        if getattr(output, name, None) is not None:
            return dict(tensors_in(output[name]))
    return {}


def counted_updates(model: nn.Module, ids: Tensor, members: Collection[str]) -> int:
    """Tokens of a row after which some of these tensors of ``past_key_values`` had changed, read one by one."""
    cache, before, updates = None, {}, 0
    with undisturbed(model), torch.no_grad():
        for token in ids[:1].unbind(1):
            output = call(model, {"input_ids": token[:, None]}, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            now = {n: x.clone() for n, x in tensors_in(cache) if n in members}
            updates += any(n not in before or not torch.equal(x, before[n]) for n, x in now.items())
            before = now
    return updates


def tensors_in(tree: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested containers and plain objects, with paths."""
    seen = set() if seen is None else seen
    if isinstance(tree, Tensor):
        yield path, tree
    if isinstance(tree, Tensor | nn.Module | str | bytes | int | float | type) or id(tree) in seen or tree is None:
        return
    seen.add(id(tree))
    if isinstance(tree, Mapping):
        children = list(tree.items())
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        children = list(zip(getattr(tree, "_fields", ()), tree, strict=True))
    elif isinstance(tree, list | tuple):
        children = list(enumerate(tree))
    else:
        children = list(getattr(tree, "__dict__", {}).items())
    for key, child in children:
        yield from tensors_in(child, f"{path}.{key}" if path else str(key), seen)
