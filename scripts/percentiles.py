"""Percentiles, as every report here gives them."""

from collections.abc import Sequence

import numpy as np


def percentiles(values: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    """mean, p50, p95, p99 and max (numpy's linear interpolation); None of no values."""
    if len(values) == 0:
        return None
    array = np.asarray(values, dtype=np.float64)
    p50, p95, p99 = np.percentile(array, [50, 95, 99])
    return {
        "mean": float(array.mean()),
        "p50": float(p50),
        "p95": float(p95),
        "p99": float(p99),
        "max": float(array.max()),
    }
