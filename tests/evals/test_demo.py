"""The demonstration runs end to end on a tiny scale and its report stands alone."""

import dataclasses
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from nestlearn.evals.compare import Curve, compare, eval_curve, interpolate
from nestlearn.evals.demo import QUICK_PLAN, run_demo
from nestlearn.evals.report import demo as report
from nestlearn.evals.report.plots import BLUE, Line, Panel, chart

PLAN = dataclasses.replace(
    QUICK_PLAN, sequence_length=32, eval_length=64, state_lengths=(16, 64), sample_tokens=5,
    overrides=(("hidden_size", 16), ("num_hidden_layers", 1), ("num_attention_heads", 2)),
)  # fmt: skip


class Checker(HTMLParser):
    """Every tag is closed, nothing is loaded from elsewhere."""

    void = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert tag not in ("script", "link", "img", "iframe"), tag
        assert not any(name in ("src", "href") and not value.startswith("#") for name, value in attrs), attrs
        self.ids += [values["id"]] if "id" in values else []
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "texts").mkdir()
    for number in range(80):
        draw = random.Random(number)
        words = " ".join(
            draw.choice(["a", "few", "words", "<b>", "&", "more", "of", "them", "here"]) for _ in range(60)
        )
        (folder / "texts" / f"{number}.txt").write_text(words)
    run_demo(folder / "out", f"text:{folder / 'texts'}", PLAN, Console(quiet=True), "a note")
    return folder


def test_the_report_is_whole_and_self_contained(demo: Path):
    html = (demo / "out" / "report.html").read_text()
    checker = Checker()
    checker.feed(html)
    assert not checker.open
    assert html.count("<svg") == 4 and "prefers-color-scheme: dark" in html
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)
    for text in ("equal FLOPs", "equal seconds", "equal steps", "writes off", "memories exchanged", "nestlearn demo",
                 "training length", "In the beginning", "a note", "±"):  # fmt: skip
        assert text in html, text


def test_its_numbers_are_saved_and_a_finished_run_is_reused(demo: Path):
    results = json.loads((demo / "out" / "results.json").read_text())
    assert [row["label"].split(",")[0] for row in results["rows"]][:3] == [
        "equal steps (same tokens)", "equal FLOPs", "equal seconds",
    ]  # fmt: skip
    assert set(results["runs"]) == {"hope", "transformer", "transformer-long"}
    before = (demo / "out" / "hope" / "model.safetensors").stat().st_mtime_ns
    console = Console(record=True, width=200)
    run_demo(demo / "out", f"text:{demo / 'texts'}", PLAN, console)
    assert console.export_text().count("already trained") == 3
    assert (demo / "out" / "hope" / "model.safetensors").stat().st_mtime_ns == before


def test_curves_are_compared_where_both_have_values():
    hope = Curve("a", [10.0, 20.0], [100.0, 200.0], [1.0, 2.0], [3.0, 2.0])
    other = Curve("b", [10.0, 20.0], [50.0, 100.0], [0.5, 1.0], [4.0, 3.0])
    assert (compare("x", "tokens", hope, other).hope, compare("x", "tokens", hope, other).transformer) == (2.0, 3.0)
    row = compare("x", "flops", hope, other)
    assert (row.hope, row.transformer, row.amount) == (3.0, 3.0, "100 FLOPs (Hope at 50% of its schedule)")
    assert interpolate([1.0, 3.0], [0.0, 4.0], 2.5) == 3.0
    assert (interpolate([1.0, 3.0], [0.0, 4.0], 0.0), interpolate([1.0, 3.0], [0.0, 4.0], 9.0)) == (0.0, 4.0)
    with pytest.raises(ValueError, match="no held-out points"):
        eval_curve([{"step": 1, "loss": 1.0}], "a")


def heights(svg: str, texts: tuple[str, ...]) -> list[float]:
    """Vertical positions of texts in a chart."""
    found = [
        re.search(rf'y="([-\d.]+)"[^>]*>{text}<|translate\([-\d.]+ ([-\d.]+)\)[^>]*>{text}<', svg) for text in texts
    ]
    return [float(match[1] or match[2]) for match in found if match]


def test_labels_of_marks_stand_on_lines_of_their_own():
    panel = Panel([Line("one", [0, 512], [8.0, 7.0], BLUE)], "x", marks=[(256, "training length"), (256, "exchange")])
    first, second = heights(chart([panel]), ("training length", "exchange"))
    assert abs(first - second) >= 10


def test_no_curve_of_the_report_is_cut(demo: Path, monkeypatch: pytest.MonkeyPatch):
    shown: list[Panel] = []
    monkeypatch.setattr(report, "chart", lambda panels, **_: shown.extend(panels) or "")
    run_demo(demo / "out", f"text:{demo / 'texts'}", PLAN, Console(quiet=True))
    ranged = [panel for panel in shown if panel.y_range]
    assert len(ranged) == 4
    for panel in ranged:
        low, high = panel.y_range
        assert all(low <= y <= high for line in panel.lines for y in line.y if y is not None)


def test_charts_take_the_colour_of_the_page_and_share_no_identifiers():
    panel = Panel([Line("one", [1, 2, 3], [1.0, None, 2.0], BLUE, band=[0.1, None, 0.1])], "x", "y", marks=[(2, "m")])
    first, second = chart([panel]), chart([panel, panel])
    assert first.startswith("<svg viewBox=") and "currentColor" in first and "#010203" not in first
    assert chart([panel]) == first
    assert 'id="figure_1"' not in first + second
