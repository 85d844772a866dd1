"""A tiny corpus and a tiny run, small enough that a training step takes milliseconds."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nestlearn.train import TrainConfig

WORDS = "the cat sat on a mat and one dog ran far from its house while some bird sang loud by the river".split()


def write_corpus(folder: Path, files: int = 12, words: int = 250) -> Path:
    """Files of random words, each different."""
    folder.mkdir(parents=True)
    for number in range(files):
        draw = random.Random(number)
        (folder / f"{number}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(words)))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"text:{write_corpus(tmp_path_factory.mktemp('corpus') / 'files')}"


@pytest.fixture
def tiny(corpus: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A function that makes the configuration of a tiny run, with some fields changed."""

    def make(**changes: object) -> TrainConfig:
        model = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        defaults = {
            "preset": "transformer-tiny", "corpus": corpus, "out": str(tmp_path / "run"), "sequence_length": 32,
            "batch_size": 2, "steps": 6, "log_interval": 2, "save_interval": 3, "eval_windows": 4, "threads": 1,
            "model": model,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **changes})

    return make


@pytest.fixture(autouse=True)
def _same_threads():
    """Runs set the thread count; the next test gets its own back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
