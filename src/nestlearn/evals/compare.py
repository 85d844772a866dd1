"""Compare two runs at equal tokens, equal FLOPs and equal time, by their held-out curves."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Curve:
    """Held-out bits per byte of a run, against the tokens, FLOPs and seconds used."""

    label: str
    tokens: list[float]
    flops: list[float]
    seconds: list[float]
    bits_per_byte: list[float]

    def at(self, axis: str, value: float) -> float:
        """Bits per byte where ``axis`` ("tokens", "flops" or "seconds") is ``value``, linear between points."""
        return interpolate(getattr(self, axis), self.bits_per_byte, value)

    def total(self, axis: str) -> float:
        """The amount that the whole run used."""
        return getattr(self, axis)[-1]


@dataclass(frozen=True)
class Row:
    """One line of the comparison: held-out bits per byte of both models at one amount."""

    label: str
    amount: str
    hope: float
    transformer: float


def interpolate(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """y at position ``at`` of ascending x, linear between points and constant beyond the ends.

    Example:
        >>> interpolate([0.0, 10.0], [4.0, 2.0], 5.0)
        3.0
    """
    right = bisect_left(x, at)
    if right == 0:
        return y[0]
    if right == len(x):
        return y[-1]
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + share * (y[right] - y[right - 1])


def eval_curve(log: list[dict[str, Any]], label: str) -> Curve:
    """The held-out points of a train.jsonl.

    Raises:
        ValueError: the log has none.
    """
    points = [
        (line["tokens"], line["flops"], line["seconds"], line["eval_bits_per_byte"])
        for line in log
        if "eval_bits_per_byte" in line
    ]
    if not points:
        raise ValueError(f"The log of {label} has no held-out points; train it with --eval-interval.")
    tokens, flops, seconds, bits = (list(column) for column in zip(*points, strict=True))
    return Curve(label, tokens, flops, seconds, bits)


def compare(label: str, axis: str, hope: Curve, transformer: Curve) -> Row:
    """Both curves at the largest amount of ``axis`` that both runs reached."""
    amount = min(hope.total(axis), transformer.total(axis))
    text = {"tokens": f"{amount:,.0f} tokens", "flops": f"{amount:.3g} FLOPs", "seconds": f"{amount:,.0f} s"}[axis]
    # A run improves most at the end of its schedule, so the text says if a curve is read before its end.
    for name, curve in (("Hope", hope), ("Transformer", transformer)):
        if amount < 0.995 * curve.total(axis):
            text += f" ({name} at {amount / curve.total(axis):.0%} of its schedule)"
    return Row(label, text, hope.at(axis, amount), transformer.at(axis, amount))
