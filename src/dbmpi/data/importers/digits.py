"""The 1,797 handwritten digits that come with scikit-learn, split into a training and a test file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dbmpi.data.importers.reading import Progress, no_progress
from dbmpi.data.writer import DataWriter, Origin, Shape, Written, check_writable
from dbmpi.errors import UserError

NAME = "scikit-learn digits"
TEST_FRACTION = 0.2
LARGEST_PIXEL = 16.0


def import_digits(out: Path, *, force: bool = False, progress: Progress = no_progress) -> list[Written]:
    """Write ``digits-train.h5`` and ``digits-test.h5`` into `out`, a directory: float32 images of 8 x 8 in 0 ... 1.

    A fifth of each class is held out, the same samples every time.

    Raises
    ------
    UserError
        If scikit-learn is missing or the files cannot be written.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn, which is not installed; pip install scikit-learn") from None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made a directory: {error}") from None
    paths = {half: out / f"digits-{half}.h5" for half in ("train", "test")}
    for path in paths.values():
        check_writable(path, force)
    digits = load_digits()
    images = (digits.images / LARGEST_PIXEL).astype(np.float32)
    labels = digits.target.astype(np.int64)
    held_out = _held_out(labels)
    written = []
    for half, rows in (("train", ~held_out), ("test", held_out)):
        with DataWriter(paths[half], Shape((8, 8), classes=10), Origin("digits", NAME, NAME), force) as writer:
            writer.append(images[rows], labels[rows])
        assert writer.written is not None
        written.append(writer.written)
        progress(len(written), 2)
    return written


def _held_out(labels: np.ndarray) -> np.ndarray:
    """Return which samples are held out: the same fraction of every class, drawn with a fixed key."""
    bits = np.random.Philox(key=0).random_raw(len(labels))
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held_out[members[np.argsort(bits[members])][: round(TEST_FRACTION * len(members))]] = True
    return held_out
