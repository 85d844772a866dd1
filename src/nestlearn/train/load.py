"""Models and tokenizers of a run, from a preset or from a folder. A folder is checked before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nestlearn.data import byte_tokenizer, load_corpus, train_bpe
from nestlearn.fields import unknown_name
from nestlearn.models import HopeConfig, HopeForCausalLM, presets
from nestlearn.models.files import refuse_non_finite_weights, refuse_pickled_weights
from nestlearn.train.config import NESTED, TrainConfig, check_tokenizer_spec
from nestlearn.train.errors import CheckpointError
from nestlearn.train.optimizers import optimizer_options
from nestlearn.train.quiet import quiet_engine

if TYPE_CHECKING:
    from nestlearn.data import Corpus


def model_fields() -> frozenset[str]:
    """Names of the HopeConfig fields that a run may override."""
    return frozenset(HopeConfig.field_names())


def is_model_folder(name: str) -> bool:
    """Whether ``name`` is a folder with a saved model and no preset."""
    return (Path(name) / "config.json").is_file()


def require_hope_folder(folder: str | Path) -> None:
    """Refuse the folder of another kind of model.

    Raises:
        CheckpointError: its ``model_type`` is not that of Hope models.
    """
    try:
        kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return  # the loader says what is wrong with the file
    if kind not in (None, HopeConfig.model_type):
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r}, and `nestlearn train` trains Hope models. To train the weights "
            "of another model use `nestlearn learn --method finetune`; to give it memory levels, `nestlearn stack`."
        )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in a model folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{folder} has no readable tokenizer: {_short(error)}.") from error


def load_model(folder: str | Path) -> HopeForCausalLM:
    """The model saved in a folder, complete and with finite weights.

    Raises:
        CheckpointError: a file is missing, truncated, damaged or a pickle, or the weights are not finite or do not fit
            the configuration.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is no model folder: it has no config.json, and an {unknown_name('preset', str(folder), presets())}"
        )
    require_hope_folder(path)
    try:
        refuse_pickled_weights(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    try:
        with quiet_engine():
            loaded: Any = HopeForCausalLM.from_pretrained(str(path), output_loading_info=True, local_files_only=True)
    except (SafetensorError, OSError, json.JSONDecodeError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"Cannot load the model in {path}: {_short(error)}. The folder is incomplete or damaged; "
            "copy it again, or use an earlier checkpoint."
        ) from error
    model, report = loaded
    problems = [f"{kind}: {sorted(map(str, found))[0]}" for kind, found in report.items() if found]
    if problems:
        raise CheckpointError(f"The weights in {path} do not fit its config.json ({'; '.join(problems)}).")
    try:
        refuse_non_finite_weights(model, path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return model


def _short(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def prepare_tokenizer(config: TrainConfig, corpus: Corpus | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a run: that of the saved model, bytes, or BPE learned from the training split."""
    if is_model_folder(config.preset):
        return load_tokenizer(config.preset)
    size = check_tokenizer_spec(config.tokenizer)
    if size is None:
        return byte_tokenizer()
    return train_bpe(corpus or load_corpus(config.corpus, "train"), size)


def resolve_model_config(config: TrainConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> HopeConfig:
    """The model configuration of a run. A tokenizer sets its vocabulary and document boundary.

    Raises:
        ValueError: an unknown preset or an invalid field.
    """
    overrides = dict(config.model)
    if is_model_folder(config.preset):
        if overrides:
            raise ValueError(
                f"{next(iter(overrides))} cannot change: {config.preset} holds trained weights of a fixed shape. "
                "Leave it out, or start from a preset."
            )
        require_hope_folder(config.preset)
        return HopeConfig.from_pretrained(config.preset)
    if tokenizer is None:
        return HopeConfig.from_preset(config.preset, **overrides)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    defaults = {"vocab_size": len(tokenizer), "reset_token_id": tokenizer.bos_token_id, **ids}
    return HopeConfig.from_preset(config.preset, **{**defaults, **overrides})


def prepare_model_config(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> HopeConfig:
    """The model configuration of a run, checked against its tokenizer.

    Raises:
        ValueError: as `resolve_model_config`, or a vocabulary smaller than the tokenizer's.
    """
    # Checked before the configuration is built, whose error would name a token id and not the cause.
    given = config.model.get("vocab_size")
    if isinstance(given, int):
        _check_vocabulary(given, config.tokenizer, len(tokenizer))
    model_config = resolve_model_config(config, tokenizer)
    _check_vocabulary(model_config.vocab_size, config.tokenizer, len(tokenizer))
    return model_config


def _check_vocabulary(vocab_size: int, tokenizer: str, tokens: int) -> None:
    if vocab_size < tokens:
        raise ValueError(
            f"Vocabulary mismatch: the model has vocab_size {vocab_size}, the tokenizer {tokenizer} has {tokens} "
            "tokens. Leave --vocab-size out to take the tokenizer's."
        )


def prepare_model(config: TrainConfig, model_config: HopeConfig) -> HopeForCausalLM:
    """The model of a run, initialized from the seed or loaded from its folder."""
    if is_model_folder(config.preset):
        model = load_model(config.preset)
    else:
        torch.manual_seed(config.seed)
        model = HopeForCausalLM(model_config)
    return model.double() if config.dtype == "float64" else model.float()


def describe_settings(config: TrainConfig, model_config: HopeConfig) -> dict[str, Any]:
    """The resolved settings of a run, as ``--dry-run`` prints them."""
    train = {key: value for key, value in config.to_dict().items() if key not in NESTED}
    train |= {"learning_rate": config.peak_learning_rate(), "warmup": config.warmup_steps}
    fields = model_config.to_dict()
    model = {name: fields[name] for name in sorted(model_fields()) if name in fields}
    options = {**optimizer_options(config.optimizer), **config.optimizer_options}
    return {"train": train, "optimizer": options, "trainer": config.trainer, "model": model}
