"""Switch off the messages and progress bars of transformers while nestlearn shows its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as engine_logging


@contextmanager
def quiet_engine() -> Iterator[None]:
    """Hide informational messages and progress bars of transformers; errors still show."""
    level, bars = engine_logging.get_verbosity(), engine_logging.is_progress_bar_enabled()
    engine_logging.set_verbosity(logging.ERROR)
    engine_logging.disable_progress_bar()
    try:
        yield
    finally:
        engine_logging.set_verbosity(level)
        if bars:
            engine_logging.enable_progress_bar()
