"""Registers the models with `transformers` as soon as both packages are imported, whichever comes first."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterTransformers(MetaPathFinder):
    """Finds `transformers` as the other finders do, and imports `nestlearn.models` once it has been executed.

    `transformers` loads its parts when they are asked for. So none of them is half loaded at that moment.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            importlib.import_module("nestlearn.models")

        # The loader stays what it is (readers of resources ask for its class); this instance does one thing more.
        spec.loader.exec_module = exec_module
        return spec


def register_models() -> None:
    """Register Hope and the stacked models with the Auto classes of `transformers`, now or when it is imported.

    Importing `nestlearn.models` registers them. It takes seconds, so it waits for `transformers`: without that package
    there is no Auto class to ask. Example, in either order of the imports:

        import nestlearn
        from transformers import AutoConfig

        AutoConfig.for_model("hope")
    """
    if "transformers" in sys.modules:
        importlib.import_module("nestlearn.models")
    else:
        sys.meta_path.insert(0, _AfterTransformers())
