"""One application over a tiny stacked model, shared by the tests of a module; each test has sessions of its own."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import Level, stack_levels
from nestlearn.data import byte_tokenizer

NEEDS = "needs the extra serve: pip install -e '.[serve]'"
TEXT = "".join(f"The {n}th sheep of the {n % 3} herds is called {chr(65 + n % 26) * 3}. " for n in range(8))


def forked(work: Callable[[], None]) -> tuple[int, IO[str]]:
    """A child process that does some work with all that is imported here; its number, and its standard error."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads here, which the child lacks
        child = os.fork()
    if not child:
        status = 1
        try:
            os.close(read)
            os.dup2(write, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)  # pytest has put something else there
            work()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else bool(stop.code)
        finally:
            os._exit(status)
    os.close(write)
    return child, os.fdopen(read)


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=256, eos_token_id=257, pad_token_id=258, initializer_range=0.3,
    )  # fmt: skip
    return stack_levels(LlamaForCausalLM(config).eval(), [Level(16, lr=40), Level(48, lr=40)], mode="split")


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def start(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """start(folder, **limits) -> a client of an application, which runs until the module ends or it is closed."""
    from starlette.testclient import TestClient

    from nestlearn.serve import Limits, app

    clients = []

    def make(folder: Path | None = None, **limits: Any) -> Any:
        folder = folder or tmp_path_factory.mktemp("sessions")
        made = app(model, byte_tokenizer(), folder, name="tiny", limits=Limits(**limits))
        client = TestClient(made, base_url="http://localhost")
        client.__enter__()
        clients.append(client)
        return client

    yield make
    for client in clients:
        if not getattr(client, "ended", False):
            client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def client(start: Callable[..., Any]) -> Any:
    return start()
