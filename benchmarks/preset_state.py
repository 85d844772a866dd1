"""What one row of every preset holds: python benchmarks/preset_state.py writes the table of docs/presets.md."""

from __future__ import annotations

from collections.abc import Sequence

from common import RESULTS, parse, parser, table
from nestlearn import HopeConfig, presets
from nestlearn.models import row_bytes
from nestlearn.models.flops import meta_model

PAGE = RESULTS.parent / "presets.md"
HEADER = ("preset", "parameters", "levels, bytes per row", "of the weights", "mixers, bytes per row",
          "per further token")  # fmt: skip


def row(name: str) -> list[str]:
    """One line of the table."""
    config = HopeConfig.from_preset(name)
    count, size = meta_model(config).num_parameters(), row_bytes(config)
    share = f"{100 * size.levels / (4 * count):.1f} %"
    return [name, f"{count:,}", f"{size.levels:,}", share, f"{size.mixers:,}", f"{size.per_token:,}"]


def main(words: Sequence[str] | None = None) -> None:
    """Rewrite the table."""
    parse(parser(__doc__), words)
    before = PAGE.read_text().split("| " + " | ".join(HEADER))[0]
    PAGE.write_text(before + table(HEADER, map(row, presets())))


if __name__ == "__main__":
    main()
