"""Figures for Prometheus; ``GET /metrics`` shows them."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "nestlearn_requests", "Requests.", ["method", "route", "status"], registry=self.registry
        )  # fmt: skip
        self.tokens = Counter(
            "nestlearn_tokens", "Tokens of prompts, answers and texts.", ["kind"], registry=self.registry
        )
        self.first_token = Histogram(
            "nestlearn_first_token_seconds", "Seconds until the first text of an answer.", registry=self.registry
        )  # fmt: skip

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that asks for its value when it is shown."""
        Gauge(name, text, registry=self.registry).set_function(value)
