"""Knowledge editing: facts are written into a stacked model by closed forms, beside what its levels have learned."""

from .edit import EditMethod, Editor, EditReport
from .facts import Fact, FactRows
from .measure import general_directions

__all__ = ["EditMethod", "EditReport", "Editor", "Fact", "FactRows", "general_directions"]
