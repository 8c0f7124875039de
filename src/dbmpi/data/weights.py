"""How much each sample counts in learning: weights of samples, and of their classes.

With weights w_i the loss is the weighted mean ``sum_i w_i l_i / sum_i w_i``.  They are divided by their mean over all
samples, so that it is the ordinary mean of ``w_i l_i``: of a batch or a portion too, whatever samples it holds, and an
average over batches and portions is that of all samples.
"""

from __future__ import annotations

import numpy as np

from dbmpi.data.reading import Reading
from dbmpi.data.rows import Stored
from dbmpi.data.targets import Targets
from dbmpi.errors import UserError


class Weights:
    """Weights of the samples of a file.

    Parameters
    ----------
    stored
        The weight of each sample; None where all count alike.
    reading
        Holds the weights of classes.
    targets
        The classes; None without targets.

    Raises
    ------
    UserError
        If a weight is below 0 or not finite, all are 0, or weights of classes do not fit the classes.
    """

    def __init__(self, stored: Stored | None, reading: Reading, targets: Targets | None) -> None:
        self.stored = stored
        self.of_classes: np.ndarray | None = None
        """Factor of each class, float64; None where all count alike."""
        if reading.class_weights is not None:
            self.of_classes = _of_classes(reading, targets)
        self._mean = self._measured(targets)

    def of(self, rows: np.ndarray | None, classes: np.ndarray | None) -> np.ndarray:
        """Return the weights, float32 ``(samples,)`` with a mean of 1 over the file, of samples.

        Parameters
        ----------
        rows
            Stored rows of the dataset of weights, if there is one.
        classes
            Of the samples; used if classes have weights.
        """
        return (self._product(rows, classes) / self._mean).astype(np.float32)

    def of_slice(self, samples: slice, classes: np.ndarray | None) -> np.ndarray:
        """Return the weights of samples in succession, whose targets, if there are any, are `classes`."""
        return self.of(None if self.stored is None else self.stored.read(samples), classes)

    def _product(self, rows: np.ndarray | None, classes: np.ndarray | None) -> np.ndarray:
        found: np.ndarray
        if self.stored is not None:
            assert rows is not None
            found = self.stored.decoded(rows).reshape(-1).astype(np.float64) * self.stored.factor
        else:
            assert classes is not None
            found = np.ones(len(classes))
        return found if self.of_classes is None or classes is None else found * self.of_classes[classes]

    def _measured(self, targets: Targets | None) -> float:
        """Return the mean over all samples, after checking each weight."""
        total, samples = 0.0, 0
        classes = targets.blocks() if targets is not None and self.of_classes is not None else None
        if self.stored is None:
            assert classes is not None
            for _, block in classes:
                total, samples = total + self._product(None, block).sum(), samples + len(block)
        else:
            codes = None if classes is None else np.concatenate([block for _, block in classes])
            for start, rows in self.stored.blocks():
                self._check(start, rows)
                part = None if codes is None else codes[start : start + len(rows)]
                total, samples = total + self._product(rows, part).sum(), samples + len(rows)
        if not total > 0:
            where = "class_weights" if self.stored is None else f"{self.stored.path}: {self.stored.name!r}"
            raise UserError(f"{where}: all weights are 0, so that there is nothing to learn; expected some above 0")
        return total / samples

    def _check(self, start: int, rows: np.ndarray) -> None:
        assert self.stored is not None
        values = self.stored.decoded(rows).reshape(-1)
        with np.errstate(invalid="ignore"):
            wrong = np.flatnonzero(~((values >= 0) & np.isfinite(values)))
        if len(wrong):
            raise self.stored.error(
                f": the weight of sample {start + int(wrong[0])} is {values[wrong[0]]}; expected a finite number that "
                "is not below 0"
            )


def check_weights(stored: Stored, samples: int) -> None:
    """Raise UserError unless the dataset `stored` can be the weights of so many `samples`."""
    stored.as_column(samples)
    if stored.kind.kind not in "iufb" or stored.shape not in ((samples,), (samples, 1)):
        raise stored.error(
            f"is {stored.dtype} of shape {stored.shape}; expected numbers ({samples},), a weight for each sample"
        )


def _of_classes(reading: Reading, targets: Targets | None) -> np.ndarray:
    if targets is None or targets.classes is None:
        raise UserError(
            "network.class_weights needs classes, but the targets are values; leave it out, or give weights of samples "
            "with data.weights"
        )
    if reading.class_weights != "balanced":
        given = np.array(reading.class_weights, np.float64)
        if len(given) != targets.classes:
            raise UserError(
                f"network.class_weights has {len(given)} weights, but the targets of {targets.stored.path} are "
                f"{targets.classes} classes; expected a weight for each, in the order of the classes"
            )
        return given
    counts = np.zeros(targets.classes, np.int64)
    for _, codes in targets.blocks():
        counts += np.bincount(codes, minlength=targets.classes)
    # n / (k n_c), as scikit-learn's "balanced"; a class without samples has no weight to count
    return np.where(counts > 0, counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0.0)
