"""Medians, quartiles, geometric means, and how far a median can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def quantile(samples: Sequence[float], part: float) -> float:
    """The quantile of a non-empty sequence, with linear interpolation between neighbours."""
    ordered = sorted(samples)
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a set of timings."""

    median: float
    q1: float
    q3: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(quantile(samples, 0.5), quantile(samples, 0.25), quantile(samples, 0.75), len(samples))

    @property
    def relative(self) -> float:
        """Half the distance between the quartiles, as a part of the median: the +- of the tables."""
        return (self.q3 - self.q1) / 2 / self.median if self.median else 0.0

    @property
    def notch(self) -> float:
        """The half-width of the median's 95 % interval (McGill's notch), as a part of the median."""
        return 1.57 * (self.q3 - self.q1) / math.sqrt(self.count) / self.median if self.median else 0.0


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers; NaN for none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
