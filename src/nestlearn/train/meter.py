"""What a run has used and reached so far: tokens, seconds, FLOPs, loss and bits per byte; and its log."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nestlearn.atomic import write_text

LOG_FILE = "train.jsonl"
PROGRESS_FILE = "progress.json"


def nats_to_bits_per_byte(nats: float, byte_count: float) -> float:
    """A summed loss in nats as bits per byte of text: nats / (ln 2 * bytes).

    Example:
        >>> nats_to_bits_per_byte(math.log(2) * 16, 8)
        2.0
    """
    return nats / math.log(2) / byte_count if byte_count else math.nan


@dataclass
class Meter:
    """Running totals of a run, and sums over the steps since the last log line.

    Attributes:
        tokens: tokens read, by all processes.
        seconds: wall time spent in training steps; evaluation and saving do not count.
        flops: model FLOPs of forward and backward (3 times forward), by all processes.
        nats, targets, bytes: sum of the loss, predicted tokens and their bytes of text, since the last line of the log.
    """

    tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    nats: float = 0.0
    targets: int = 0
    bytes: int = 0

    def interval(self) -> dict[str, float]:
        """Loss (nats per token) and bits per byte of the present interval."""
        return {
            "loss": self.nats / self.targets if self.targets else math.nan,
            "bits_per_byte": nats_to_bits_per_byte(self.nats, self.bytes),
        }

    def take_interval(self) -> dict[str, float]:
        """As `interval`; then starts a new interval."""
        summary = self.interval()
        self.nats, self.targets, self.bytes = 0.0, 0, 0
        return summary

    def totals(self) -> dict[str, float]:
        """The running totals, as in a line of the log."""
        return {"tokens": self.tokens, "seconds": round(self.seconds, 3), "flops": self.flops}

    def save(self, folder: Path) -> None:
        """Write all sums into a checkpoint folder."""
        (folder / PROGRESS_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Meter:
        """The sums that `save` wrote."""
        return cls(**json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8")))


def count_targets(labels: Tensor, token_bytes: Tensor) -> tuple[int, int]:
    """How many tokens ``labels`` [batch, t] ask for, and how many bytes of text these are.

    The first column is never predicted (labels are shifted inside the model); -100 marks ignored targets.
    """
    targets = labels[..., 1:]
    wanted = targets[targets != -100]
    return wanted.numel(), int(token_bytes.to(wanted.device)[wanted].sum())


def append_line(folder: Path, line: dict[str, Any]) -> None:
    """Add one line to the run's log."""
    with (folder / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """Every line of a run's log, without a last line that a crash cut short."""
    path = Path(folder) / LOG_FILE
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def cut_log(folder: Path, step: int) -> None:
    """Remove the lines after ``step`` from the log: a resumed run writes them again."""
    kept = [line for line in read_log(folder) if line["step"] <= step]
    write_text(folder / LOG_FILE, "".join(json.dumps(line) + "\n" for line in kept))
