"""Errors that end a training run. Each message says how to continue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TrainingError(RuntimeError):
    """A training run could not continue; the message names the cause and how to continue."""


class NonFiniteError(TrainingError):
    """The loss or a gradient became NaN or infinite.

    Attributes:
        step: the optimizer step that failed, counted from 1; nothing of it was saved.
        component: the first parameter or module with a non-finite value.
        checkpoint: the last good checkpoint, None if none was saved yet.
    """

    def __init__(self, what: str, step: int, component: str, checkpoint: Path | None):
        self.step, self.component, self.checkpoint = step, component, checkpoint
        where = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been saved yet."
        super().__init__(
            f"{what} at step {step}: the first non-finite value is in {component}. {where} "
            "The usual fix is a lower --learning-rate (or --weight-decay) or a longer --warmup."
        )


class CheckpointError(TrainingError):
    """A checkpoint is missing, truncated, changed or foreign, or could not be written."""


class TrainingInterrupted(TrainingError):
    """A signal stopped the run, after its state was saved.

    Attributes:
        step: the last finished optimizer step.
        checkpoint: the folder that holds the state of that step.
        exit_code: the exit status that a shell expects after this signal (130 for Ctrl-C).
        resume_command: the command that continues the run.
    """

    def __init__(self, step: int, checkpoint: Path, exit_code: int, resume_command: str):
        self.step, self.checkpoint, self.exit_code = step, checkpoint, exit_code
        self.resume_command = resume_command
        super().__init__(f"Stopped after step {step}; saved in {checkpoint}. Continue with: {resume_command}")


@contextmanager
def explain_lost_process(resume_command: str) -> Iterator[None]:
    """Turn the failure of a message to another process of the run into a TrainingError that tells how to go on.

    Example:
        >>> with explain_lost_process("nestlearn train --resume"):
        ...     raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
        Traceback (most recent call last):
        ...
        nestlearn.train.errors.TrainingError: Another process of this run has ended, or cannot be reached ...
    """
    try:
        yield
    except TrainingError:
        raise
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors; those of torch.distributed are DistError and its subclasses.
        if "gloo/" not in str(error) and not any(kind.__name__ == "DistError" for kind in type(error).__mro__):
            raise
        raise TrainingError(
            f"Another process of this run has ended, or cannot be reached ({error}). Its own log says why. Start all "
            f"processes again with: {resume_command}"
        ) from error
