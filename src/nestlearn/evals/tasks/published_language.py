"""Published numbers of language models in percent, shown beside measured ones and never mixed with them."""

from __future__ import annotations

from nestlearn.evals.tasks.base import Published

NL_TABLE_1 = (
    "NL (arXiv 2512.24695), Table 1; RULER with essays, trained on about 50 B tokens, 32 K vocabulary, size not stated"
)
_LENGTHS = ("4096", "8192", "16384")

# Rows of NL's Table 1: accuracy at 4K, 8K and 16K tokens.
_TABLE_1 = {
    "niah_single_1": {
        "Transformer": (88.6, 76.4, 79.8),
        "Hope-Attention": (100.0, 100.0, 100.0),
        "RWKV-7": (100.0, 100.0, 99.6),
        "Comba": (100.0, 100.0, 99.4),
        "DLA": (96.4, 71.2, 44.0),
        "Titans": (100.0, 100.0, 100.0),
        "Hope": (100.0, 100.0, 100.0),
    },
    "niah_single_2": {
        "Transformer": (100.0, 98.8, 94.2),
        "Hope-Attention": (100.0, 98.4, 94.4),
        "RWKV-7": (93.8, 44.8, 12.6),
        "Comba": (92.6, 47.2, 13.4),
        "DLA": (79.6, 42.6, 28.2),
        "Titans": (99.6, 84.6, 75.4),
        "Hope": (99.2, 88.4, 78.2),
    },
    "niah_single_3": {
        "Transformer": (78.0, 69.2, 40.8),
        "Hope-Attention": (76.8, 68.8, 42.4),
        "RWKV-7": (63.8, 13.2, 5.8),
        "Comba": (62.4, 13.8, 7.4),
        "DLA": (18.2, 8.8, 4.0),
        "Titans": (74.2, 42.8, 21.2),
        "Hope": (73.2, 46.2, 24.8),
    },
    "niah_multikey_1": {
        "Transformer": (79.4, 83.0, 61.4),
        "Hope-Attention": (80.2, 84.8, 60.8),
        "RWKV-7": (21.4, 18.8, 9.6),
        "Comba": (21.4, 19.4, 8.2),
        "DLA": (27.4, 20.0, 11.8),
        "Titans": (26.4, 23.6, 8.2),
        "Hope": (29.4, 24.8, 14.8),
    },
    "niah_multiquery": {
        "Transformer": (58.9, 48.0, 29.8),
        "Hope-Attention": (60.4, 47.8, 30.6),
        "RWKV-7": (20.4, 14.8, 8.6),
        "Comba": (21.8, 15.2, 6.4),
        "DLA": (26.4, 22.0, 6.4),
        "Titans": (22.8, 19.8, 9.4),
        "Hope": (31.7, 24.8, 14.2),
    },
    "niah_multivalue": {
        "Transformer": (37.5, 34.1, 21.5),
        "Hope-Attention": (35.2, 34.4, 24.8),
        "RWKV-7": (16.2, 13.4, 6.8),
        "Comba": (16.5, 13.5, 7.2),
        "DLA": (25.6, 12.8, 9.6),
        "Titans": (24.6, 15.1, 8.2),
        "Hope": (31.4, 17.2, 11.4),
    },
}

NIAH: dict[str, tuple[Published, ...]] = {
    task: tuple(
        Published(model, length, value, NL_TABLE_1)
        for model, row in rows.items()
        for length, value in zip(_LENGTHS, row, strict=True)
    )
    for task, rows in _TABLE_1.items()
}
"""By task; the split of an entry is its length in tokens. The paper does not say which of RULER's three multi-key
tasks its column MK is; it is taken for the first."""

NL_TABLE_2 = "NL (arXiv 2512.24695), Table 2; 1.3 B parameters, 100 B tokens"

# Rows of NL's Table 2 at 1.3 B.
_COLUMNS = {
    "wikitext": "word_perplexity",
    "lambada_openai perplexity": "perplexity",
    "lambada_openai": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "social_iqa": "acc",
    "boolq": "acc",
}
_TABLE_2 = {
    "Transformer++": (17.92, 17.73, 42.6, 71.4, 52.3, 54.1, 69.9, 36.5, 41.8, 58.4),
    "Titans": (15.60, 11.41, 49.1, 73.1, 56.3, 59.8, 72.4, 40.8, 42.1, 61.0),
    "Hope": (14.39, 10.08, 51.0, 73.9, 57.5, 61.2, 73.8, 42.7, 42.8, 61.4),
}

COMMON_SENSE: dict[tuple[str, str], tuple[Published, ...]] = {
    (column.split()[0], metric): tuple(
        Published(model, "test", row[place], NL_TABLE_2) for model, row in _TABLE_2.items()
    )
    for place, (column, metric) in enumerate(_COLUMNS.items())
}
"""By task and metric of the lm-evaluation-harness: perplexities as they are, accuracies in percent."""
