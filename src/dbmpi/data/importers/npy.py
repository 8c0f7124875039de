"""NumPy's NPY files: an array of inputs and one of targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dbmpi.data.hdf5 import BYTE_SCALE
from dbmpi.data.importers.reading import Progress, no_progress
from dbmpi.data.numpy_files import MappedRows, mapped
from dbmpi.data.writer import DataWriter, Origin, Shape, Written, check_writable
from dbmpi.errors import UserError


def import_npy(
    inputs: Path,
    targets: Path,
    out: Path,
    *,
    classes: int | None = None,
    scale: float = BYTE_SCALE,
    force: bool = False,
    progress: Progress = no_progress,
) -> Written:
    """Write a data file from two arrays whose first axis is the sample.

    Parameters
    ----------
    inputs
        NPY file ``(samples, features ...)``; all numbers but bytes become float32.
    targets
        NPY file.  Integers and booleans ``(samples,)`` or ``(samples, 1)`` are classes; all others are values.
    out
        Data file to write.
    classes
        Number of classes; by default the largest label plus one.
    scale
        Factor on inputs that are bytes, which stay bytes, when they are used.
    force
        Replace an existing file.
    progress
        Called with the number of samples written so far, and of all.

    Raises
    ------
    UserError
        If a file is not NPY, torn, holds Python objects, or the two do not belong together.
    """
    check_writable(out, force, (inputs, targets))
    rows, answers = _numbers(inputs), _numbers(targets)
    if rows.ndim < 2:
        raise UserError(f"{inputs}: has shape {rows.shape}; expected (samples, features ...)")
    if answers.ndim == 1 and answers.dtype.kind == "f":
        answers = answers.reshaped(len(answers), 1)
    elif answers.ndim == 2 and answers.shape[1] == 1 and answers.dtype.kind in "iub":
        answers = answers.reshaped(len(answers))
    size = int(answers.shape[1]) if answers.ndim == 2 else None
    if answers.ndim not in (1, 2) or size == 0:
        raise UserError(
            f"{targets}: is {answers.dtype} of shape {answers.shape}; expected (samples,) integers for classes, or "
            f"(samples, outputs) floating numbers for values"
        )
    if len(rows) != len(answers):
        raise UserError(f"{inputs}: has {len(rows)} samples, but {targets} {len(answers)}")
    if size is not None and classes is not None:
        raise UserError(f"{targets}: holds {answers.dtype} values; the number of classes goes with whole numbers only")
    shape = Shape(rows.shape[1:], classes, size, scale if rows.dtype == np.uint8 else None)
    with DataWriter(out, shape, Origin("npy", inputs, targets), force) as writer:
        for start in range(0, len(rows), writer.block_rows):
            stop = min(start + writer.block_rows, len(rows))
            block = rows[start:stop]
            if block.dtype.kind in "bi" or block.dtype in (np.uint16, np.uint32, np.uint64, np.float16):
                block = block.astype(np.float32)
            targets_of_block = answers[start:stop]
            if size is not None or targets_of_block.dtype == np.bool_:
                targets_of_block = targets_of_block.astype(np.int8 if size is None else np.float64)
            writer.append(block, targets_of_block)
            progress(stop, len(rows))
    return writer.written


def _numbers(path: Path) -> MappedRows:
    array = mapped(path)
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path}: holds {array.dtype}; expected numbers")
    return array
