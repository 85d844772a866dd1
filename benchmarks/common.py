"""What the benchmarks share: command lines, records, tables, charts, training steps and the name of the machine."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.allocator import tune_allocator
from nestlearn.evals.language import document_tokens
from nestlearn.evals.report.plots import Panel, chart

RESULTS = Path(__file__).parents[1] / "docs" / "results"
Record = dict[str, Any]


def parser(
    doc: str | None, out: str | Path | None = None, *, seeds: Iterable[int] = (), threads: int = 1
) -> argparse.ArgumentParser:
    """A command line whose help is the docstring of the script, with ``--threads`` and, if given, two more options.

    Args:
        doc: the docstring.
        out: default of ``--out``.
        seeds: default of ``--seeds``.
        threads: default of ``--threads``.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=threads)
    if out is not None:
        made.add_argument("--out", type=Path, default=Path(out))
    if seeds:
        made.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options. Also sets the number of threads, tunes the allocator and makes the folder above ``--out``."""
    options = made.parse_args(arguments)
    tune_allocator()
    torch.set_num_threads(options.threads)
    if "out" in options:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    return options


class Records:
    """Records in a JSON Lines file. A run that has a record is not repeated, so an interrupted benchmark continues.

    Args:
        path: the file; its folder is made.
        fresh: delete earlier records.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        self.all: list[Record] = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    def where(self, **key: Any) -> list[Record]:
        """The records with these values."""
        return [record for record in self.all if key.items() <= record.items()]

    def add(self, record: Record) -> Record:
        """Append a record to the file and print it."""
        self.all.append(record)
        line = json.dumps(record, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            print(line, file=file)
        print(line, flush=True)
        return record

    def get(self, key: Record, run: Callable[[], Record]) -> Record:
        """The record with this key. If there is none, ``run`` makes the rest of it."""
        found = self.where(**key)
        return found[0] if found else self.add(key | run())


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are aligned left, the others right."""
    rule = ["---" if column < left else "--:" for column in range(len(header))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *rows])


def plus_minus(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard error, ``nan`` for the error of one value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def save_svg(path: Path, svg: str) -> None:
    """Save a chart as a file of its own, with a white background: a page may show it on any colour."""
    path.write_text(svg.replace("<svg ", '<svg style="background:white;color:black" ', 1), encoding="utf-8")


def save_chart(path: Path, panels: Sequence[Panel], width: float = 9.0, height: float = 3.6) -> None:
    """Draw panels side by side and save them as ``path``."""
    save_svg(path, chart(panels, width=width, height=height))


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def token_stream(tokenizer: Any, documents: Iterable[Any]) -> Tensor:
    """The tokens of all documents in one row, each document as ``<s> text </s>``: Long[n]."""
    return torch.tensor([token for document in documents for token in document_tokens(tokenizer, document.text)])


def windows(stream: Tensor, rows: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Windows of a stream that start at random places: Long[rows, length]."""
    starts = torch.randint(len(stream) - length, (rows,), generator=generator)
    return stream[starts[:, None] + torch.arange(length)]


def update(model: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer, schedule: Any = None) -> Tensor:
    """One step on a loss, with the norm of the gradient clipped to 1; returns the loss without its graph."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if schedule is not None:
        schedule.step()
    return loss.detach()


def batches(count: int, size: int, generator: torch.Generator) -> Iterable[Tensor]:
    """One epoch: the numbers of shuffled examples in batches."""
    return torch.randperm(count, generator=generator).split(size)
