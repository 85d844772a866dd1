"""Errors that end a training run. Each message says how to continue."""

from __future__ import annotations

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
