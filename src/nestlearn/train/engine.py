"""`train`: from one TrainConfig to a saved model, resumable at every checkpoint."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from nestlearn import atomic
from nestlearn.data import PackedDataset, PackedStream, bytes_per_token, load_corpus, pack
from nestlearn.models import HopeConfig, flops
from nestlearn.nn import ContinuumMemory, SelfModifyingTitans
from nestlearn.train import checkpoint
from nestlearn.train.config import SCHEDULES, TrainConfig, check_processes, share_batch
from nestlearn.train.errors import TrainingInterrupted, explain_lost_process
from nestlearn.train.folder import check_corpus, claim_folder, processes, save_settings, saved_processes, starting_point
from nestlearn.train.load import load_tokenizer, prepare_model, prepare_model_config, prepare_tokenizer
from nestlearn.train.meter import Meter, count_targets, cut_log, read_log
from nestlearn.train.optimizers import ENGINE, build_optimizer
from nestlearn.train.quiet import quiet_engine
from nestlearn.train.stream import RecordedStream

# The engine's own modules import datasets and peft, which takes as long as torch: wrong settings are refused before.
if TYPE_CHECKING:
    from transformers import TrainingArguments

    from nestlearn.train.trainer import HopeTrainer

# Settings of the engine that belong to the run, with the option that sets each; None if no option does.
OWN_SETTINGS = {
    "output_dir": "out", "max_steps": "steps", "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size", "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "learning_rate", "lr_scheduler_type": "schedule", "warmup_steps": "warmup",
    "weight_decay": "weight_decay", "adam_beta1": "beta1", "adam_beta2": "beta2", "max_grad_norm": "max_grad_norm",
    "optim": "optimizer", "seed": "seed", "data_seed": "seed", "bf16": "dtype", "fp16": "dtype",
    "fsdp": "strategy", "fsdp_config": "strategy",
    "gradient_checkpointing": "gradient_checkpointing", "logging_steps": "log_interval",
    "eval_steps": "eval_interval", "save_steps": "save_interval", "save_total_limit": "keep_checkpoints",
    **dict.fromkeys((
        "logging_nan_inf_filter", "logging_strategy", "eval_strategy", "save_strategy", "save_only_model",
        "num_train_epochs", "prediction_loss_only", "remove_unused_columns", "label_names", "ignore_data_skip",
        "dataloader_drop_last", "load_best_model_at_end", "resume_from_checkpoint", "auto_find_batch_size",
    )),
}  # fmt: skip


DIVIDED = {"version": 2, "auto_wrap_policy": "NO_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}
"""The engine leaves the units of FSDP2 to HopeTrainer, and writes checkpoints in parts."""


@dataclass(frozen=True)
class TrainResult:
    """The results of a finished run. Loss is in nats per token, on the training text and on held-out text."""

    out: Path
    steps: int
    tokens: int
    seconds: float
    flops: float
    loss: float
    bits_per_byte: float
    eval_loss: float
    eval_bits_per_byte: float


@dataclass(frozen=True)
class RunData:
    """The datasets of a run, the bytes per token, and a digest of the text (None for a stream)."""

    train: Dataset
    validation: Dataset
    token_bytes: torch.Tensor
    eval_bytes_per_target: float
    digest: str | None = None


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Train a model and save it, its tokenizer and its log in ``config.out``.

    With the same machine and number of threads, a run that was interrupted and resumed ends with the same bits as one
    without interruption.

    Args:
        config: settings of the run.
        resume: continue from the last checkpoint in ``config.out``.
        console: where progress goes; standard error if None.

    Raises:
        ValueError: settings or data cannot be used.
        CheckpointError: if a checkpoint is damaged or cannot be written; earlier ones are left intact.
        NonFiniteError: when the loss or a gradient is no longer finite.
        TrainingInterrupted: after Ctrl-C, once the state is saved.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = [(folder / f"{n}.txt").write_text(f"text number {n} " * 50) for n in range(20)]
        >>> config = TrainConfig(preset="transformer-tiny", corpus=f"text:{folder}", out=str(folder / "run"), steps=2,
        ...                      batch_size=2, sequence_length=32, model={"hidden_size": 20, "num_hidden_layers": 1})
        >>> result = train(config, console=Console(quiet=True))
        >>> result.tokens, (folder / "run" / "model.safetensors").exists()
        (128, True)
    """
    console = console or Console(stderr=True)
    check_settings(config)
    with claim_folder(Path(config.out)):
        return _train(config, resume, console)


