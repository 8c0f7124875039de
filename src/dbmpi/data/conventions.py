"""What the numbers of a dataset stand for, by the conventions of the tools that write HDF5.

netCDF and CF: ``value = stored * scale_factor + add_offset``; `_FillValue`, `missing_value` and what lies outside of
`valid_min`, `valid_max` or `valid_range` are no values; `_Unsigned` makes signed integers unsigned ones.  All but the
first are compared with the stored numbers (CF conventions, sections 2.5.1 and 8.1; NetCDF users' guide, appendix A).
PyTables stores truth values as HDF5's bit fields, MATLAB 7.3 the axes of arrays in reversed order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from dbmpi.data.hdf5 import BYTE_SCALE, Dataset

_MATLAB_NUMBERS = {"double", "single", "logical"} | {f"{sign}int{bits}" for sign in "u " for bits in (8, 16, 32, 64)}
_MATLAB_NUMBERS = {name.strip() for name in _MATLAB_NUMBERS}


@dataclass(frozen=True)
class Convention:
    """How stored numbers become values: ``value = stored * scale + offset``, unless they are missing."""

    kind: np.dtype[Any]
    """Type of the stored numbers, in this machine's byte order."""
    scale: float = 1.0
    offset: float = 0.0
    missing: tuple[float, ...] = ()
    """Stored numbers that stand for no value."""
    least: float | None = None
    most: float | None = None
    """Stored numbers outside of these stand for no value."""
    reversed_axes: bool = False
    """Whether the axes lie in the file in the reverse of the order in which the user thinks of them."""
    truth: bool = False
    """Whether the numbers are truth values, 0 and 1."""
    notes: tuple[str, ...] = ()
    """What the user may want to know."""

    @property
    def plain(self) -> bool:
        """Whether stored numbers are values, but for a factor."""
        return self.offset == 0 and not self.missing and self.least is None and self.most is None


def meaning(dataset: Dataset, *, inputs: bool = False, bytes_scale: float = BYTE_SCALE) -> Convention:
    """Return what the numbers of a `dataset` stand for.

    With `inputs`, bytes have the default factor `bytes_scale`, and the attribute `scale` is honoured.

    Raises
    ------
    UserError
        If attributes contradict one another, or are not what the conventions say.
    """
    if not dataset.stored:
        kind = np.dtype(dataset.values.dtype).newbyteorder("=")
        factor = bytes_scale if dataset.byte_scale is None else dataset.byte_scale
        scale = factor if inputs and kind == np.uint8 else 1.0
        return Convention(kind, scale, truth=kind == np.bool_, notes=dataset.notes)
    with dataset.damage():
        bits = dataset.values.id.get_type().get_class() == h5py.h5t.BITFIELD
        kind = dataset.values.dtype.newbyteorder("=")
        matlab = _matlab_class(dataset)
    truth = kind == np.bool_ or bits or matlab == "logical"
    notes: tuple[str, ...] = ()
    if matlab:
        shape = dataset.values.shape
        notes = (
            f"{dataset.name!r} was written by MATLAB: its axes are taken in MATLAB's order, {shape[::-1]}, not in that "
            f"of the file, {shape}",
        )
    if kind.kind not in "iuf" or truth:
        return Convention(kind, truth=truth, reversed_axes=bool(matlab), notes=notes)
    kind = _signedness(dataset, kind)
    scale, offset = _factor(dataset, kind, inputs, bytes_scale)
    least, most = _valid(dataset, kind)
    return Convention(kind, scale, offset, _missing(dataset, kind), least, most, bool(matlab), notes=notes)


def _matlab_class(dataset: Dataset) -> str:
    """Return MATLAB's class of an array of numbers, or "" where MATLAB has not written it."""
    text = dataset.text("MATLAB_class")
    if text and text not in _MATLAB_NUMBERS:
        raise dataset.error(f"is a MATLAB {text[:40]!r}; expected an array of numbers, e.g. double(...)")
    if text and dataset.attribute("MATLAB_empty"):
        raise dataset.error("is an empty array of MATLAB; expected at least one sample and feature")
    return text


