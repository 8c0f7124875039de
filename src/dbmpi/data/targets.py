"""What a network is to answer: classes or values, from a dataset as users and tools write it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint.untrusted import LARGEST_TEXT
from dbmpi.data import hdf5
from dbmpi.data import labels as data_labels
from dbmpi.data.hdf5 import Dataset, decoded
from dbmpi.data.labels import MOST_LABELS, Numbering
from dbmpi.data.reading import Label, Reading
from dbmpi.data.rows import Stored

_EXPECTED = (
    "integers (samples,) or text for classes, or numbers (samples, outputs) for values, or for the loss 'softmax' "
    "one-hot rows"
)


class Targets:
    """The dataset of the targets, with what its rows stand for.

    Parameters
    ----------
    stored
        The dataset.
    reading
        What the loss wants, and labels that are known.
    samples
        How many there must be.

    Raises
    ------
    UserError
        If it cannot be taken for classes or values.
    """

    classes: int | None = None
    """Number of classes; None for values."""
    size: int | None = None
    """Number of values of a sample; None for classes."""
    labels: tuple[Label, ...] | None = None
    """Label of each class, where they are not just their numbers."""
    note: str = ""
    """What was taken for what, where that is not plain."""

    def __init__(self, stored: Stored, reading: Reading, samples: int) -> None:
        self.stored, self._reading = stored, reading
        self._numbering: Numbering | None = None
        self._one_hot = False
        enumeration = {} if stored.kind == np.bool_ else h5py.check_enum_dtype(stored.dtype) or {}
        self._names = {value: name for name, value in sorted(enumeration.items(), key=lambda item: item[1])}
        """Of the values of an enumeration, which are taken for labels."""
        self._text = h5py.check_string_dtype(stored.dtype) is not None or stored.kind.kind == "U"
        self._shaped(samples)
        given = _given_classes(stored.dataset)
        written = _labels(stored.dataset, given)
        if self.size is not None:
            return
        if self._one_hot:
            self.classes = stored.shape[1]
            self.note = f"{stored.name!r} holds one-hot rows: they are taken for {self.classes} classes"
        elif self._text:
            self._number([*self._distinct()])
        elif self._names:
            self._number([*self._names.values()])
        elif given is not None:
            self.classes, self.labels = given, written
        else:
            self._count()
        self._check_size_of_labels()

    def reopened(self, fresh: Mapping[tuple[str, str], Dataset]) -> Targets:
        """Return the same of files that were opened again, whose datasets are the `fresh` ones."""
        again = copy.copy(self)
        again.stored = self.stored.reopened(fresh)
        return again

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one decoded target."""
        return () if self.size is None else (self.size,)

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of one target for an objective of the user's own."""
        return self.stored.shape[1:] or self.row_shape

    @property
    def kept(self) -> np.dtype[Any]:
        """Type of decoded targets."""
        return np.dtype(np.int32) if self.size is None else self.stored.kept

    def decoded(self, rows: np.ndarray) -> np.ndarray:
        """Return classes, int32 ``(samples,)``, or values, float32 ``(samples, size)``, of stored rows.

        Values that are whole numbers stay what they are for an objective of the user's own.

        Raises
        ------
        UserError
            If a row is no class: kernels use classes as an index without looking.
        """
        if self.size is not None:
            values = self.stored.decoded(rows).reshape(len(rows), -1)
            if self.stored.as_stored and self._reading.own:
                return values
            return values.astype(np.float32, copy=False) * np.float32(self.stored.factor)
        codes, wrong = self._codes(rows)
        if len(wrong):
            self.scan(full=True)
            raise self.stored.error(f"holds labels outside 0 ... {self.classes}")
        return codes

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(first sample, decoded rows)`` over all samples."""
        for start, rows in self.stored.blocks():
            yield start, self.decoded(rows)

    def scan(self, full: bool) -> None:
        """Raise UserError where a target is missing, no class, or not finite; without `full`, in the first block."""
        if self.size is not None:
            self.stored.scan(full)
            if self._reading.wanted == "probabilities":
                self._scan_probabilities(full)
            return
        bad, first, row = self.stored.count(lambda rows: self._codes(rows)[1], full)
        if bad:
            if self._one_hot:
                expected = "one 1 and otherwise 0; for several labels a sample use the loss 'logistic'"
            elif self.labels is not None and self._numbering is not None:
                expected = f"one of the labels {data_labels.some(self.labels)}"
            else:
                expected = f"whole numbers from 0 to {self.classes and self.classes - 1}"
            raise self.stored.error(
                f": label {_shown(row)} of sample {first} is not a class; {bad} of {self.stored.samples} labels are "
                f"not; expected {expected}"
            )

    def _scan_probabilities(self, full: bool) -> None:
        def wrong(rows: np.ndarray) -> np.ndarray:
            values = self.decoded(rows)
            return np.flatnonzero(((values < 0) | (values > 1)).any(axis=1))

        bad, first, row = self.stored.count(wrong, full)
        if bad:
            values = _shown(self.decoded(np.asarray(row)[None])[0])
            raise self.stored.error(
                f": sample {first} holds {values}, but the loss 'logistic' takes values between 0 and 1; for classes "
                "store integers (samples,), and for other values use the loss 'squared'"
            )

    # What the dataset is

    def _shaped(self, samples: int) -> None:
        """Tell classes and values apart by type and shape."""
        stored = self.stored
        stored.as_column(samples)
        kind, shape = stored.kind, stored.shape
        numbers, column = kind.kind in "iufb", len(shape) == 1 or shape[1:] == (1,)
        axes = len(shape) if self._reading.own else 2
        if not (numbers or self._text) or not 1 <= len(shape) <= axes or (self._text and not column):
            raise stored.error(f"is {stored.dtype} of shape {shape}; expected {_EXPECTED}")
        if 0 in shape[1:]:
            raise stored.error(f"has shape {shape}; expected at least one value a sample")
        classes = self._reading.wanted == "classes"
        if column and (kind.kind in "iub" or self._text or (classes and kind.kind == "f")):
            return
        if classes and not column:
            # Where the first rows are none, they are values, which the loss then refuses.
            _, rows = next(stored.blocks(), (0, np.zeros((0, shape[1]))))
            self._one_hot = not len(_not_one_hot(rows))
        if not self._one_hot:
            self.size = math.prod(shape[1:])

    def _check_size_of_labels(self) -> None:
        """Raise UserError where the labels are more than a checkpoint can hold: texts, each as long as the longest."""
        labels = self.labels or ()
        longest = max((len(label.encode()) for label in labels if isinstance(label, str)), default=0)
        if len(labels) * longest > LARGEST_TEXT:
            raise self.stored.error(
                f"has {len(labels)} labels of up to {longest} bytes; expected at most {LARGEST_TEXT >> 20} MiB, were "
                "all as long; shorten them, or number the classes from 0"
            )

    def _number(self, labels: list[Any]) -> None:
        """Give the classes the order of their labels, or that of another file."""
        given = self._reading.labels
        self._numbering = Numbering(labels if given is None else given)
        self.labels, self.classes = self._numbering.labels, len(self._numbering.labels)
        self.note = f"{self.stored.name!r}: {data_labels.note(self.labels)}"

    def _count(self) -> None:
        """Count the classes of integers that no attribute says anything of."""
        if self.stored.meaning.truth:
            self.classes = 2
            return
        least, most = self._extremes()
        named = _labels(self.stored.dataset, None)
        if named is not None and least >= 0 and most < len(named):
            self.classes, self.labels = len(named), named
            return
        given = self._reading.labels
        # Numbers are no texts: where those were learned, they number the classes.
        if given is not None and not isinstance(given[0], str) and given != tuple(range(len(given))):
            self._number([])
            return
        if most > hdf5.LARGEST_LABEL:
            raise self.stored.error(f"holds the label {most}; expected labels from 0 to the number of classes - 1")
        labels = None
        if given is None and least != 0:
            with suppress(ValueError):  # the scan will name the label
                labels = data_labels.numbered([*self._distinct()])
        if labels is None:
            self.classes = max(most + 1, 1)
        else:
            self._number(list(labels))

    def _extremes(self) -> tuple[int, int]:
        least, most = [], []
        for start, rows in self.stored.blocks():
            whole = self._whole(start, rows)
            least.append(int(whole.min()))
            most.append(int(whole.max()))
        return min(least), max(most)

    def _distinct(self) -> list[Any]:
        """Return all labels that occur, in order."""
        found: set[Any] = set()
        for start, rows in self.stored.blocks():
            found.update(self._words(start, rows)[0] if self._text else np.unique(self._whole(start, rows)).tolist())
            if len(found) > MOST_LABELS:
                raise self.stored.error(
                    f"holds more than {MOST_LABELS} different labels; expected classes; number them from 0, or store "
                    "floating numbers (samples, outputs) for values"
                )
        return sorted(found)

    # What rows stand for

    def _codes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the classes of stored rows, and the positions of those that are none."""
        if self._one_hot:
            return rows.argmax(axis=1).astype(np.int32), _not_one_hot(rows)
        labels = rows.reshape(-1)
        if self._numbering is not None:
            if self._text or self._names:
                words, where = self._words(0, rows)
                codes = self._numbering.of(words)[where]
            else:
                codes = self._numbering.codes(labels)
            return codes, np.flatnonzero(codes < 0)
        wrong = (labels < 0) | (labels >= self.classes) | (labels != np.rint(labels) if labels.dtype.kind == "f" else 0)
        return labels.astype(np.int32), np.flatnonzero(wrong)

    def _whole(self, start: int, rows: np.ndarray) -> np.ndarray:
        """Return labels that are numbers as integers."""
        flat, stored = rows.reshape(-1), self.stored
        absent = stored.missing(flat)
        if absent is not None and absent.any():
            row = int(np.flatnonzero(absent)[0])
            raise stored.error(
                f": the label of sample {start + row} is missing: it is {flat[row]}, which marks gaps; leave such "
                "samples out"
            )
        if flat.dtype.kind != "f":
            return flat
        with np.errstate(invalid="ignore"):
            wrong = np.flatnonzero(~((flat == np.rint(flat)) & (np.abs(flat) < 2.0**53)))
        if len(wrong):
            raise stored.error(
                f": label {flat[wrong[0]]} of sample {start + int(wrong[0])} is not a class; expected whole numbers; "
                "for values use the loss 'squared', or 'logistic' for values between 0 and 1"
            )
        return flat.astype(np.int64)

    def _words(self, start: int, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Return distinct labels that are names, or text, without spaces around them; and which one each row has."""
        distinct, where = np.unique(rows.reshape(-1), return_inverse=True)
        if self._names:
            return [self._names.get(value, f"\0{value}") for value in distinct.tolist()], where
        words = [decoded(word).strip("\0 \t\r\n") for word in distinct.tolist()]
        if "" in words:
            row = int(np.flatnonzero(where == words.index(""))[0])
            raise self.stored.error(f": sample {start + row} has an empty label; leave such samples out")
        return words, where


def _not_one_hot(rows: np.ndarray) -> np.ndarray:
    """Return the positions of the rows that are anything but one 1 and otherwise 0."""
    return np.flatnonzero(((rows == 1).sum(axis=1) != 1) | ((rows != 0).sum(axis=1) != 1))


def _given_classes(dataset: Dataset) -> int | None:
    """Return the attribute `classes`."""
    if dataset.attribute("classes") is None:
        return None
    classes = dataset.number("classes", 0)
    if not (classes == int(classes) and 1 <= classes <= hdf5.LARGEST_LABEL + 1):
        raise dataset.wrong("classes", classes, "a whole number above 0")
    return int(classes)


def _labels(dataset: Dataset, classes: int | None) -> tuple[Label, ...] | None:
    """Return the attribute `labels`, or None where it is not one label for each class, of however many."""
    value = dataset.attribute("labels")
    array = np.asarray(value)
    if value is None or array.ndim != 1 or len(array) != (classes or len(array) or -1):
        return None
    labels: tuple[Label, ...] = ()
    if array.dtype.kind in "iu" and int(array.max()) < 2**63:
        labels = tuple(array.tolist())
    elif array.dtype.kind in "OSU":
        labels = tuple(map(decoded, array.tolist()))
    return labels if len(set(labels)) == len(array) else None


def _shown(row: Any) -> str:
    text = row.tolist() if isinstance(row, np.ndarray | np.generic) else row
    if isinstance(text, list) and len(text) == 1:
        text = text[0]
    return repr(text.decode("utf-8", "replace")) if isinstance(text, bytes) else str(text)[:60]
