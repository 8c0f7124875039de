"""What a data file says of its samples in attributes and small datasets, read without trust."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint.untrusted import LARGEST_TEXT
from dbmpi.data import hdf5

INPUT_NAMES, TARGET_NAMES = "input_names", "target_names"
"""Datasets beside `inputs` and `targets`."""
_ELEMENTS = {"f": "floats", "i": "integers", "u": "integers"}
MOST = 1 << 16
"""Names or numbers of one kind; what declares more is not looked at."""


def declared(path: Path, file: h5py.File, inputs: h5py.Dataset, targets: h5py.Dataset | None) -> dict[str, Any]:
    """Return fields of :class:`dbmpi.checkpoint.meaning.Meaning` by name; what the file does not say is missing.

    Names count where there is one for each input, or value.

    Raises
    ------
    UserError
        If the file is damaged.
    """
    with hdf5.damage(path, "what it says of its samples"):
        found: dict[str, Any] = {
            "elements": "bytes" if _bytes(inputs) else _ELEMENTS.get(inputs.dtype.kind, "numbers"),
            "axes": _axes(inputs),
            "mean": _numbers(file, "mean"),
            "deviation": _numbers(file, "deviation"),
            "input_names": _names(file, INPUT_NAMES, int(np.prod(inputs.shape[1:], dtype=np.int64))),
        }
        digest = _small(file, "digest")
        if isinstance(digest, str | bytes):
            found["content"] = _text(digest)
        if targets is not None and targets.ndim > 1:
            found["target_names"] = _names(file, TARGET_NAMES, targets.shape[1])
    return {name: value for name, value in found.items() if value}


def _bytes(inputs: h5py.Dataset) -> bool:
    """Whether the inputs are bytes with one scale for all files; where they are packed, each file has its own."""
    return inputs.dtype == np.uint8 and not {"scale_factor", "add_offset"} & set(inputs.attrs)


def _numbers(file: h5py.File, name: str) -> tuple[float, ...]:
    values = np.asarray(_small(file, name, ()))
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        return ()
    return tuple(float(value) for value in values.reshape(-1))


def _axes(inputs: h5py.Dataset) -> tuple[str, ...]:
    """Return the names of a sample's axes, if all of them have one."""
    names = np.asarray(_small(inputs, "DIMENSION_LABELS", ()))
    if names.shape != (inputs.ndim,) or names.dtype.kind not in "OSU":
        return ()
    axes = tuple(map(_text, names[1:]))
    return axes if all(axes) else ()


def _names(file: h5py.File, name: str, count: int) -> tuple[str, ...]:
    if count > MOST or name not in file or not isinstance(file.get(name, getlink=True), h5py.HardLink):
        return ()
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape != (count,) or dataset.dtype.kind != "S":
        return ()
    if dataset.dtype.itemsize * count > min(dataset.id.get_storage_size(), LARGEST_TEXT):
        return ()
    return tuple(map(_text, dataset[()]))


def _small(place: Any, name: str, default: Any = None) -> Any:
    """Return an attribute that is not too large."""
    if name not in place.attrs:
        return default
    kept = place.attrs.get_id(name)
    if kept.shape is None or np.prod(kept.shape, dtype=np.float64) > MOST:
        return default
    return place.attrs[name]


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) if value else ""
