"""Mean and deviation of many rows, block by block."""

from __future__ import annotations

import numpy as np


class Moments:
    """Mean and deviation of each column (Chan, Golub and LeVeque 1983, formula 2.1); NaN is left out.

    Parameters
    ----------
    size
        Number of columns.
    """

    def __init__(self, size: int) -> None:
        self.count = np.zeros(size, np.int64)
        """Numbers in each column."""
        self.mean = np.zeros(size)
        self._squares = np.zeros(size)

    def add(self, rows: np.ndarray) -> None:
        """Count some `rows`, ``(rows, size)``."""
        if not len(rows):
            return
        values = rows.astype(np.float64)
        there = ~np.isnan(values)
        count = there.sum(axis=0)
        values[~there] = 0
        some = np.maximum(count, 1)
        mean = values.sum(axis=0) / some
        total = np.maximum(self.count + count, 1)
        difference = mean - self.mean
        spread = np.where(there, values - mean, 0)
        self._squares += (spread**2).sum(axis=0) + difference**2 * (self.count * (count / total))
        self.mean = self.mean + difference * (count / total)
        self.count = self.count + count

    def together(self, groups: int) -> Moments:
        """Return the moments of so many (`groups`) equal runs of columns, each taken as one column."""
        found = Moments(groups)
        count, mean = self.count.reshape(groups, -1), self.mean.reshape(groups, -1)
        found.count = count.sum(axis=1)
        some = np.maximum(found.count, 1)
        found.mean = (count * mean).sum(axis=1) / some
        apart = count * (mean - found.mean[:, None]) ** 2
        found._squares = (self._squares.reshape(groups, -1) + apart).sum(axis=1)
        return found

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation of each column, float64 ``(size,)``; 0 for one that never varies."""
        found: np.ndarray = np.sqrt(self._squares / np.maximum(self.count, 1))
        # What is left of rounding is no variation.
        return np.where(found > 1e-12 * np.abs(self.mean), found, 0.0)
