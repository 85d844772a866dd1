"""The Continuous Thought Machine (arXiv 2505.05522): ticks inside one input, neurons with a past, synchronization."""

from .config import ContinuousThoughtConfig as ContinuousThoughtConfig
from .layer import Answer as Answer
from .layer import ContinuousThought as ContinuousThought
from .layer import Thoughts as Thoughts
from .layer import ThoughtState as ThoughtState
from .loss import certainty_of as certainty_of
from .loss import ticks_loss as ticks_loss
