"""Counters and times for Prometheus, under vLLM's names, so that dashboards made for it work.

It knows nothing of HTTP beyond a status, and keeps everything in a registry of its own.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from codellama.server.record import Record
from codellama.server.service import Service

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


_ENDS = {"stop", "length", "content_filter"}  # of answers that the client got


class _Load(Collector):
    """What runs and waits at the moment when it is asked for."""

    def __init__(self, service: Service, model_id: str) -> None:
        self._service = service
        self._model_id = model_id

    def collect(self) -> Iterator[GaugeMetricFamily]:
        status = self._service.status()
        for name, value, about in (
            ("running", status.running, "prompts that have a row of the cache"),
            ("waiting", status.waiting, "prompts that wait for a row of the cache"),
        ):
            gauge = GaugeMetricFamily(f"vllm:num_requests_{name}", about, labels=["model_name"])
            gauge.add_metric([self._model_id], value)
            yield gauge


class Metrics:
    """All that is counted of one app."""

    def __init__(self, service: Service, model_id: str) -> None:
        """Start from zero."""
        self._registry = CollectorRegistry()
        self._registry.register(_Load(service, model_id))
        self._model_id = model_id
        self._prompt = self._counter("prompt_tokens", "tokens of prompts")
        self._cached = self._counter("prompt_tokens_cached", "those that the cache held already")
        self._generated = self._counter("generation_tokens", "generated tokens")
        self._success = self._counter("request_success", "answers that ended", "finished_reason")
        self._statuses = Counter(
            "codellama:http_requests", "HTTP requests by status", ["status"], registry=self._registry
        )  # fmt: skip
        self._wait = self._histogram("time_to_first_token_seconds", "from the request to its first token", _LONG)
        self._gap = self._histogram("inter_token_latency_seconds", "between two tokens of an answer", _SHORT)
        self._total = self._histogram("e2e_request_latency_seconds", "from the request to the end of its answer", _LONG)

    def observe(self, record: Record, status: int) -> None:
        """Count a request that is over; status 0 means that nothing was sent."""
        self._statuses.labels(str(status)).inc()
        if not record.prompt_tokens:
            return
        self._prompt.labels(self._model_id).inc(record.prompt_tokens)
        self._cached.labels(self._model_id).inc(record.cached_tokens)
        self._generated.labels(self._model_id).inc(record.generated_tokens)
        for end in _ENDS & set(record.ends):
            self._success.labels(self._model_id, end).inc(record.ends.count(end))
        if record.wait is not None:
            self._wait.labels(self._model_id).observe(record.wait)
        gaps = self._gap.labels(self._model_id)
        for seconds, n_tokens in record.gaps:
            for _ in range(n_tokens):
                gaps.observe(seconds / n_tokens)
        self._total.labels(self._model_id).observe(record.total)

    def write(self) -> bytes:
        """Write everything in Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", about, ["model_name", *labels], registry=self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", about, ["model_name"], registry=self._registry, buckets=buckets)
