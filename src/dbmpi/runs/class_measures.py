"""Measures of a classifier by class: precision, recall, F1, the area under the ROC curve, and confusions of classes.

Counts are integers, so that they do not depend on which rank has counted what.  The confusion matrix is sparse: it has
at most as many entries as there are samples, also with 21,000 classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

_PENDING = 1 << 20
"""Entries of the confusion matrix after which equal ones are added up."""
_FEW = 32
"""Samples of a class up to which it is faster to compare each with all others than to sort those among them."""
_COMPARED = 1 << 21
"""Comparisons at a time."""


class ConfusionCounts:
    """Counts how often samples of one class are taken for another one.

    Parameters
    ----------
    outputs
        Number of outputs; that of the classes, or more.
    """

    def __init__(self, outputs: int) -> None:
        self._columns = outputs + 1
        self._keys: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def add(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        """Count samples.

        Parameters
        ----------
        outputs : (outputs, samples) array
            The largest one is the prediction; where it is not finite, or one of them is NaN, there is none.
        targets : (samples,) array
            The classes.
        """
        broken = ~np.isfinite(outputs.max(axis=0))
        predicted = np.where(broken, self._columns - 1, outputs.argmax(axis=0))
        self._put(*np.unique(targets.astype(np.int64) * self._columns + predicted, return_counts=True))

    def merge(self, flat: np.ndarray) -> None:
        """Add the counts of others.

        Parameters
        ----------
        flat : (2 * entries,) array
            What :meth:`flat` returned, one behind the other.
        """
        self._keys, self._counts = [], []
        self._put(flat[::2], flat[1::2])

    def flat(self) -> np.ndarray:
        """Return all entries as int64, each by its key and its count."""
        self._add_up()
        return np.column_stack([self._keys[0], self._counts[0]]).ravel()

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return class, prediction and count of each entry, sorted; without one, the prediction is -1."""
        self._add_up()
        target, predicted = np.divmod(self._keys[0], self._columns)
        return target, np.where(predicted == self._columns - 1, -1, predicted), self._counts[0]

    def _put(self, keys: np.ndarray, counts: np.ndarray) -> None:
        self._keys.append(keys.astype(np.int64))
        self._counts.append(counts.astype(np.int64))
        if sum(map(len, self._keys)) > _PENDING + len(self._keys[0]):
            self._add_up()

    def _add_up(self) -> None:
        empty = np.empty(0, np.int64)
        keys, inverse = np.unique(np.concatenate([empty, *self._keys]), return_inverse=True)
        counts = np.zeros(keys.size, np.int64)
        np.add.at(counts, inverse, np.concatenate([empty, *self._counts]))
        self._keys, self._counts = [keys], [counts]


