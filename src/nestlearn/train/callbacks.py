"""Callbacks of a run: the time of a step, the progress bar, and a clean stop on a signal."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nestlearn.train.meter import Meter

SECONDS_BETWEEN_PLAIN_LINES = 10.0


class StepTimer(TrainerCallback):
    """Adds the wall time of each training step to the meter, and logs the last step."""

    def __init__(self, meter: Meter):
        self.meter, self.began = meter, 0.0

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        self.meter.seconds += time.perf_counter() - self.began
        # The last interval is logged even if it is a short one.
        control.should_log |= state.global_step >= state.max_steps


class ProgressBar(TrainerCallback):
    """Loss, bits per byte, tokens per second and the time left after every step: a bar on a terminal, lines in a file.

    Loss and bits per byte are means over the steps since the last line of the log. A file gets a line for the first
    step, for the last one, and every 10 seconds.
    """

    def __init__(self, meter: Meter, console: Console, title: str):
        self.meter, self.console, self.title = meter, console, title
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.began = self.printed = 0.0
        self.tokens_before = self.seconds_before = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar.start()
        self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, status="")
        self.tokens_before, self.seconds_before = self.meter.tokens, self.meter.seconds
        self.began, self.first_step = time.perf_counter(), state.global_step + 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        now, step = time.perf_counter(), state.global_step
        left = (now - self.began) / (step - self.first_step + 1) * (state.max_steps - step)
        rate = (self.meter.tokens - self.tokens_before) / max(self.meter.seconds - self.seconds_before, 1e-9)
        mean = self.meter.interval()
        status = (
            f"loss {mean['loss']:.4f}  {mean['bits_per_byte']:.3f} bits/byte  {rate:,.0f} tokens/s  ETA {left:.0f} s"
        )
        self.bar.update(self.task, completed=step, status=status)
        due = step in (self.first_step, state.max_steps) or now - self.printed >= SECONDS_BETWEEN_PLAIN_LINES
        if due and not self.console.is_terminal:
            self.printed = now
            self.console.print(f"{self.title} step {step}/{state.max_steps}  {status}", soft_wrap=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_kwargs: Any,
    ) -> None:
        if logs and "eval_bits_per_byte" in logs and state.is_world_process_zero:
            self.console.print(
                f"{self.title} step {state.global_step}: held-out loss {logs['eval_loss']:.4f}, "
                f"{logs['eval_bits_per_byte']:.3f} bits per byte"
            )

    def close(self) -> None:
        """Release the terminal; needed after an error too."""
        self.bar.stop()

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.close()


class StopOnSignal(TrainerCallback):
    """On Ctrl-C, SIGTERM or SIGHUP: finish the step, save a checkpoint and stop. On SIGUSR1: save and continue.

    A second Ctrl-C stops at once. SIGHUP stays ignored if it was ignored before (nohup).

    Attributes:
        received: number of the signal that asked to stop; None before.
    """

    def __init__(self, console: Console):
        self.console = console
        self.received: int | None = None
        self.wants_save = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        # Python delivers signals to the main thread only; elsewhere the caller keeps its own handling.
        if threading.current_thread() is threading.main_thread():
            handlers = {"SIGINT": self._receive, "SIGTERM": self._receive, "SIGHUP": self._receive,
                        "SIGUSR1": self._save}  # fmt: skip
            for name, handler in handlers.items():
                number = getattr(signal, name, None)  # Windows has the first two only
                if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                    continue
                self.previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _save(self, _number: int, _frame: Any) -> None:
        self.wants_save = True
        self.console.print("Saving after this step, then going on.")

    def _receive(self, number: int, _frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        if number == getattr(signal, "SIGHUP", None):
            # The terminal is gone, and writing to it would end the run before it is saved.
            self.console.quiet = True
        self.console.print("Stopping: this step is finished and saved first. Ctrl-C again stops at once, unsaved.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        control.should_save |= self.wants_save
        self.wants_save = False
        # At the last step the run ends, and is saved, anyway.
        if self.received is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
