"""Counters for Prometheus, through its own client library."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from halfbyte.infer.engine import Engine

_ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")


class Metrics:
    """One application's metrics; a registry of its own, so that several can live in a process.

    Attributes:
        first_token: seconds from a request to its first token.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "halfbyte_http_requests",
            "HTTP requests by endpoint and status.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self._tokens = Counter("halfbyte_sent_tokens", "Tokens written for clients.", registry=self._registry)
        self.first_token = Histogram(
            "halfbyte_time_to_first_token_seconds", "From a request to its first token.", registry=self._registry
        )
        self._registry.register(_EngineCollector(engine))

    def answered(self, path: str, status: int) -> None:
        """Count a request; paths that are no endpoint count as one, since clients choose them."""
        endpoint = path if path in _ENDPOINTS else "other"
        self._requests.labels(endpoint, str(status)).inc()

    def written(self, tokens: int) -> None:
        """Count tokens."""
        self._tokens.inc(tokens)

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry).decode()


class _EngineCollector(Collector):
    """The engine's own counts, read when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        statistics = self._engine.statistics
        yield GaugeMetricFamily("halfbyte_requests_running", "Requests being answered.", self._engine.running)
        yield GaugeMetricFamily("halfbyte_requests_waiting", "Requests in the queue.", self._engine.waiting)
        for name, value in (
            ("prompt_tokens", statistics.prompt_tokens),
            ("cached_prompt_tokens", statistics.cached_tokens),
            ("written_tokens", statistics.written_tokens),
            ("drafted_tokens", statistics.drafted_tokens),
            ("accepted_tokens", statistics.accepted_tokens),
            ("steps", statistics.steps),
        ):
            yield CounterMetricFamily(f"halfbyte_{name}", f"{name.replace('_', ' ')} since the start.", value)
        seconds = CounterMetricFamily("halfbyte_seconds", "Where the engine's time went.", labels=("part",))
        for part, spent in statistics.seconds.items():
            seconds.add_metric((part,), spent)
        yield seconds
