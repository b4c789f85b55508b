"""What Prometheus sees: one registry for each application."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from armt.server.scheduler import Scheduler
    from armt.server.store import Store

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counters of requests; those of engine and sessions are read when asked for."""

    def __init__(self, scheduler: Scheduler, store: Store) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(scheduler, store))
        self.requests = Counter(
            "armt_requests",
            "Requests by route and status.",
            ["route", "method", "status"],
            registry=self._registry,
        )
        self.errors = Counter(
            "armt_errors", "Error answers by code.", ["code"], registry=self._registry
        )
        self.in_flight = Gauge(
            "armt_requests_in_flight", "Requests worked on or waiting.", registry=self._registry
        )
        self.seconds = Histogram(
            "armt_request_seconds",
            "From the head of a request to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.first_token = Histogram(
            "armt_time_to_first_token_seconds",
            "From a request to its first generated token.",
            buckets=SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)


class EngineCollector:
    """Numbers of the engine's thread and the sessions."""

    def __init__(self, scheduler: Scheduler, store: Store) -> None:
        self._scheduler = scheduler
        self._store = store

    def describe(self) -> list[Metric]:
        """Names are not checked for doubles at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape."""
        totals, store = self._scheduler.totals, self._store
        tokens = CounterMetricFamily("armt_tokens", "Tokens by kind.", labels=["kind"])
        tokens.add_metric(["read"], totals.read)
        tokens.add_metric(["generated"], totals.generated)
        yield tokens
        queue = GaugeMetricFamily("armt_queue_depth", "Jobs of the engine.", labels=["kind"])
        queue.add_metric(["reading"], totals.reading)
        queue.add_metric(["generating"], totals.decoding)
        yield queue
        yield CounterMetricFamily("armt_passes", "Passes of the engine.", value=totals.passes)
        yield CounterMetricFamily("armt_pass_rows", "Rows of all passes.", value=totals.rows)
        yield CounterMetricFamily(
            "armt_pass_seconds", "Time spent in passes.", value=totals.seconds
        )
        sessions = GaugeMetricFamily("armt_sessions", "Sessions by place.", labels=["place"])
        sessions.add_metric(["memory"], store.live)
        sessions.add_metric(["disk"], len(store) - store.live)
        yield sessions
        yield CounterMetricFamily("armt_evictions", "Moves to disk.", value=store.evicted)
        yield CounterMetricFamily("armt_restores", "Moves from disk.", value=store.restored)