class Ranking:
    """The area under the ROC curve of each class against all others, exactly.

    The area is the probability that a sample of the class has a higher score than one of another class, where equal
    scores count half (Hanley and McNeil, 1982).  A sample belongs to one class only, so the scores of all samples for
    their own classes are one number each; against them, sorted, the others are counted batch by batch.

    Parameters
    ----------
    scores : (samples,) array
        Score of each sample for its own class; no NaN.
    targets : (samples,) array
        The classes.
    classes
        How many there are.
    """

    def __init__(self, scores: np.ndarray, targets: np.ndarray, classes: int) -> None:
        order = np.lexsort((scores, targets))
        edges = np.searchsorted(targets[order], np.arange(classes + 1))
        self._sorted = [scores[order[first:last]] for first, last in pairwise(edges)]
        self._samples = len(targets)
        few = [number for number, own in enumerate(self._sorted) if 0 < own.size <= _FEW]
        self._many = [number for number, own in enumerate(self._sorted) if own.size > _FEW]
        self._few = np.repeat(np.array(few, np.int64), [self._sorted[number].size for number in few])
        self._few_scores = np.concatenate([scores[:0], *(self._sorted[number] for number in few)])
        self.halves = np.zeros(classes, np.int64)
        """Pairs of a sample of the class and another one in the right order, twice, and those that are equal, once."""

    def add(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        """Count samples against those of other classes.

        Parameters
        ----------
        outputs : (classes, samples) array
            Scores.
        targets : (samples,) array
            The classes.
        """
        for number in self._many:
            own, others = self._sorted[number], outputs[number][targets != number]
            at_most = np.searchsorted(own, others, "right")
            below = np.searchsorted(own, others, "left")
            self.halves[number] += int(2 * (own.size - at_most).sum() + (at_most - below).sum())
        block = max(1, _COMPARED // max(1, len(targets)))
        for first in range(0, self._few.size, block):
            classes, scores = self._few[first : first + block], self._few_scores[first : first + block, None]
            rows, others = outputs[classes], targets != classes[:, None]
            halves = 2 * ((rows < scores) & others).sum(axis=1) + ((rows == scores) & others).sum(axis=1)
            np.add.at(self.halves, classes, halves)

    def areas(self, halves: np.ndarray) -> np.ndarray:
        """Return the area of each class, NaN where there are none of it, or no others.

        Parameters
        ----------
        halves : (classes,) array
            The sum of `halves` over all ranks.
        """
        support = np.array([own.size for own in self._sorted], np.int64)
        pairs = 2.0 * support * (self._samples - support)
        return _share(halves, pairs)


@dataclass(frozen=True, eq=False)
class ClassMeasures:
    """What an evaluation says about each class."""

    classes: int
    """How many there are."""
    labels: Sequence[int | str]
    """What they are called; empty where they are just numbers."""
    target: np.ndarray
    """Class of each entry of the confusion matrix."""
    predicted: np.ndarray
    """What it was taken for; -1 where the outputs are no numbers."""
    count: np.ndarray
    """How often."""
    area: np.ndarray
    """Under the ROC curve of each class against all others; NaN where that is not defined."""

    @cached_property
    def support(self) -> np.ndarray:
        """Samples of each class."""
        return self._sums(self.target, self.count)

    @cached_property
    def correct(self) -> np.ndarray:
        """Samples of each class that are taken for it."""
        right = self.target == self.predicted
        return self._sums(self.target[right], self.count[right])

    @cached_property
    def precision(self) -> np.ndarray:
        """Share of those taken for a class that belong to it; NaN where none is."""
        some = (self.predicted >= 0) & (self.predicted < self.classes)
        return _share(self.correct, self._sums(self.predicted[some], self.count[some]))

    @cached_property
    def recall(self) -> np.ndarray:
        """Share of the samples of a class that are taken for it; NaN where there are none."""
        return _share(self.correct, self.support)

    @cached_property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall; NaN where a class does not occur at all."""
        some = (self.predicted >= 0) & (self.predicted < self.classes)
        return _share(2 * self.correct, self.support + self._sums(self.predicted[some], self.count[some]))

    def averages(self, *, weighted: bool) -> dict[str, float]:
        """Return the means over the classes that have samples; a precision that is not defined counts as 0.

        Parameters
        ----------
        weighted
            Whether classes count by their samples; otherwise all alike.
        """
        some = self.support > 0
        weights = self.support[some].astype(np.float64) if weighted else np.ones(int(some.sum()))
        means = {}
        for name in ("precision", "recall", "f1"):
            means[name] = float(np.average(np.nan_to_num(getattr(self, name)[some]), weights=weights))
        known = np.isfinite(self.area[some])
        area = self.area[some][known]
        means["auc"] = float(np.average(area, weights=weights[known])) if known.any() else float("nan")
        return means

    def label(self, number: int) -> int | str:
        """Return what a class, or an output, of a `number` is called."""
        return self.labels[number] if 0 <= number < len(self.labels) else number

    def confusions(self, most: int) -> list[tuple[int, int, int]]:
        """Return class, prediction and count of the most frequent mistakes, at most so many (`most`)."""
        wrong = np.flatnonzero(self.target != self.predicted)
        chosen = wrong[np.lexsort((self.predicted[wrong], self.target[wrong], -self.count[wrong]))][:most]
        columns = (self.target[chosen], self.predicted[chosen], self.count[chosen])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def matrix(self, size: int | None = None) -> np.ndarray:
        """Return the confusion matrix, int64: rows are classes, columns what they were taken for.

        Samples without a prediction, or taken for an output that is no class, are left out.

        Parameters
        ----------
        size
            Rows and columns; where they are fewer than the classes, neighbours are added up.
        """
        size = min(size or self.classes, self.classes)
        matrix = np.zeros((size, size), np.int64)
        some = (self.predicted >= 0) & (self.predicted < self.classes)
        rows, columns = (each[some] * size // self.classes for each in (self.target, self.predicted))
        np.add.at(matrix, (rows, columns), self.count[some])
        return matrix

    def _sums(self, classes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        sums = np.zeros(self.classes, np.int64)
        np.add.at(sums, classes, counts)
        return sums


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return the quotients, NaN where there is nothing to divide by."""
    return np.asarray(np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0))
