"""Run cells in worker processes. A worker gets a new cell as soon as it has finished one."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from nestlearn.evals.bench.cells import Cell
from nestlearn.evals.bench.training import CellProgress, run_cell
from nestlearn.evals.result import EvalResult
from nestlearn.plugins import load_plugins

START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
"""Where it can be, workers are forks of one process that has imported the package; an import takes seconds."""

ERRORS = (ValueError, TypeError, RuntimeError, OSError, ArithmeticError, LookupError, MemoryError)


class CellError(RuntimeError):
    """A cell could not be run; the message names it and the cause."""


class Job(NamedTuple):
    """A cell, and the seconds its training may take."""

    cell: Cell
    limit: float | None


class WorkerSettings(NamedTuple):
    """How cells are run: threads per worker, the device, and the command recorded with every result."""

    threads: int = 1
    device: str = "cpu"
    command: str = ""


Report = Callable[[Cell, CellProgress], None]


def run_jobs(
    cells: Sequence[Cell],
    limit: Callable[[int], float | None],
    workers: int,
    settings: WorkerSettings,
    report: Report,
) -> Iterator[EvalResult]:
    """Run the cells and yield every result when it is ready.

    Args:
        cells: in the order of their start.
        limit: seconds for the training of the next cell, from the number of cells not started yet (including it).
            Below 1, no further cell is started.
        workers: processes; 1 runs the cells in this process.
        settings: the same for all.
        report: called with the progress of any cell.

    Raises:
        CellError: a cell failed, or its process ended.
    """
    if workers == 1:
        yield from _one_process(cells, limit, settings, report)
    else:
        with _Pool(min(workers, len(cells)), settings) as pool:
            yield from pool.run(cells, limit, report)


def _one_process(
    cells: Sequence[Cell], limit: Callable[[int], float | None], settings: WorkerSettings, report: Report
) -> Iterator[EvalResult]:
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for place, cell in enumerate(cells):
            allowed = limit(len(cells) - place)
            if allowed is not None and allowed < 1:
                return
            try:
                yield run_cell(cell, allowed, lambda p, c=cell: report(c, p), settings.command, settings.device)
            except ERRORS as error:
                raise _failed(cell, f"{type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(threads)


def _failed(cell: Cell, why: str) -> CellError:
    return CellError(f"{cell.task.name}, {cell.mixer}, seed {cell.seed}: {why}. Finished cells are kept.")


class _Pool:
    """Processes that wait for jobs. The end of the ``with`` block ends them, even at work."""

    def __init__(self, workers: int, settings: WorkerSettings) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        if START_METHOD == "forkserver":
            context.set_forkserver_preload([__name__])
        self._processes: list[BaseProcess] = []
        self._idle: list[Connection] = []
        self._busy: dict[Connection, Cell] = {}
        with _interrupts_ignored():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, settings), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._idle.append(ours)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def run(self, cells: Sequence[Cell], limit: Callable[[int], float | None], report: Report) -> Iterator[EvalResult]:
        """See `run_jobs`."""
        waiting = list(cells)
        while waiting or self._busy:
            while waiting and self._idle:
                allowed = limit(len(waiting))
                if allowed is not None and allowed < 1:
                    waiting.clear()
                    break
                connection, cell = self._idle.pop(), waiting.pop(0)
                connection.send(Job(cell, allowed))
                self._busy[connection] = cell
            for connection in wait(list(self._busy)):
                assert isinstance(connection, Connection)
                result = self._receive(connection, report)
                if result is not None:
                    yield result

    def _receive(self, connection: Connection, report: Report) -> EvalResult | None:
        """Receive one message of a worker; returns it if it is a result."""
        cell = self._busy[connection]
        try:
            message = connection.recv()
        except EOFError as error:
            raise _failed(cell, "its process ended, perhaps for lack of memory; use fewer --workers") from error
        if isinstance(message, CellProgress):
            report(cell, message)
            return None
        del self._busy[connection]
        self._idle.append(connection)
        if isinstance(message, str):
            raise _failed(cell, message)
        return message


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that start here ignore Ctrl-C from their first instruction; the parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, settings: WorkerSettings) -> None:
    """The body of a worker: receives jobs, sends progress, results and texts of errors, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore")
    load_plugins()
    torch.set_num_threads(settings.threads)
    last = 0.0

    def report(progress: CellProgress) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:
            last = time.monotonic()
            connection.send(progress)

    while True:
        try:
            cell, limit = connection.recv()
        except EOFError:
            return
        try:
            connection.send(run_cell(cell, limit, report, settings.command, settings.device))
        except ERRORS as error:
            if isinstance(error, BrokenPipeError):
                return
            connection.send(f"{type(error).__name__}: {error}")
