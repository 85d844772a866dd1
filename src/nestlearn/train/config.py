"""The settings of a training run: one frozen record, from defaults, a file and the command line, in this order."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from nestlearn.fields import LARGEST, MAX_SEED, Between, Count, Size, check_fields, unknown_name
from nestlearn.train.optimizers import ENGINE, check_optimizer, own_learning_rate

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
Rate = Annotated[float, Between(0)]
Beta = Annotated[float, Between(0, 1, open="high")]
# hope and transformer: found by benchmarks/learning_rate_grid.py on one common grid (docs/log.md has the table).
# The other two take the rate of the more similar of these; no grid was run for them.
PRESET_LEARNING_RATES = {
    "hope-tiny": 4e-3,
    "transformer-tiny": 2e-3,
    "titans-tiny": 4e-3,
    "hope-attention-tiny": 2e-3,
}
FALLBACK_LEARNING_RATE = 1e-3
CONFIG_FILE = "train_config.json"
NESTED = ("optimizer_options", "model", "trainer")
# These may differ from the saved run on --resume, because none of them changes what a step computes.
FREE_ON_RESUME = frozenset({"out", "steps", "log_interval", "eval_interval", "eval_windows", "save_interval",
                            "keep_checkpoints", "threads", "shard_size"})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a training run.

    Lengths are in tokens. ``steps`` counts optimizer updates. One update reads
    ``batch_size * gradient_accumulation * sequence_length`` tokens per process.

    Attributes:
        preset: a preset name ("hope-tiny") or a folder with a saved model to train further.
        corpus: what to read: python-docs, python-source, chronicles, text:PATH, hf:NAME[:CONFIG].
        tokenizer: "byte", or "bpe:N" for a vocabulary of N learned from the corpus.
        optimizer: "adamw", or one of `nestlearn.optim` for the matrices of the model, with AdamW for the rest: "m3",
            "muon", "dgd", "dgd-inverse", "delta-momentum", "deep-momentum"; or a name given to `register_optimizer`.
        learning_rate: peak rate; None takes the preset's own, or the optimizer's if its steps have another size.
        warmup: steps of linear warm-up; None takes 5 % of ``steps``.
        schedule: "cosine" (to 0), "linear" (to 0) or "constant", after the warm-up.
        weight_decay: applied to tensors with two or more dimensions.
        dtype: "float32", "bfloat16" (mixed precision, float32 weights) or "float64".
        eval_interval: steps between held-out losses; 0 evaluates only at the end.
        eval_windows: how many held-out windows of ``sequence_length`` that loss reads.
        save_interval: steps between checkpoints; the last step is always saved.
        keep_checkpoints: how many checkpoints stay on disk.
        threads: CPU threads; None keeps the choice of torch. A resume is bit-exact only with the same number.
        strategy: how several processes (torchrun) share the work. "ddp": each has all parameters. "fsdp": they are
            divided over all processes, with their gradients and optimizer states. "hsdp": over ``shard_size`` of them.
        shard_size: processes that hold one copy of the parameters together, with "hsdp".
        optimizer_options: settings of the optimizer that differ from its own, such as {"slow_period": 20}.
        model: HopeConfig fields that differ from the preset's.
        trainer: other fields of transformers.TrainingArguments, for example {"report_to": "tensorboard"}. A field that
            one of the above sets is refused.

    Example:
        >>> TrainConfig(preset="hope-tiny", steps=100).warmup_steps
        5
    """

    preset: str = "hope-tiny"
    corpus: str = "python-docs"
    tokenizer: str = "byte"
    out: str = "runs/train"
    sequence_length: Annotated[int, Between(2, LARGEST)] = 256
    batch_size: Size = 16
    gradient_accumulation: Size = 1
    steps: Size = 1000
    optimizer: str = ENGINE
    learning_rate: Rate | None = None
    warmup: Count | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Rate = 0.1
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    max_grad_norm: Rate = 1.0
    seed: Annotated[int, Between(0, MAX_SEED)] = 0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    gradient_checkpointing: bool = False
    log_interval: Size = 10
    eval_interval: Count = 0
    eval_windows: Size = 64
    save_interval: Size = 500
    keep_checkpoints: Size = 2
    threads: Size | None = None
    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    shard_size: Size | None = None
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        check_optimizer(self.optimizer, self.optimizer_options)
        check_tokenizer_spec(self.tokenizer)
        if (self.strategy == "hsdp") != (self.shard_size is not None):
            raise ValueError(
                f"strategy={self.strategy!r} with shard_size={self.shard_size}: hsdp needs --shard-size N, how many "
                "processes hold one copy of the parameters (usually those of a machine); no other strategy has one."
            )

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up, at least 1."""
        return max(1, self.steps // 20) if self.warmup is None else self.warmup

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one process reads per optimizer update."""
        return self.batch_size * self.gradient_accumulation * self.sequence_length

    def peak_learning_rate(self) -> float:
        """The learning rate after warm-up: the one given, else the optimizer's own, else the preset's."""
        own = own_learning_rate(self.optimizer) if self.learning_rate is None else self.learning_rate
        return self.preset_learning_rate() if own is None else own

    def preset_learning_rate(self) -> float:
        """The rate of AdamW that the preset was tuned for."""
        return PRESET_LEARNING_RATES.get(self.preset, FALLBACK_LEARNING_RATE)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy of all fields."""
        return dataclasses.asdict(self)


def check_processes(config: TrainConfig, processes: int) -> None:
    """Raise ValueError where the processes of this run cannot divide the parameters as ``config`` says.

    Example:
        >>> check_processes(TrainConfig(strategy="hsdp", shard_size=4), 6)
        Traceback (most recent call last):
        ...
        ValueError: --shard-size 4 does not divide the 6 processes of this run. Use one of 1, 2, 3, 6.
    """
    if config.strategy == "ddp":
        return
    if processes == 0:
        raise ValueError(
            f"strategy={config.strategy!r} divides the parameters over processes, and this is one process alone. Start "
            "it with torchrun --nproc-per-node N -m nestlearn train ..., or begin a run with --strategy ddp."
        )
    size = config.shard_size
    if size is not None and processes % size:
        sizes = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
        raise ValueError(
            f"--shard-size {size} does not divide the {processes} processes of this run. Use one of {sizes}."
        )


def check_tokenizer_spec(spec: str) -> int | None:
    """The vocabulary size of a "bpe:N" specification, None for "byte".

    Raises:
        ValueError: for anything else.
    """
    if spec == "byte":
        return None
    kind, _, size = spec.partition(":")
    if kind == "bpe" and size.isdigit() and int(size) > 259:
        return int(size)
    raise ValueError(
        f"Unknown tokenizer {spec!r}. Use 'byte', or 'bpe:N' with N > 259 (256 bytes and 3 special tokens), "
        "as in bpe:2048."
    )


def build_config(
    values: Mapping[str, Any], model_fields: typing.Collection[str], base: TrainConfig | None = None
) -> TrainConfig:
    """A TrainConfig from loosely typed values.

    The name of a TrainConfig field sets that field. ``optimizer.NAME`` sets an option of the optimizer, ``mixer.NAME``
    one of the mixer and ``trainer.NAME`` a TrainingArguments field. Every other name must be in ``model_fields``, and
    overrides the preset. ``values`` take precedence over ``base``.

    Raises:
        ValueError: for an unknown name (with close matches) or a value of the wrong type.

    Example:
        >>> build_config({"steps": "20", "hidden_size": "64", "mixer.chunk_size": "8"}, {"hidden_size", "mixer"}).model
        {'hidden_size': 64, 'mixer': {'chunk_size': 8}}
    """
    hints = typing.get_type_hints(TrainConfig)
    merged = (base or TrainConfig()).to_dict()
    for raw_name, value in values.items():
        name = raw_name.replace("-", "_")
        if name in NESTED and isinstance(value, Mapping):
            merged[name] = {**merged[name], **value}
        elif name in hints and name not in NESTED:
            merged[name] = _typed(value, hints[name])
        elif name.startswith("optimizer."):
            option = name.removeprefix("optimizer.")
            merged["optimizer_options"] = {**merged["optimizer_options"], option: parse_scalar(value)}
        elif name.startswith("trainer."):
            merged["trainer"] = {**merged["trainer"], name.removeprefix("trainer."): parse_scalar(value)}
        elif name.startswith("mixer."):
            option = name.removeprefix("mixer.")
            merged["model"] = {**merged["model"], "mixer": _changed_mixer(merged["model"], option, parse_scalar(value))}
        elif name.removeprefix("model.") in model_fields:
            merged["model"] = {**merged["model"], name.removeprefix("model."): parse_scalar(value)}
        else:
            raise unknown_name("field", raw_name, sorted({*hints, *model_fields} - set(NESTED)))
    for name in merged["model"]:
        if name not in model_fields:
            raise unknown_name("model field", name, sorted(model_fields))
    return TrainConfig(**merged)


def _changed_mixer(model: Mapping[str, Any], option: str, value: Any) -> dict[str, Any]:
    """The field ``mixer`` with one option changed; without a type it changes the preset's mixer."""
    mixer = model.get("mixer", {})
    if isinstance(mixer, list):
        raise ValueError(f"mixer.{option} cannot change a list of mixers, one per layer; write it into the list.")
    return {**({"type": mixer} if isinstance(mixer, str) else mixer), option: value}


