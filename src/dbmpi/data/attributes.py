"""What a data file says of its samples in attributes and small datasets, read without trust."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint.untrusted import LARGEST_TEXT, MOST, attribute, damage, lies_inside
from dbmpi.data.hdf5 import Dataset, decoded
from dbmpi.data.joined import EndToEnd

INPUT_NAMES, TARGET_NAMES = "input_names", "target_names"
"""Datasets beside `inputs` and `targets`."""
_SAME = ("axes", "mean", "deviation", "input_names", "target_names")
"""What all files of a run must say alike."""
_ELEMENTS = {"f": "floats", "i": "integers", "u": "integers"}


def declared(called: str, inputs: Dataset, targets: Dataset | None) -> dict[str, Any]:
    """Return fields of :class:`dbmpi.checkpoint.meaning.Meaning` by name; what the files do not say is missing.

    Names count where there is one for each input, or value.

    Parameters
    ----------
    called
        What messages call the data.
    inputs, targets
        The datasets.

    Raises
    ------
    UserError
        If a file is damaged, or files say different things.
    """
    if inputs.stored:
        answers = targets.values if targets is not None and targets.stored else None
        return _of_file(Path(inputs.path), inputs.values, answers)
    columns = getattr(inputs, "columns", ())
    if not isinstance(inputs.values, EndToEnd):
        names = {"input_names": columns} if columns else {}
        return {"elements": elements(inputs.values), **names}
    found = [declared(called, part.dataset, None) for part in inputs.values.parts]
    contents = [each.pop("content", "") for each in found]
    for part, each in zip(inputs.values.parts, found, strict=True):
        wrong = [key for key in _SAME if each.get(key) != found[0].get(key)]
        if wrong:
            raise part.error(
                f"says another {wrong[0]!r} than that of {inputs.values.parts[0].path}; expected files of the same "
                "kind: import them alike"
            )
    joined = {**found[0], "elements": elements(inputs.values)}
    if all(contents):
        joined["content"] = f"sha256:{hashlib.sha256(' '.join(contents).encode()).hexdigest()}"
    return joined


def _of_file(path: Path, inputs: h5py.Dataset, targets: h5py.Dataset | None) -> dict[str, Any]:
    """Return what a file says of its datasets."""
    file = inputs.file
    with damage(path, "what it says of its samples"):
        found: dict[str, Any] = {
            "elements": elements(inputs),
            "axes": _axes(inputs),
            "mean": _numbers(file, "mean"),
            "deviation": _numbers(file, "deviation"),
            "input_names": _names(file, INPUT_NAMES, int(np.prod(inputs.shape[1:], dtype=np.int64))),
        }
        digest = _attribute(file, "digest")
        if isinstance(digest, str | bytes):
            found["content"] = decoded(digest)
        if targets is not None and targets.ndim > 1:
            found["target_names"] = _names(file, TARGET_NAMES, targets.shape[1])
    return {name: value for name, value in found.items() if value}


def elements(inputs: Any) -> str:
    """Return what the elements of `inputs` are called, a dataset or an array: ``bytes`` if all files have one scale.

    Where they are packed, each file has its own.
    """
    packed = {"scale_factor", "add_offset"} & set(getattr(inputs, "attrs", ()))
    return "bytes" if inputs.dtype == np.uint8 and not packed else _ELEMENTS.get(inputs.dtype.kind, "numbers")


def _attribute(node: h5py.HLObject, name: str) -> Any:
    """Return an attribute, or None also if it is too large to be a convention that is known here."""
    try:
        return attribute(node, name)
    except ValueError:
        return None


def _numbers(file: h5py.File, name: str) -> tuple[float, ...]:
    value = _attribute(file, name)
    values = np.asarray(() if value is None else value)
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        return ()
    return tuple(float(value) for value in values.reshape(-1))


def _axes(inputs: h5py.Dataset) -> tuple[str, ...]:
    """Return the names of a sample's axes, if all of them have one."""
    names = np.asarray(_attribute(inputs, "DIMENSION_LABELS"))
    if names.shape != (inputs.ndim,) or names.dtype.kind not in "OSU":
        return ()
    axes = tuple(decoded(name or "") for name in names[1:])
    return axes if all(axes) else ()


def _names(file: h5py.File, name: str, count: int) -> tuple[str, ...]:
    dataset = file[name] if count <= MOST and lies_inside(file, name) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.shape != (count,) or dataset.dtype.kind != "S":
        return ()
    if dataset.dtype.itemsize * count > min(dataset.id.get_storage_size(), LARGEST_TEXT):
        return ()
    return tuple(map(decoded, dataset[()]))
