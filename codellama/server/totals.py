"""The metrics of several replicas as one page: theirs with a label that names the replica, and the proxy's own.

It knows Prometheus' text format by its library, and no metric of ours by name.
"""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import Response


def merge(texts: Sequence[str | None], in_flight: Sequence[int]) -> Response:
    """Write one page.

    Args:
        texts: each replica's page; None where there is none.
        in_flight: requests that the proxy has handed to each replica and that have not ended.
    """
    return Response(generate_latest(_Page(texts, in_flight)), media_type=CONTENT_TYPE_LATEST)


class _Page:
    """What prometheus_client asks for the metrics to write."""

    def __init__(self, texts: Sequence[str | None], in_flight: Sequence[int]) -> None:
        self._texts, self._in_flight = texts, in_flight

    def collect(self) -> Iterator[Metric]:
        """Give the metrics, each once."""
        yield GaugeMetricFamily("codellama_replicas", "Copies of the weights.", value=len(self._texts))
        busy = GaugeMetricFamily(
            "codellama_replica_requests_in_flight", "Requests that a replica has been handed.", labels=["replica"]
        )
        for replica, count in enumerate(self._in_flight):
            busy.add_metric([str(replica)], count)
        yield busy
        yield from _labelled(self._texts)


def _labelled(texts: Sequence[str | None]) -> Iterable[Metric]:
    """Put the replicas' samples of one metric together, each with the label `replica`."""
    metrics: dict[str, Metric] = {}
    for replica, text in enumerate(texts):
        for found in text_string_to_metric_families(text or ""):
            metric = metrics.setdefault(found.name, Metric(found.name, found.documentation, found.type))
            for sample in found.samples:
                metric.samples.append(sample._replace(labels={**sample.labels, "replica": str(replica)}))
    return metrics.values()
