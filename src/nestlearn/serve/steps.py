"""Work that tells what it does, as a generator: so the thread that uses the model can do other things in between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class GivenUp(BaseException):
    """Nobody waits for the work any more."""


def steps_of(work: Callable[[Callable[[str], None]], T]) -> Generator[str, None, T]:
    """Give the lines that ``work(tell)`` tells, and return its result.

    The work has a thread of its own, which rests between two lines: it runs while the next line is waited for. Modes of
    gradients belong to a thread, so those of the work and of others do not mix. If the generator is closed, ``tell``
    raises `GivenUp`.

    Example:
        >>> def work(tell):
        ...     tell("half of it")
        ...     return 7
        >>> steps = steps_of(work)
        >>> next(steps)
        'half of it'
        >>> next(steps)
        Traceback (most recent call last):
        StopIteration: 7
    """
    turns: SimpleQueue[bool] = SimpleQueue()
    told: SimpleQueue[str | None] = SimpleQueue()
    result: Future[T] = Future()

    def tell(line: str) -> None:
        told.put(line)
        if not turns.get():
            raise GivenUp

    def run() -> None:
        try:
            if turns.get():
                result.set_result(work(tell))
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            result.set_exception(error)
        told.put(None)

    thread = threading.Thread(target=run, name="nestlearn-steps", daemon=True)
    thread.start()
    try:
        while True:
            turns.put(True)
            line = told.get()
            if line is None:
                return result.result()
            yield line
    finally:
        turns.put(False)
        thread.join()