def check_settings(config: TrainConfig) -> None:
    """Refuse settings that the engine or the optimizer cannot use, before a run writes anything.

    Raises:
        ValueError: an unknown setting, or a value out of range.
    """
    check_processes(config, int(os.environ.get("WORLD_SIZE", "0")))
    training_arguments(config)
    make = _optimizer_maker(config)
    if make is not None:
        make(nn.Linear(2, 2))


def _train(config: TrainConfig, resume: bool, console: Console) -> TrainResult:
    """The run itself, in a folder that this process has claimed."""
    from nestlearn.train.callbacks import ProgressBar, StepTimer, StopOnSignal

    out = Path(config.out)
    last = starting_point(config, resume)
    # Saved as they were given, so that the same command can resume a run on any number of processes, and again.
    given, count = config, saved_processes(out) if resume else processes()
    config = share_batch(given, count, processes())
    if config.threads:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(out) if last else prepare_tokenizer(config)
    # The model first: this finds a wrong setting at once, and reading a corpus may take long.
    model = prepare_model(config, prepare_model_config(config, tokenizer))
    _check_texts(model.config, config.sequence_length)
    data = load_data(config, tokenizer)
    if last:
        check_corpus(config, data.digest)
        if isinstance(data.train, RecordedStream):
            data.train.load(last)
    progress = Meter.load(last) if last else Meter()
    bar, stop = ProgressBar(progress, console, Path(config.preset).name), StopOnSignal(console)
    with stop, quiet_engine():
        trainer = build_trainer(config, model, tokenizer, data, progress)
        # The first process may write into the folder only after every process has read it.
        trainer.accelerator.wait_for_everyone()
        begun = checkpoint.step_of(last) if last else 0
        if trainer.is_world_process_zero():
            _begin_folder(given, count, tokenizer, data.digest, begun)
        for callback in (StepTimer(progress), bar, stop):
            trainer.add_callback(callback)
        # After the preparation: before an error, this warning would look like its cause.
        _warn_of_idle_memories(model, config.sequence_length, console)
        if last and begun == config.steps:
            export_checkpoint(last, out, model)
            return _result(trainer, out, begun)
        try:
            with explain_lost_process(_resume_command(out)):
                trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            bar.close()
        if stop.received is not None and trainer.state.global_step < config.steps:
            raise _interrupted(trainer, stop.received, out)
        export(trainer, out)
    return _result(trainer, out, trainer.state.global_step)


def _check_texts(config: HopeConfig, sequence_length: int) -> None:
    """Raise ValueError for a cache that would hold every token of a training sequence: it would never choose."""
    mixer = max(config.mixers, key=lambda mixer: mixer.shortest_text)
    if mixer.shortest_text > sequence_length:
        raise ValueError(
            f"sequence_length={sequence_length} is too short for {mixer!r}: its cache and the current chunk hold "
            f"{mixer.shortest_text - 1} tokens, so that it would never have to choose. Use a smaller cache or chunk, "
            f"or a sequence_length of at least {mixer.shortest_text}."
        )


def _warn_of_idle_memories(model: nn.Module, sequence_length: int, console: Console) -> None:
    """Warn of memories that training cannot improve: their period is not shorter than a training sequence."""
    periods = set()
    for module in model.modules():
        if isinstance(module, ContinuumMemory):
            periods |= {f"level of period {module.periods[i]}" for i in module.levels_that_never_write(sequence_length)}
        elif isinstance(module, SelfModifyingTitans) and module.projection_chunk_size >= sequence_length:
            periods.add(f"projections of chunk {module.projection_chunk_size}")
    if periods:
        console.print(
            f"[yellow]Warning:[/] {', '.join(sorted(periods))}: nothing written in a sequence of {sequence_length} "
            "tokens is read again in training. Use a longer --sequence-length or shorter periods.",
            soft_wrap=True,
        )


