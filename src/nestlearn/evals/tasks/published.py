"""Published numbers with their sources, shown next to measured ones and never averaged with them."""

from __future__ import annotations

import json
from importlib.resources import files

from nestlearn.evals.tasks.base import Published


def _read() -> dict[str, tuple[Published, ...]]:
    """The tables of published.json by task: a row per model has the values of each task, one per split."""
    tables = json.loads(files("nestlearn.evals.tasks").joinpath("published.json").read_text(encoding="utf-8"))
    return {
        task: tuple(
            Published(model, split, value, table["source"])
            for model, row in table["rows"].items()
            for split, value in zip(table["splits"], row[column], strict=True)
        )
        for table in tables
        for column, task in enumerate(table["tasks"])
    }


PUBLISHED = _read()
"""By task, for tasks of the lm-evaluation-harness by ``TASK/METRIC``: perplexities as they are, the rest in percent."""
