"""Published accuracies in percent, with their source. They are shown beside measured ones and never mixed with them."""

from __future__ import annotations

from nestlearn.evals.tasks.base import Published

NL_TABLE_5 = "NL (arXiv 2512.24695), Table 5; baselines from Irie et al. 2023; training lengths 2-50"
NL_TABLE_4 = "NL (arXiv 2512.24695), Table 4; MAD protocol, baseline and variations averaged"

# Rows of NL's Table 5: (bin 0, bin 1) of parity, (aa)*, (abab)*, a^n b^n, a^n b^n c^n, Shuffle-2.
_ALL = (100.0, 100.0)
_NONE = (0.0, 0.0)
_TABLE_5 = {
    "LSTM": (_ALL, _ALL, _ALL, _ALL, _ALL, _ALL),
    "Transformer": ((46.4, 0.0), _NONE, _NONE, _ALL, _ALL, _ALL),
    "Linear Transformer": ((78.1, 0.0), _NONE, _NONE, _ALL, _ALL, _ALL),
    "DeltaNet": ((98.2, 10.1), _NONE, _NONE, _ALL, _ALL, _ALL),
    "SRWM": (_ALL, _ALL, _ALL, _ALL, _ALL, _ALL),
    "Hope": (_ALL, _ALL, _ALL, _ALL, _ALL, _ALL),
}
_LANGUAGES = ("parity", "aa", "abab", "anbn", "anbncn", "shuffle2")

FORMAL: dict[str, tuple[Published, ...]] = {
    language: tuple(
        Published(model, split, value, NL_TABLE_5)
        for model, row in _TABLE_5.items()
        for split, value in zip(("2-50", "51-100"), row[column], strict=True)
    )
    for column, language in enumerate(_LANGUAGES)
}

# Rows of NL's Table 4. It has no column for noisy recall.
_TABLE_4 = {
    "Transformer": (49.4, 100.0, 47.9, 96.2, 83.7),
    "RWKV-7": (45.1, 100.0, 32.8, 95.6, 82.2),
    "Comba": (46.3, 100.0, 32.8, 96.4, 82.9),
    "Titans": (49.8, 100.0, 50.0, 99.4, 83.4),
    "Hope": (51.2, 100.0, 52.1, 99.7, 85.2),
}
_MAD = ("compression", "in_context_recall", "fuzzy_recall", "selective_copying", "memorization")

MAD: dict[str, tuple[Published, ...]] = {
    task: tuple(Published(model, "test", row[column], NL_TABLE_4) for model, row in _TABLE_4.items())
    for column, task in enumerate(_MAD)
}
