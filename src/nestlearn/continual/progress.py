"""The checkpoint of a learner after each task, in one file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nestlearn.atomic import atomic_write, remove_leftovers

if TYPE_CHECKING:
    from nestlearn.continual.learner import ContinualLearner

_SCHEMA = 1

# The errors of `torch.load`, and of reading its result, for a damaged file or one of another program.
_UNREADABLE = (
    RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, AssertionError, pickle.UnpicklingError,
)  # fmt: skip


class StreamProgress:
    """Saves and resumes a learner.

    Args:
        path: the file; None: nothing is saved.
        config: the settings; a checkpoint with others is refused.
    """

    def __init__(self, path: Path | None, config: dict[str, Any]) -> None:
        self.path = path
        self.config = json.loads(json.dumps(config))

    def resume(self, learner: ContinualLearner) -> list[tuple[float, ...]]:
        """Put the learner where the checkpoint was made; returns the rows of scores so far, none without a checkpoint.

        Raises:
            ValueError: the file is no checkpoint of a learner with these settings.
        """
        if self.path is None:
            return []
        remove_leftovers(self.path.parent)
        if not self.path.exists():
            return []
        try:
            # weights_only: tensors and plain values, nothing that runs code.
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            schema, config, rows = content["schema"], json.loads(content["config"]), content["rows"]
            rows, state = [tuple(map(float, row)) for row in rows], content["learner"]
            if not isinstance(config, dict) or not rows:
                raise TypeError(f"its settings are a {type(config).__name__}, and it has {len(rows)} rows of scores")
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error}. Check its rights, or give another file.") from error
        except _UNREADABLE as error:
            # torch's own message advises to unpickle without limits, which would run foreign code.
            foreign = isinstance(error, pickle.UnpicklingError)
            cause = "it does not hold tensors and plain values alone" if foreign else repr(error)
            raise ValueError(
                f"{self.path} is no checkpoint of a continual learner, or damaged: {cause}. Restore it from a copy, "
                "or remove it to begin anew."
            ) from error
        if schema != _SCHEMA or config != self.config:
            different = [key for key in self.config if config.get(key) != self.config[key]]
            raise ValueError(
                f"{self.path} is a checkpoint of a learner with other settings ({', '.join(different) or 'schema'}). "
                "Give the settings it was made with, or another file."
            )
        try:
            learner.load_state_dict(state, len(rows) - 1)
        except _UNREADABLE as error:
            raise ValueError(
                f"{self.path} does not fit the learner, which may have taken over a part of it: {error!r}. Restore the "
                "file from a copy or remove it, and begin with a new learner of the model it was made with."
            ) from error
        return rows

    def save(self, learner: ContinualLearner, rows: list[tuple[float, ...]]) -> None:
        """Write the checkpoint; the file is complete or absent.

        Raises:
            OSError: it cannot be written; what was at the path is untouched.
        """
        if self.path is None:
            return
        content = {
            "schema": _SCHEMA,
            "config": json.dumps(self.config),
            "rows": [list(row) for row in rows],
            "learner": learner.state_dict(),
        }
        advice = "check free space and rights, and call fit again: it goes on after the last task in the file"
        with atomic_write(self.path, "the checkpoint", advice) as temporary:
            torch.save(content, temporary)
