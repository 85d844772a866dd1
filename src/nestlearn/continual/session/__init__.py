"""Sessions: what one user's reading has taught a model that many users share."""

from nestlearn.continual.session.levels import LevelRow, format_levels
from nestlearn.continual.session.open import open_session
from nestlearn.continual.session.practice import PracticeReport
from nestlearn.continual.session.report import LogEntry, ReadInterrupted, ReadReport, SegmentScore, at_most_every
from nestlearn.continual.session.session import MemorySession, PromptTooLong
from nestlearn.continual.session.together import read_together

__all__ = [
    "LevelRow",
    "LogEntry",
    "MemorySession",
    "PracticeReport",
    "PromptTooLong",
    "ReadInterrupted",
    "ReadReport",
    "SegmentScore",
    "at_most_every",
    "format_levels",
    "open_session",
    "read_together",
]
