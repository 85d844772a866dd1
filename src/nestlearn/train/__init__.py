"""Training: one config in, a saved and resumable model out, on the transformers Trainer."""

from nestlearn.train.checkpoint import last_checkpoint as last_checkpoint
from nestlearn.train.checkpoint import list_checkpoints as list_checkpoints
from nestlearn.train.checkpoint import verify as verify
from nestlearn.train.config import TrainConfig as TrainConfig
from nestlearn.train.config import build_config as build_config
from nestlearn.train.config import read_config_file as read_config_file
from nestlearn.train.engine import TrainResult as TrainResult
from nestlearn.train.engine import train as train
from nestlearn.train.errors import CheckpointError as CheckpointError
from nestlearn.train.errors import NonFiniteError as NonFiniteError
from nestlearn.train.errors import TrainingError as TrainingError
from nestlearn.train.errors import TrainingInterrupted as TrainingInterrupted
from nestlearn.train.folder import saved_config as saved_config
from nestlearn.train.load import load_model as load_model
from nestlearn.train.load import load_tokenizer as load_tokenizer
from nestlearn.train.meter import read_log as read_log
from nestlearn.train.optimizers import NamedOptimizer as NamedOptimizer
from nestlearn.train.optimizers import register_optimizer as register_optimizer
