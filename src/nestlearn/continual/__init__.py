"""Models that go on learning from what they read, and how much of the old they keep.

A stream of tasks or documents, by a method against forgetting:

    learner = ContinualLearner(model, partial(torch.optim.Adam, lr=1e-3), method=CMS(projection=Projection()))
    result = learner.fit(permuted_digits(tasks=10))
    result.metrics.average_accuracy, result.metrics.forgetting

A pretrained model with a memory of its own (`nestlearn.stack_levels`), read to and saved as a file:

    session = MemorySession(model, tokenizer)
    print(session.read(Path("book.txt")))
    session.save("mine.safetensors")
"""

from nestlearn.continual.cms import CMS, Projection, Transfer
from nestlearn.continual.editing import EditReport, Fact
from nestlearn.continual.general import protect
from nestlearn.continual.in_context import InContextLearner
from nestlearn.continual.learner import ContinualLearner
from nestlearn.continual.lora import LoRA
from nestlearn.continual.methods import EWC, ExperienceReplay, FineTuning, JointTraining, Method
from nestlearn.continual.metrics import Metrics, continual_metrics
from nestlearn.continual.readers import FineTuningReader, InContextReader, Reader
from nestlearn.continual.result import ContinualResult
from nestlearn.continual.session import (
    LevelRow,
    MemorySession,
    ReadInterrupted,
    ReadReport,
    SegmentScore,
    read_together,
)

__all__ = [
    "CMS",
    "EWC",
    "ContinualLearner",
    "ContinualResult",
    "EditReport",
    "ExperienceReplay",
    "Fact",
    "FineTuning",
    "FineTuningReader",
    "InContextLearner",
    "InContextReader",
    "JointTraining",
    "LevelRow",
    "LoRA",
    "MemorySession",
    "Method",
    "Metrics",
    "Projection",
    "ReadInterrupted",
    "ReadReport",
    "Reader",
    "SegmentScore",
    "Transfer",
    "continual_metrics",
    "protect",
    "read_together",
]
