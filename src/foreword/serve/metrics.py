"""What `/metrics` shows, for Prometheus. One registry per server; no label ever holds what a client sent."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)


class Metrics:
    """The server's counters; each part counts what it does itself."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("foreword_requests", "Answers by HTTP status", ["status"], registry=registry)
        self.cancelled = Counter("foreword_cancelled", "Jobs whose client went away", registry=registry)
        self.prompt_tokens = Counter("foreword_prompt_tokens", "Tokens read, prefixes not counted", registry=registry)
        self.generated_tokens = Counter("foreword_generated_tokens", "Tokens generated", registry=registry)
        self.texts = Counter("foreword_classified_texts", "Texts classified", registry=registry)
        self.waiting = Gauge("foreword_waiting", "Jobs that wait", registry=registry)
        self.running = Gauge("foreword_running", "Rows that decode", registry=registry)
        self.batch = Histogram("foreword_batch_rows", "Rows per decoding step", buckets=ROWS, registry=registry)
        self.first_token = Histogram(
            "foreword_first_token_seconds", "From arrival to the first token", buckets=SECONDS, registry=registry
        )
        self.prefix_hits = Counter("foreword_prefix_hits", "Prefixes that were in memory", registry=registry)
        self.prefix_misses = Counter("foreword_prefix_misses", "Prefixes read from disk", registry=registry)
        self.prefix_evictions = Counter("foreword_prefix_evictions", "Prefixes that left memory", registry=registry)
        self.prefixes = Gauge("foreword_prefixes", "Prefixes in memory", registry=registry)
        self.prefix_bytes = Gauge("foreword_prefix_bytes", "Bytes of prefixes in memory", registry=registry)

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
