"""The lm-evaluation-harness (EleutherAI) on a saved model, with the result files of this package."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import math
import os
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nestlearn.evals.language import describe_model
from nestlearn.evals.result import EvalResult

_BOOTSTRAPS = 1000  # resamples of the standard error of a perplexity
_NOT_MEASURED = -1.0  # RULER's tasks report it for lengths that were not run

METRIC = {
    "wikitext": "word_perplexity",
    "lambada_openai": "acc",
    "hellaswag": "acc_norm",
    "arc_challenge": "acc_norm",
}
"""The metric of NL's Table 2, for tasks whose first metric is another."""


class HarnessTasks(NamedTuple):
    """The harness's ``TaskManager`` and names that it knows."""

    manager: Any
    names: list[str]


def harness_tasks(
    names: Sequence[str], *, include_path: str | Path | None = None, metadata: dict[str, Any] | None = None
) -> HarnessTasks:
    """The tasks of names or patterns such as ``"arc_*"``, with the harness's manager that knows them.

    Args:
        names: tasks, groups, tags or glob patterns.
        include_path: a folder of task YAML files to add.
        metadata: passed to the tasks, e.g. ``{"max_seq_lengths": [1024]}`` for RULER.

    Raises:
        RuntimeError: lm-eval is not installed.
        ValueError: no name is given, a task is unknown, or the folder does not exist.
    """
    if not names:
        raise ValueError("No task was named. Give at least one, for example --tasks lambada_openai,piqa.")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path {include_path} is not a folder; give the one that holds the task YAML files.")
    try:
        with _quiet():
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RuntimeError(
            f"Tasks of the lm-evaluation-harness need the extra packages of `pip install nestlearn[eval]` ({error}). "
            f"Requested: {', '.join(names)}."
        ) from error
    with _quiet():
        if include_path is not None:
            # Reading all fourteen thousand definitions takes seconds; the tasks of the folder may be enough.
            manager = TaskManager(include_path=str(include_path), include_defaults=False, metadata=metadata)
            if all(name in manager.all_tasks for name in names):
                return HarnessTasks(manager, list(names))
        manager = TaskManager(include_path=str(include_path) if include_path else None, metadata=metadata)
    found: list[str] = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            raise ValueError(_unknown(name, manager.all_tasks))
        found += [match for match in matches if match not in found]
    return HarnessTasks(manager, found)


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3) or [task for task in known if name in task][:3]
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    return f"Unknown task {name!r}: neither nestlearn nor the lm-evaluation-harness has it.{hint}"


def evaluate_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] | HarnessTasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    metadata: dict[str, Any] | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 0,
    command: str = "",
) -> list[EvalResult]:
    """Runs tasks of the lm-evaluation-harness on a model.

    Every request starts with `<s>` and fresh state, and padding is never written into a memory. The global random
    states are restored afterwards.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        tokenizer: the tokenizer that it was trained with.
        tasks: names as in `harness_tasks`, or its result.
        limit: examples per task; None for all.
        num_fewshot: solved examples before each question; None for the task's own number.
        include_path: a folder of task YAML files to add.
        metadata: passed to the tasks. Tasks that make their own data by length (RULER) need ``tokenizer``, the folder
            of the tokenizer.
        batch_size: requests per forward pass.
        max_length: cut requests to this many tokens from the left; None for no limit.
        seed: seed of generated and few-shot examples.
        command: the command to record in the results.

    Returns:
        One result per task; ``details`` holds all its metrics.

    Raises:
        RuntimeError: lm-eval is not installed.
        ValueError: a task is unknown, its data cannot be loaded, or the tokenizer has no end-of-text token.
    """
    if not isinstance(tasks, HarnessTasks):
        tasks = harness_tasks(tasks, include_path=include_path, metadata=metadata)
    began, was_training = time.perf_counter(), model.training
    try:
        report, cut = _run(
            model, tokenizer, tasks, limit, num_fewshot, batch_size=batch_size, max_length=max_length, seed=seed
        )
    finally:
        model.train(was_training)
    settings = {
        "limit": limit,
        "batch_size": batch_size,
        "max_length": max_length,
        "metadata": metadata,
        "cut_requests": cut,
        "model": describe_model(model),
    }
    seconds = time.perf_counter() - began
    return [_result(name, report, settings, seed, seconds, command) for name in report["results"]]