def _begin_folder(
    config: TrainConfig, count: int, tokenizer: PreTrainedTokenizerFast, digest: str | None, step: int
) -> None:
    """Write the tokenizer and settings of a run of ``count`` processes, and cut the log back to its first step."""
    cut_log(Path(config.out), step)
    if step == 0:
        tokenizer.save_pretrained(config.out)
    save_settings(config, digest, count)


def load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> RunData:
    """Pack the training and held-out documents into windows of ``sequence_length`` tokens.

    Raises:
        ValueError: the corpus has too little text for one batch, or nothing to evaluate on.
    """
    packed = {
        split: pack(load_corpus(config.corpus, split), tokenizer, config.sequence_length, seed=config.seed)
        for split in ("train", "validation")
    }
    train_set, held_out = packed["train"], packed["validation"]
    if isinstance(train_set, PackedDataset) and len(train_set) < config.batch_size:
        raise ValueError(
            f"The corpus {config.corpus!r} is too small: {len(train_set)} windows of {config.sequence_length} tokens "
            f"for a batch of {config.batch_size}. Use more text, or a smaller --sequence-length or --batch-size."
        )
    windows = _first_items(held_out, config.eval_windows)
    if not windows:
        raise ValueError(
            f"The held-out part of {config.corpus!r} is shorter than one window of {config.sequence_length} tokens. "
            "Use more documents, or a smaller --sequence-length."
        )
    token_bytes = bytes_per_token(tokenizer)
    counts = [count_targets(item["labels"].unsqueeze(0), token_bytes) for item in windows]
    targets, byte_count = (sum(column) for column in zip(*counts, strict=True))
    digest = None
    if isinstance(train_set, PackedDataset) and isinstance(held_out, PackedDataset):
        digest = f"{train_set.digest()[:16]}-{held_out.digest()[:16]}"
    if isinstance(train_set, PackedStream):
        train_set = RecordedStream(train_set, remember=_windows_ahead(config))
    return RunData(train_set, _ListDataset(windows), token_bytes, byte_count / max(targets, 1), digest)


class _ListDataset(Dataset):
    def __init__(self, items: list[dict[str, torch.Tensor]]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]


def _first_items(dataset: PackedDataset | PackedStream, count: int) -> list[dict[str, torch.Tensor]]:
    """The first ``count`` windows of a map-style or streaming dataset."""
    if isinstance(dataset, PackedDataset):
        return [dataset[index] for index in range(min(count, len(dataset)))]
    return list(islice(dataset, count))


