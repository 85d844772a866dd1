"""Packages that add mixers, optimizers, suites or model families to the command line."""

from __future__ import annotations

from importlib.metadata import entry_points

GROUP = "nestlearn.plugins"


def load_plugins() -> None:
    """Import what installed packages name as entry points of the group `nestlearn.plugins`.

    A package calls ``register_mixer``, ``register_optimizer`` and the like in a module, and names that module in its
    ``pyproject.toml``::

        [project.entry-points."nestlearn.plugins"]
        mine = "my_package.layers"

    Raises:
        RuntimeError: a plugin cannot be imported.
    """
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            raise RuntimeError(
                f"The plugin {entry.name!r} ({entry.value}) cannot be imported: {type(error).__name__}: {error}. "
                "Repair or uninstall the package that brings it."
            ) from error
