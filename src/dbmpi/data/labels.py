"""Which class a label stands for: what users write into their files, to numbers from 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dbmpi.data.reading import Label

MOST_LABELS = 1 << 16
"""Most classes that are known by labels; a dataset with more different labels holds no classes."""


def numbered(labels: Sequence[int]) -> tuple[int, ...] | None:
    """Return the labels of the classes 0, 1, 2 ... where `labels`, increasing, are no such numbers themselves.

    Numbers from 0 are classes as they are, even where some are missing.  Numbers from 1 or above are numbered, and so
    are -1 and 1; others below 0 are not, for -1 often says that there is no label.

    Raises
    ------
    ValueError
        If some are below 0.
    """
    if labels[0] == 0:
        return None
    if labels[0] > 0 or tuple(labels) == (-1, 1):
        return tuple(labels)
    raise ValueError(f"the label {labels[0]} is below 0")


def some(labels: Sequence[Any]) -> str:
    """Return the first labels as text; blanks and the like as Python writes them."""
    texts = [str(label) for label in labels[:6]]
    return ", ".join(text if text.isprintable() and text.strip() else repr(text) for text in texts) + (
        " ..." if len(labels) > 6 else ""
    )


def note(labels: Sequence[Any]) -> str:
    """Say which labels the classes stand for."""
    return f"the classes 0 ... {len(labels) - 1} stand for the labels {some(labels)}"


class Numbering:
    """From labels to classes, and back.

    Parameters
    ----------
    labels
        In the order of the classes.
    """

    def __init__(self, labels: Iterable[Label]) -> None:
        self.labels = tuple(labels)
        self._codes = {label: code for code, label in enumerate(self.labels)}

    def of(self, labels: Iterable[Label]) -> np.ndarray:
        """Return the class of each of the `labels`, int32; -1 for one that is unknown."""
        return np.array([self._codes.get(label, -1) for label in labels], np.int32)

    def codes(self, labels: np.ndarray) -> np.ndarray:
        """Return what :meth:`of` does of an array of many `labels`, most of them equal to others."""
        distinct, where = np.unique(labels, return_inverse=True)
        return self.of(distinct.tolist())[where.reshape(labels.shape)]
