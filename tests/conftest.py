"""What every test shares: one thread per process, no network, no warning let through, and optional data."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Set before any import that reads them: tests never reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import pytest
import torch

# Triton reads both before the first kernel is defined. Without a device it interprets kernels; with one, products of
# float32 must not be rounded to TF32.
if torch.cuda.is_available():
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from nestlearn.allocator import tune_allocator

REPOSITORY = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

# Derandomized: a run of the suite is the same run everywhere; no deadline: machines are shared.
hypothesis.settings.register_profile(
    "nestlearn", deadline=None, derandomize=True, max_examples=25, print_blob=True, database=None
)
hypothesis.settings.load_profile("nestlearn")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Processes run side by side, and results of one thread are the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _signals_arrive() -> None:
    """A shell without job control starts background processes with Ctrl-C ignored, `nohup` with SIGHUP ignored."""
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def _freed_memory_stays() -> None:
    """As in the command-line tools: without it long sequences spend more time in page faults than in arithmetic."""
    tune_allocator()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def load_benchmark(repository: Path) -> Iterator[Callable[[str], ModuleType]]:
    """A function that imports a script of ``benchmarks/`` by its name."""
    folder = str(repository / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real texts kept beside the source tree; the test is skipped where there are none."""
    folder = Path(os.environ.get("NESTLEARN_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set NESTLEARN_DATA to a folder of texts")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection() -> None:
    """What collection makes lives as long as the process: searching it for garbage again and again takes seconds."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Neither do the tests search it."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium of this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium or google-chrome")
    with playwright.sync_playwright() as run:
        made = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()