def parse_scalar(value: Any) -> Any:
    """The value of a text of the command line: of its JSON, of none / true / false in any case, or the text itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        words = {"none": None, "true": True, "false": False}
        return words.get(value.lower(), value)


def _typed(value: Any, declared: Any) -> Any:
    """Text as the value that a field's type asks for; `TrainConfig` checks the result."""
    kinds = typing.get_args(declared) or (declared,)
    if isinstance(value, str) and (str in kinds or typing.get_origin(declared) is Literal):
        return value
    value = parse_scalar(value)
    if isinstance(value, float) and value.is_integer() and int in kinds:
        return int(value)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and float in kinds else value


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        ValueError: if the file cannot be read, cannot be parsed or holds no mapping.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read the configuration file {path}: {error}.") from error
    try:
        # JSON first: YAML 1.1 reads 1e-3 as text, JSON as a number.
        content = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The configuration file {path} is neither valid YAML nor JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"The configuration file {path} holds {type(content).__name__}, expected a mapping such as `steps: 100`."
        )
    return content


def share_batch(config: TrainConfig, before: int, now: int) -> TrainConfig:
    """The settings with which ``now`` processes read what ``before`` processes read per update.

    Raises:
        ValueError: they cannot share the batch equally.

    Example:
        >>> share_batch(TrainConfig(batch_size=6), 2, 4).batch_size
        3
    """
    total = config.batch_size * before
    if total % now:
        raise ValueError(
            f"The run reads {total} sequences at once ({config.batch_size} on each of {before} processes), which {now} "
            f"processes cannot share. Resume it with a number of processes that divides {total}."
        )
    return dataclasses.replace(config, batch_size=total // now)


def check_resume(saved: TrainConfig, wanted: TrainConfig) -> None:
    """Refuse to resume with settings that make it a different run.

    Raises:
        ValueError: with the name of the first field that must not differ.
    """
    for name, value in wanted.to_dict().items():
        if name not in FREE_ON_RESUME and value != getattr(saved, name):
            raise ValueError(
                f"--resume continues the saved run, so {name} cannot change: saved {getattr(saved, name)!r}, "
                f"received {value!r}. Leave it out, or start a new run with another --out."
            )
