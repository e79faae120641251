"""Metrics: which direction is better, and how a value is written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        higher_is_better: whether a higher value is better.
        share: whether values lie in [0, 1] and are written in percent.
        digits: digits behind the point, of the percentage or the number.
        understood: whether the name of the evaluation is enough to know the metric.
    """

    higher_is_better: bool
    share: bool
    digits: int
    understood: bool

    def difference(self, value: float) -> str:
        """A difference of two values, with its sign.

        >>> METRICS["accuracy"].difference(0.25), METRICS["perplexity"].difference(-1.5)
        ('+25.0%', '-1.50')
        """
        return f"{value:+.1%}" if self.share else f"{value:+,.2f}"


# The one place to add a metric.
METRICS = {
    "perplexity": Metric(higher_is_better=False, share=False, digits=2, understood=True),
    "bits_per_byte": Metric(higher_is_better=False, share=False, digits=2, understood=False),
    "accuracy": Metric(higher_is_better=True, share=True, digits=0, understood=True),
    "score": Metric(higher_is_better=True, share=True, digits=0, understood=True),
    "f1": Metric(higher_is_better=True, share=True, digits=1, understood=True),
}
# ROUGE, and the metrics of lm-eval's tasks.
OTHER = Metric(higher_is_better=True, share=True, digits=1, understood=False)


def metric_of(name: str) -> Metric:
    """The metric of this name."""
    return METRICS.get(name, OTHER)