def _windows_ahead(config: TrainConfig) -> int:
    """An upper bound of the windows that the engine reads ahead: two updates of all processes."""
    return 2 * (config.gradient_accumulation + 1) * config.batch_size * processes()


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The engine's settings for a run, with those of ``config.trainer``.

    Raises:
        ValueError: an unknown setting, one that belongs to the run, or a value that the engine refuses.
    """
    from transformers import TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": config.out,
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.peak_learning_rate(),
        "lr_scheduler_type": SCHEDULES[config.schedule],
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.beta1,
        "adam_beta2": config.beta2,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "data_seed": config.seed,
        "bf16": config.dtype == "bfloat16",
        "fsdp": config.strategy != "ddp" or None,
        "fsdp_config": DIVIDED if config.strategy != "ddp" else None,
        "logging_steps": config.log_interval,
        # The engine would replace a non-finite loss by an average; here such a loss ends the run.
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": config.eval_interval or config.steps,
        "prediction_loss_only": True,
        "log_level": "error",
        "log_level_replica": "error",
        "save_strategy": "steps",
        "save_steps": config.save_interval,
        "save_total_limit": config.keep_checkpoints,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_drop_last": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "label_names": ["labels"],
        # A stream continues at its saved position; the engine need not read up to it again.
        "ignore_data_skip": config.corpus.startswith("hf:"),
        # Kept in the saved configuration, so that generation from the result uses its cache.
        "use_cache": True,
    }
    for name in config.trainer:
        if name in OWN_SETTINGS:
            use = f"Use --{OWN_SETTINGS[name].replace('_', '-')}." if OWN_SETTINGS[name] else "Leave it out."
            raise ValueError(f"--trainer.{name} cannot be changed: the run depends on it. {use}")
    try:
        return TrainingArguments(**{**settings, **config.trainer})
    except TypeError as error:
        raise ValueError(f"Unknown TrainingArguments field in trainer: {error}.") from error
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"The training engine refuses {config.trainer}: {error}") from error


def build_trainer(
    config: TrainConfig, model: Any, tokenizer: PreTrainedTokenizerFast, data: RunData, progress: Meter
) -> HopeTrainer:
    """The engine of a run, without progress bar and signal handling."""
    from transformers import PrinterCallback, default_data_collator

    from nestlearn.train.trainer import HopeTrainer

    if config.gradient_checkpointing:
        # Renamed in transformers 5.23; the old name warns there, the new one is missing before.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    trainer = HopeTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        token_bytes=data.token_bytes,
        flops_per_token=flops(model.config, config.sequence_length),
        meter=progress,
        eval_bytes_per_target=data.eval_bytes_per_target,
        make_optimizer=_optimizer_maker(config),
        shard_size=config.shard_size,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _optimizer_maker(config: TrainConfig) -> Callable[[nn.Module], Optimizer] | None:
    if config.optimizer == ENGINE:
        return None
    return partial(
        build_optimizer,
        config.optimizer,
        lr=config.peak_learning_rate(),
        adamw_lr=config.preset_learning_rate() if config.learning_rate is None else config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        options=config.optimizer_options,
    )


def export(trainer: HopeTrainer, out: Path) -> None:
    """Save model and tokenizer in the run folder itself, each file renamed into place when whole."""
    final = out / "model"
    first = trainer.args.should_save
    staging = atomic.staging(final) if first else nullcontext(atomic.staging_folder(final))
    with checkpoint.explain_failure(out / "model.safetensors"), staging as folder:
        trainer.save_model(str(folder / final.name))
        trainer.accelerator.wait_for_everyone()
        if first and (folder / final.name).is_dir():
            checkpoint.publish_files(folder / final.name, out)


def export_checkpoint(last: Path, out: Path, model: Any) -> None:
    """Copy the model of a checkpoint into the run folder, for a run that ended before its own export."""
    from nestlearn.train.sharding import WEIGHTS, read_weights

    if int(os.environ.get("RANK", "0")) != 0:
        return
    with checkpoint.explain_failure(out / "model.safetensors"), atomic.staging(out / "model") as folder:
        content = folder / "model"
        content.mkdir()
        if (last / WEIGHTS).is_dir():
            read_weights(last, model)
            model.save_pretrained(content)
        for path in [*last.glob("model*"), *last.glob("*config.json")]:
            shutil.copyfile(path, content / path.name)
        checkpoint.publish_files(content, out)


def _interrupted(trainer: HopeTrainer, number: int, out: Path) -> TrainingInterrupted:
    saved = checkpoint.last_checkpoint(out)
    return TrainingInterrupted(trainer.state.global_step, saved or out, 128 + number, _resume_command(out))


def _resume_command(out: Path) -> str:
    command = f"nestlearn train --resume --out {shlex.quote(str(out))}"
    if "WORLD_SIZE" not in os.environ:
        return command
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
    nodes = f"--nnodes {processes() // here} [...] " if here < processes() else ""
    return f"torchrun {nodes}--nproc-per-node {here} -m {command}"


def _result(trainer: HopeTrainer, out: Path, steps: int) -> TrainResult:
    lines = read_log(out)
    trained = next((line for line in reversed(lines) if "loss" in line), {})
    held_out = next((line for line in reversed(lines) if "eval_loss" in line), {})
    nan = float("nan")
    totals = trainer.meter
    return TrainResult(
        out=out,
        steps=steps,
        tokens=totals.tokens,
        seconds=totals.seconds,
        flops=totals.flops,
        loss=trained.get("loss", nan),
        bits_per_byte=trained.get("bits_per_byte", nan),
        eval_loss=held_out.get("eval_loss", nan),
        eval_bits_per_byte=held_out.get("eval_bits_per_byte", nan),
    )
