"""A server of one model and many sessions, over the API of OpenAI: each user has a memory.

`app` makes the application of ASGI, ``nestlearn serve`` runs it. It needs the extra ``serve``.
"""

from nestlearn.serve.application import app
from nestlearn.serve.errors import ApiError
from nestlearn.serve.limits import Limits

__all__ = ["ApiError", "Limits", "app"]
