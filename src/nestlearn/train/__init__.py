"""Training: one config in, a saved and resumable model out, on the transformers Trainer."""

from nestlearn.train.checkpoint import last_checkpoint, list_checkpoints, verify
from nestlearn.train.config import TrainConfig, build_config, read_config_file
from nestlearn.train.engine import TrainResult, train
from nestlearn.train.errors import CheckpointError, NonFiniteError, TrainingError, TrainingInterrupted
from nestlearn.train.folder import saved_config
from nestlearn.train.load import load_model, load_tokenizer
from nestlearn.train.meter import read_log
from nestlearn.train.optimizers import NamedOptimizer, register_optimizer

__all__ = [
    "CheckpointError",
    "NamedOptimizer",
    "NonFiniteError",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "TrainingInterrupted",
    "build_config",
    "last_checkpoint",
    "list_checkpoints",
    "load_model",
    "load_tokenizer",
    "read_config_file",
    "read_log",
    "register_optimizer",
    "saved_config",
    "train",
    "verify",
]