def _signedness(dataset: Dataset, kind: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of integers that the attribute `_Unsigned` says they have."""
    text = dataset.text("_Unsigned").lower()
    if not text or kind.kind == "f":
        return kind
    if text not in ("true", "false"):
        raise dataset.wrong("_Unsigned", text, "'true' or 'false'")
    return np.dtype(f"{'u' if text == 'true' else 'i'}{kind.itemsize}")


def _factor(dataset: Dataset, kind: np.dtype[Any], inputs: bool, bytes_scale: float) -> tuple[float, float]:
    """Return scale and offset."""
    packed = [key for key in ("scale_factor", "add_offset") if key in dataset.values.attrs]
    scale, offset = dataset.number("scale_factor", 1.0), dataset.number("add_offset", 0.0)
    if not (math.isfinite(scale) and scale != 0 and math.isfinite(offset)):
        raise dataset.error(
            f"has scale_factor {scale:g} and add_offset {offset:g}; expected finite numbers, the first not 0"
        )
    if inputs and "scale" in dataset.values.attrs:
        if packed:
            raise dataset.error(
                f"has the attributes 'scale' and {packed[0]!r}, which say two different things; remove one of them, "
                f"e.g. with h5py: del file[{dataset.name!r}].attrs['scale']"
            )
        scale = dataset.number("scale", 1.0)
        if not (math.isfinite(scale) and scale > 0):
            raise dataset.wrong("scale", scale, "a number above 0")
    elif inputs and kind == np.uint8 and not packed:
        scale = bytes_scale
    return scale, offset


def _valid(dataset: Dataset, kind: np.dtype[Any]) -> tuple[float | None, float | None]:
    """Return the least and the largest stored number that is a value."""
    both = _numbers(dataset, "valid_range", kind)
    if both and len(both) != 2:
        raise dataset.wrong("valid_range", both, "two numbers")
    least, most = both or (None, None)
    return (_numbers(dataset, "valid_min", kind) or (least,))[0], (_numbers(dataset, "valid_max", kind) or (most,))[0]


def _missing(dataset: Dataset, kind: np.dtype[Any]) -> tuple[float, ...]:
    """Return the stored numbers that mark missing values.

    The fill value of a dataset marks what was never written, also where no attribute says so: netCDF writes just that.
    One of 0 says nothing, and one of single bytes may be any value.
    """
    found = [*_numbers(dataset, "_FillValue", kind), *_numbers(dataset, "missing_value", kind)]
    with dataset.damage():
        properties = dataset.values.id.get_create_plist()
        defined = properties.fill_value_defined() == h5py.h5d.FILL_VALUE_USER_DEFINED
        fill = np.asarray(dataset.values.fillvalue) if defined and kind.itemsize > 1 else np.zeros(1)
    if fill.dtype.kind in "iuf" and fill.size == 1 and fill.any():
        found += _viewed(fill, kind)
    return tuple(dict.fromkeys(found))


def _numbers(dataset: Dataset, key: str, kind: np.dtype[Any]) -> tuple[float, ...]:
    """Return the numbers of an attribute, as numbers of the dataset's `kind` where it has the type of the dataset."""
    value = dataset.attribute(key)
    array = np.asarray(() if value is None else value)
    if array.dtype.kind not in "iuf":
        raise dataset.wrong(key, value, "numbers")
    return _viewed(array, kind)


def _viewed(array: np.ndarray, kind: np.dtype[Any]) -> tuple[float, ...]:
    """Return numbers that stand beside the data: integers as large as those are signed or unsigned as they are."""
    native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).reshape(-1)
    same = native.dtype.kind in "iu" and kind.kind in "iu" and native.itemsize == kind.itemsize
    return tuple((native.view(kind) if same else native).tolist())
