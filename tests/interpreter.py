"""Triton kernels on a machine without a device: Triton's interpreter runs them on the CPU, program by program.

Kernels of flash-linear-attention need two more things of it than it has. Their autotuner would time configurations on a
device; here it takes the first. And they convert loop variables, which the interpreter makes plain numbers.
"""

from __future__ import annotations

import builtins
import importlib
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

INSTALL = "pip install --no-deps flash-linear-attention fla-core einops triton (Linux; needs no device)"


def kernel_device(package: str) -> str:
    """Where kernels run: ``cuda``, or ``cpu`` in the interpreter. Skips without the package."""
    if find_spec("triton") is None or find_spec(package) is None:
        pytest.skip(f"needs {' and '.join(sorted({package, 'triton'}))}: {INSTALL}")
    return "cuda" if torch.cuda.is_available() else "cpu"


class Index(int):
    """A loop variable that a kernel can convert."""

    def to(self, dtype: Any) -> Any:
        from triton.runtime import interpreter

        return interpreter._implicit_cvt(int(self)).to(dtype)


def index_range(*bounds: Any) -> Iterator[Index]:
    """``range`` whose numbers are `Index`, with bounds that may be scalars of a kernel."""
    numbers = [int(x.handle.data.item()) if hasattr(x, "handle") else int(x) for x in bounds]
    return map(Index, builtins.range(*numbers))


def run_first(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """`Autotuner.run` without a choice."""
    config = tuner.configs[0]
    if config.pre_hook is not None:
        config.pre_hook({**dict(zip(tuner.arg_names, args, strict=False)), **kwargs, **config.all_kwargs()})
    return tuner.fn.run(*args, **kwargs, **config.all_kwargs())


def interpret_fla(patch: pytest.MonkeyPatch) -> None:
    """Make the kernels of flash-linear-attention run in the interpreter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no device
        for module in ("fla.ops.gated_delta_rule", "fla.ops.simple_gla"):
            importlib.import_module(module)
    from triton.runtime.autotuner import Autotuner

    patch.setattr(Autotuner, "run", run_first)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            patch.setitem(module.__dict__, "range", index_range)
