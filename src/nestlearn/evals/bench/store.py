"""results.jsonl: one line per finished cell, complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

from nestlearn.evals.bench.cells import Cell
from nestlearn.evals.result import EvalResult


class ResultStore:
    """The results of a folder.

    A line is written in one call and flushed to the disk. An incomplete last line, left by an interruption, is removed
    when the file is opened again.

    Args:
        folder: the folder of results.jsonl, which need not exist.

    Raises:
        ValueError: a line that is no result, or one of another schema.

    Example:
        >>> ResultStore(Path("runs/bench")).results()
        []
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"
        self._results: list[EvalResult] = []
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), start=1):
            result = EvalResult.from_json(line, f"{self.path}, line {number},")
            if not {"key", "recipe", "scores", "by_length", "status"} <= set(result.details):
                raise ValueError(
                    f"{self.path}, line {number}, is a result of {result.task!r}, but not of a benchmark. "
                    "Choose another folder with --out."
                )
            self._results.append(result)
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def results(self) -> list[EvalResult]:
        """All results in the order of their first run; of a repeated cell the newest."""
        return list({result.details["key"]: result for result in self._results}.values())

    def of(self, cells: list[Cell]) -> list[EvalResult]:
        """The results of the cells' recipes, of any mixer and seed.

        Raises:
            ValueError: a result of another version of one of the tasks.
        """
        versions = {cell.task.name: cell.task.version for cell in cells}
        for result in self.results():
            if result.version != versions.get(result.task, result.version):
                raise ValueError(
                    f"{self.path} holds results of task {result.task!r} in version {result.version}; this nestlearn "
                    f"has version {versions[result.task]}, whose numbers must not be mixed with them. "
                    "Choose another folder with --out."
                )
        recipes = {cell.recipe_key for cell in cells}
        return [result for result in self.results() if result.details["recipe"] in recipes]

    def finished(self, retry_unconverged: bool = False) -> set[str]:
        """Keys of the cells that need not run."""
        return {
            result.details["key"]
            for result in self.results()
            if not (retry_unconverged and result.details["status"] == "unconverged")
        }

    def append(self, result: EvalResult) -> None:
        """Add a result to the file.

        Raises:
            OSError: the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (result.to_json() + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._results.append(result)
