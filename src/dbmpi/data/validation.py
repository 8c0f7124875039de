"""Scans of the values of a data file, a block at a time: finite numbers, and labels that are classes."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from dbmpi.data import hdf5
from dbmpi.errors import UserError


def scan_finite(path: Path, dataset: h5py.Dataset, full: bool) -> None:
    """Raise UserError where samples hold NaN, infinity, or numbers too large for float32.

    With ``full=False`` only the first block is looked at.
    """
    bad, first = 0, -1
    for start, rows in hdf5.blocks(path, dataset):
        wrong = hdf5.not_finite(rows)
        if len(wrong) and bad == 0:
            first = start + int(wrong[0])
        bad += len(wrong)
        if not full:
            break
    if bad:
        raise UserError(
            f"{path}: dataset {hdf5.plain_name(dataset)!r}: sample {first} holds NaN, infinity or a number too large "
            f"for float32; {bad} of {dataset.shape[0]} samples do; expected finite numbers"
        )


def scan_labels(path: Path, targets: h5py.Dataset, classes: int | None, full: bool) -> None:
    """Raise UserError where labels are negative or, with `classes` given, not below it."""
    bad, first, label = 0, -1, 0
    for start, rows in hdf5.blocks(path, targets):
        wrong = np.flatnonzero(rows < 0 if classes is None else (rows < 0) | (rows >= classes))
        if len(wrong) and bad == 0:
            first, label = start + int(wrong[0]), int(rows[wrong[0]])
        bad += len(wrong)
        if not full:
            break
    if bad:
        upper = "" if classes is None else f" to {classes - 1}"
        raise UserError(
            f"{path}: dataset 'targets': label {label} of sample {first} is not a class; {bad} of {targets.shape[0]} "
            f"labels are not; expected whole numbers from 0{upper}"
        )
