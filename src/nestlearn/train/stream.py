"""Streamed corpora in training: endless, and resumed at the saved position without reading again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from nestlearn.data import PackedStream

STREAM_FILE = "stream.json"


class RecordedStream(IterableDataset):
    """A PackedStream that starts again at its end, and remembers the positions after its last windows.

    The engine reads batches ahead, so at a checkpoint the stream is past the windows of the training. The position is
    found by the number of windows used.

    Args:
        stream: the windows.
        remember: how many positions are kept; at least as many as windows are read ahead.
    """

    def __init__(self, stream: PackedStream, remember: int):
        self.stream, self.remember = stream, remember
        self.given = 0
        self.places: dict[int, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            before = self.given
            for window in self.stream:
                self.given += 1
                self.places[self.given] = self.stream.state_dict()
                self.places.pop(self.given - self.remember, None)
                yield window
            if self.given == before:
                raise ValueError(
                    f"{self.stream.corpus.name} gives no window of {self.stream.sequence_length} tokens. "
                    "Use a smaller --sequence-length, or check the data set's text column."
                )

    def save(self, folder: Path, used: int) -> None:
        """Write the position after ``used`` windows of the run into a checkpoint."""
        content = {"used": used, "place": self.places[used]}
        (folder / STREAM_FILE).write_text(json.dumps(content), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Continue at the position that `save` wrote."""
        content = json.loads((folder / STREAM_FILE).read_text(encoding="utf-8"))
        self.given = content["used"]
        self.places = {self.given: content["place"]}
        self.stream.load_state_dict(content["place"])
