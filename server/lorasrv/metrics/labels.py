"""Labels that every series of a page carries."""

from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import Metric


def with_labels(families: Iterable[Metric], **labels: str) -> Iterator[Metric]:
    """Yields copies of the families whose samples have these labels, too; the families themselves stay as they are.

    `_created` samples, which only double the page, are left out.
    """
    for family in families:
        labelled = Metric(family.name, family.documentation, family.type, family.unit)
        labelled.samples = [
            sample._replace(labels={**labels, **sample.labels})
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]
        yield labelled
