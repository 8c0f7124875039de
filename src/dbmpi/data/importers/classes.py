"""Classes for the labels of a file, in order, or as another data file has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dbmpi.data.labels import MOST_LABELS, some
from dbmpi.data.reading import Label
from dbmpi.data.writer import DataWriter
from dbmpi.errors import UserError


class Classes:
    """Numbers labels in the order in which they come; :meth:`conclude` brings them in increasing order.

    Parameters
    ----------
    path
        Of the file with the labels, for messages.
    like
        Another file, and its labels in the order of its classes: there are no others then.  None: any are taken.
    most
        Number of classes if it is known.
    hint
        The way out where there are too many labels.
    """

    def __init__(
        self, path: Path, like: tuple[Path, Sequence[Label]] | None = None, most: int | None = None, hint: str = ""
    ) -> None:
        self._path, self._like, self._asked, self._hint = path, like, most, hint
        self._codes: dict[Label, int] = {label: code for code, label in enumerate(like[1])} if like else {}

    def codes(self, labels: Sequence[Label], where: Callable[[int], str]) -> np.ndarray:
        """Return the classes of `labels`, int32; `where` says where in the file one of them is."""
        most = MOST_LABELS if self._asked is None else self._asked
        for row, label in enumerate(labels):
            if label in self._codes:
                continue
            position = f"{self._path}: {where(row)}"
            if self._like is not None:
                raise UserError(
                    f"{position}: the label {label} does not occur in {self._like[0]}; expected {some([*self._codes])}"
                )
            if len(self._codes) == most:
                raise UserError(
                    f"{position}: the label {label!r} is one more than {most} classes; the others are "
                    f"{some([*self._codes])}{self._hint}"
                )
            self._codes[label] = len(self._codes)
        return np.array([self._codes[label] for label in labels], np.int32)

    def conclude(self, writer: DataWriter) -> None:
        """Bring the classes in order in the file of `writer`, and record there for which labels they stand."""
        ordered = [*self._codes] if self._like is not None else sorted(self._codes)
        if self._asked is not None and len(ordered) < self._asked:
            raise UserError(
                f"{self._path}: --classes {self._asked} was given, but there are {len(ordered)} labels: "
                f"{some(ordered)}; leave --classes out, or say --like TRAIN.h5 for a test file"
            )
        codes = np.empty(len(ordered), np.int32)
        for code, label in enumerate(ordered):
            codes[self._codes[label]] = code
        writer.number_labels(ordered, codes)


def whole(path: Path, labels: np.ndarray, where: Callable[[int], str]) -> np.ndarray:
    """Return floating `labels` of the file `path` as int64; UserError, with `where` it is, for one that is no class."""
    wrong = np.flatnonzero((labels != np.rint(labels)) | (np.abs(labels) > 2.0**53))
    if len(wrong):
        raise UserError(
            f"{path}: {where(int(wrong[0]))}: the label {labels[wrong[0]]:g} is not a class; expected a whole "
            "number, or in CSV a text (for values say --values)"
        )
    return labels.astype(np.int64)
