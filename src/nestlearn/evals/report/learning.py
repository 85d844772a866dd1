"""The report of `nestlearn learn`: what the model learned from a stream, and what it forgot."""

from __future__ import annotations

from html import escape
from itertools import accumulate
from pathlib import Path

from nestlearn.evals.report import page
from nestlearn.evals.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, Line, Panel, chart
from nestlearn.evals.stream_record import DocumentRecord, StreamRecord

_WHAT_CHANGED = {
    "cms": "the levels of its memory changed; the pretrained weights did not",
    "finetune": "all weights changed, without protection of earlier knowledge",
    "ewc": "all weights changed, those that mattered for earlier text less (elastic weight consolidation)",
    "replay": "all weights changed, with earlier text mixed in",
    "lora": "an adapter of low rank changed; the weights did not",
}
_CURVE_POINTS = 400
_LEVEL_COLORS = (PURPLE, GREEN, ORANGE, GREY)


def write_learning_report(record: StreamRecord, path: Path) -> Path:
    """Write the report, under a temporary name first, and return its path."""
    documents = record.documents
    size = sum(document.bytes for document in documents)
    lead = (
        f"{escape(record.model)} read {len(documents)} document{'s' * (len(documents) != 1)} ({size:,} bytes) by the "
        f"method {escape(record.method)}: {_WHAT_CHANGED[record.method]}. Bits per byte: lower is better."
    )
    tiles = _tiles(record, size)
    sections = [*_documents(record), *_online(record), *_levels(record), *_settings(record)]
    commands = [record.command] if record.command else []
    return page.write_page(path, "What a model learned from a stream", lead, sections, tiles=tiles, commands=commands)


def _tiles(record: StreamRecord, size: int) -> list[tuple[str, str]]:
    """The headline: what was predicted before it was learned comes first, a second look at the same text last."""
    documents = record.documents
    known, seconds = documents[-1].known, max(sum(document.seconds for document in documents), 1e-9)
    again = " → ".join(f"{sum(d.bytes * bits(d) for d in documents) / size:.3f}" for bits in (_before, _after))
    tiles = [
        (
            f"{record.known_before:.3f} → {known:.3f}",
            f"{record.known_name}, known before ({_percent(known, record.known_before)})",
        ),
        (f"{documents[0].after:.3f} → {documents[-1].first:.3f}", "the first document, right after and at the end"),
        (again, "the same documents again, before and after each was learned; the text is no longer unseen"),
        (f"{size / seconds / 1000:.1f} KB/s", "learned on this machine"),
    ]
    pairs = [
        (d.bytes, d.online.off, d.online.bits_per_byte) for d in documents if d.online and d.online.off is not None
    ]
    if pairs:
        total = sum(count for count, _, _ in pairs)
        off, on = (sum(pair[0] * pair[place] for pair in pairs) / total for place in (1, 2))
        unseen = f"unseen text: each segment before it is learned, without and with the writes ({_percent(on, off)})"
        tiles.insert(0, (f"{off:.3f} → {on:.3f}", unseen))
    return tiles


def _before(document: DocumentRecord) -> float:
    return document.before


def _after(document: DocumentRecord) -> float:
    return document.after


def _percent(now: float, before: float) -> str:
    return f"{100 * (now / before - 1):+.1f} %"


def _documents(record: StreamRecord) -> list[str]:
    documents = record.documents
    numbers = list(range(1, len(documents) + 1))
    learned = Panel(
        [
            Line("before", numbers, [d.before for d in documents], GREY, "o-"),
            Line("after", numbers, [d.after for d in documents], BLUE, "o-"),
        ],
        "document of the stream",
        "bits per byte",
        x_format=_whole,
    )
    kept = Panel(
        [
            Line("known text", [0, *numbers], [record.known_before, *(d.known for d in documents)], ORANGE, "o-"),
            Line("first document", numbers, [d.first for d in documents], GREEN, "o-"),
        ],
        "documents learned",
        x_format=_whole,
    )
    rows = [_row(document) for document in documents]
    header = ("document", "bytes", "before", "while reading", "without writes", "after", "known text", "seconds")
    figure = page.figure(
        chart([learned, kept]),
        "Left: each document before and after it was learned, with a fresh context each time. Right: the known "
        "text and the first document as the stream goes on. A rising line is forgetting.",
    )
    # The chart of one document would be single dots, and the table says the same.
    return [page.heading("Document by document"), *([figure] if len(documents) > 1 else []), page.table(header, rows)]


