"""Callbacks of a run: step timing, the progress bar, and stopping cleanly on a signal."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
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
        # The last interval is logged even where it is a short one.
        control.should_log |= state.global_step >= state.max_steps


class ProgressBar(TrainerCallback):
    """Loss, bits per byte, tokens per second and the time left, on a terminal or as plain lines in a file."""

    def __init__(self, meter: Meter, console: Console, title: str):
        self.meter, self.console, self.title = meter, console, title
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.began = self.printed = time.perf_counter()
        self.tokens_before = self.seconds_before = 0.0
        self.started_at = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar.start()
        self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, status="")
        self.tokens_before, self.seconds_before = self.meter.tokens, self.meter.seconds
        self.began, self.started_at = time.perf_counter(), state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_kwargs: Any,
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "eval_bits_per_byte" in logs:
            self.console.print(
                f"{self.title} step {state.global_step}: held-out loss {logs['eval_loss']:.4f}, "
                f"{logs['eval_bits_per_byte']:.3f} bits per byte"
            )
        elif "loss" in logs:
            self._show(state, logs)

    def _show(self, state: TrainerState, logs: dict[str, float]) -> None:
        rate = (self.meter.tokens - self.tokens_before) / max(self.meter.seconds - self.seconds_before, 1e-9)
        status = f"loss {logs['loss']:.4f}  {logs['bits_per_byte']:.3f} bits/byte  {rate:,.0f} tokens/s"
        self.bar.update(self.task, status=status)
        now = time.perf_counter()
        last = state.global_step >= state.max_steps
        if not self.console.is_terminal and (last or now - self.printed >= SECONDS_BETWEEN_PLAIN_LINES):
            self.printed = now
            done = max(state.global_step - self.started_at, 1)
            left = (now - self.began) / done * (state.max_steps - state.global_step)
            self.console.print(
                f"{self.title} step {state.global_step}/{state.max_steps}  {status}  ETA {left:.0f} s",
                soft_wrap=True,
            )

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        self.bar.stop()

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.close()


class StopOnSignal(TrainerCallback):
    """Finishes the step, saves a checkpoint and stops on Ctrl-C, SIGTERM or SIGHUP; saves and goes on with SIGUSR1.

    A second Ctrl-C stops at once. SIGHUP is ignored where it was ignored before (nohup).

    Attributes:
        received: the signal to stop that came, None so far.
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