def _run(
    model: Any,
    tokenizer: Any,
    tasks: HarnessTasks,
    limit: int | None,
    num_fewshot: int | None,
    *,
    batch_size: int,
    max_length: int | None,
    seed: int,
) -> tuple[dict[str, Any], int]:
    """The harness's own report, and the number of cut requests."""
    import lm_eval

    from nestlearn.evals.harness_model import DocumentLM

    evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its type
    with _quiet(), _own_random_state(seed), _no_processes():
        lm = DocumentLM(model, tokenizer, batch_size=batch_size, max_length=max_length)
        report = evaluate(
            model=lm,
            tasks=_load(*tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            task_manager=tasks.manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return report, lm.cut_requests


def _load(manager: Any, names: Sequence[str]) -> list[Any]:
    """Tasks and groups with their data.

    Raises:
        ValueError: data cannot be loaded.
    """
    built: list[Any] = []
    for name in names:
        try:
            with _no_download_where_offline():
                loaded = manager.load([name])
        # The data sets come from several libraries, each with its own errors.
        except Exception as error:
            raise ValueError(_no_data(manager, name, error)) from error
        built += [loaded["groups"][name]] if name in loaded.get("groups", {}) else list(loaded["tasks"].values())
    return built


def _no_data(manager: Any, name: str, error: Exception) -> str:
    settings = getattr(manager.task_index.get(name), "cfg", None) or {}
    path = settings.get("dataset_path")
    files = (settings.get("dataset_kwargs") or {}).get("data_files")
    named = f" {path!r}" if path else ""
    named += f" ({files})" if files else ""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return (
        f"The data set{named} of the task {name} could not be loaded: {reason}. Data sets come from the Hugging Face "
        "Hub: check the network (and HF_HUB_OFFLINE), or name a task with local data files by --include-path."
    )


def _result(
    name: str, report: dict[str, Any], settings: dict[str, Any], seed: int, seconds: float, command: str
) -> EvalResult:
    """The result of one task or group; its value is the first metric, or the one that NL reports."""
    numbers: dict[str, float] = {}
    for key, value in report["results"][name].items():
        metric, _, kept = key.partition(",")
        number = isinstance(value, (int, float)) and kept
        if number and not (value == _NOT_MEASURED and metric.isdigit()):
            numbers[metric if kept == "none" else f"{metric} ({kept})"] = float(value)
    values = {key: value for key, value in numbers.items() if "_stderr" not in key}
    wanted = METRIC.get(name, "")
    metric = wanted if wanted in values else next(iter(values), "")
    value, stderr = values.get(metric, math.nan), numbers.get(f"{metric}_stderr", math.nan)
    lengths = [key for key in values if key.isdigit()]
    if lengths:  # RULER's tasks name their metrics by length
        metric = f"accuracy at {', '.join(lengths)} tokens"
        value = sum(values[length] for length in lengths) / len(lengths)
    count = report.get("n-samples", {}).get(name, {}).get("effective")
    members = report.get("group_subtasks", {}).get(name, [])
    if count is None:
        count = sum(report.get("n-samples", {}).get(member, {}).get("effective", 0) for member in members)
    version = report.get("versions", {}).get(name)
    shots = report.get("n-shot", {}).get(name)
    return EvalResult(
        task=f"lm_eval_{name}",
        version=_whole(version),
        metric=metric,
        value=value,
        stderr=None if math.isnan(stderr) else stderr,
        n=int(count),
        seed=seed,
        seconds=seconds,
        command=command,
        config={**settings, "num_fewshot": shots, "task_version": version, "lm_eval": report.get("lm_eval_version")},
        details={"metrics": numbers},
    )


def _whole(version: Any) -> int:
    """The integer part of a version such as 1.0 or "2"; 0 without a version."""
    try:
        return int(float(version))
    except (TypeError, ValueError):
        return 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides notes and warnings of the harness and its libraries."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Seeds the global generators that the harness uses, and restores their states."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 - the harness uses this one
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


@contextlib.contextmanager
def _no_processes() -> Iterator[None]:
    """Keeps the bootstrap of standard errors in this process: forking a process with threads may hang."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _no_download_where_offline() -> Iterator[None]:
    """Skips the nltk download of RULER's tasks when offline; only its essays need the file."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        yield
        return
    import nltk

    download = nltk.download
    nltk.download = lambda *_args, **_options: False
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the task prints that it was downloaded in any case
            yield
    finally:
        nltk.download = download