def _whole(place: float) -> str:
    """No tick between two whole numbers: the axis counts documents."""
    return f"{place:.0f}" if place == round(place) else ""


def _row(document: DocumentRecord) -> tuple[str, ...]:
    online = document.online
    reading = "" if online is None else f"{online.bits_per_byte:.3f}"
    off = "" if online is None or online.off is None else f"{online.off:.3f}"
    figures = (f"{document.before:.3f}", reading, off, f"{document.after:.3f}", f"{document.known:.3f}")
    return document.name, f"{document.bytes:,}", *figures, f"{document.seconds:.1f}"


def _online(record: StreamRecord) -> list[str]:
    on = [value for d in record.documents if d.online is not None for value in d.online.segments]
    off = [value for d in record.documents if d.online is not None for value in d.online.segments_off]
    if len(on) < 2:
        return []
    every = max(1, len(on) // _CURVE_POINTS)
    places = list(range(every - 1, len(on), every))
    lines = [Line("learning", places, [_mean(on, place, every) for place in places], BLUE)]
    panels = [Panel(lines, "segments read", "bits per byte")]
    if len(off) == len(on):
        lines.insert(0, Line("writes off", places, [_mean(off, place, every) for place in places], GREY))
        gains = list(accumulate(b - a for a, b in zip(on, off, strict=True)))
        saved = Line("saved by learning", places, [gains[place] / (place + 1) for place in places], GREEN)
        panels.append(Panel([saved], "segments read", "bits per byte saved so far"))
    return [
        page.heading("While it reads"),
        page.figure(
            chart(panels),
            "Every segment is scored before it is learned, so this is prediction of unseen text."
            + (f" Means of {every} segments." if every > 1 else ""),
        ),
    ]


def _mean(values: list[float], last: int, count: int) -> float:
    part = values[last - count + 1 : last + 1]
    return sum(part) / len(part)


def _levels(record: StreamRecord) -> list[str]:
    read = [document for document in record.documents if document.online is not None and document.online.by_level]
    if not read:
        return []
    levels = sorted({level for d in read if d.online is not None for level in d.online.by_level})
    cost = {
        level: [
            None if d.online is None or level not in d.online.by_level
            else d.online.by_level[level] - d.online.bits_per_byte
            for d in read
        ]
        for level in levels
    }  # fmt: skip
    heading, what = page.heading("What each level contributes"), "bits per byte lost without it"
    if len(read) == 1:
        rows = [(f"level {level}", "" if values[0] is None else f"{values[0]:.4f}") for level, values in cost.items()]
        return [heading, page.table(("level (0 is the fastest)", what), rows)]
    numbers, lines = list(range(1, len(read) + 1)), []
    for index, (level, values) in enumerate(cost.items()):
        lines.append(Line(f"level {level}", numbers, values, _LEVEL_COLORS[index % len(_LEVEL_COLORS)], "o-"))
    return [
        heading,
        page.figure(
            chart([Panel(lines, "document of the stream", what, x_format=_whole)]),
            "How much worse each document is predicted when one level is left at the model's own weights. Level 0 is "
            "the fastest.",
        ),
    ]


def _settings(record: StreamRecord) -> list[str]:
    settings = [(name, str(value)) for name, value in record.settings.items() if value is not None]
    return [page.heading("Settings"), page.table(("setting", "value"), settings)]
