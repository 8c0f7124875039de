"""Measures of a regression by output: the coefficient of determination and the errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class ValueSums(NamedTuple):
    """Sums over samples, for each output, in float64."""

    samples: int
    absolute: np.ndarray
    """Of the absolute errors."""
    squared: np.ndarray
    """Of the squared errors."""
    mean: np.ndarray
    """Of the targets, not their sum."""
    deviation: np.ndarray
    """Of the squared differences of the targets from their mean."""

    @classmethod
    def of(cls, outputs: np.ndarray, targets: np.ndarray) -> ValueSums:
        """Return the sums of a batch.

        Parameters
        ----------
        outputs, targets : (outputs, samples) array
            Predictions and what they should be.
        """
        wanted = targets.astype(np.float64)
        errors = outputs.astype(np.float64) - wanted
        mean = wanted.mean(axis=1)
        deviation = ((wanted - mean[:, None]) ** 2).sum(axis=1)
        return cls(targets.shape[1], np.abs(errors).sum(axis=1), (errors**2).sum(axis=1), mean, deviation)

    def plus(self, other: ValueSums) -> ValueSums:
        """Return the sums of both, with the deviations of Chan, Golub and LeVeque (1979), which lose no digits.

        Parameters
        ----------
        other
            Of other samples.
        """
        samples = self.samples + other.samples
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.samples / samples)
        deviation = self.deviation + other.deviation + apart**2 * (self.samples * other.samples / samples)
        return ValueSums(samples, self.absolute + other.absolute, self.squared + other.squared, mean, deviation)


@dataclass(frozen=True, eq=False)
class ValueMeasures:
    """What an evaluation says about each output."""

    names: Sequence[str]
    """What the outputs are called; empty where they are just numbers."""
    sums: ValueSums
    """Over all samples."""

    @property
    def r2(self) -> np.ndarray:
        """Share of the targets' variance that is predicted; NaN where they are all the same."""
        some = self.sums.deviation > 0
        lost = np.divide(self.sums.squared, self.sums.deviation, out=np.full(some.shape, np.nan), where=some)
        return np.asarray(1 - lost)

    @property
    def mean_absolute_error(self) -> np.ndarray:
        """Of each output."""
        return np.asarray(self.sums.absolute / self.sums.samples)

    @property
    def root_mean_squared_error(self) -> np.ndarray:
        """Of each output."""
        return np.asarray(np.sqrt(self.sums.squared / self.sums.samples))

    def label(self, number: int) -> int | str:
        """Return what the output of a `number` is called."""
        return self.names[number] if number < len(self.names) else number
