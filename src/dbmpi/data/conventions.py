"""What the numbers of a dataset stand for, by the conventions of the tools that write HDF5.

netCDF and CF: ``value = stored * scale_factor + add_offset``; `_FillValue`, `missing_value` and what lies outside of
`valid_min`, `valid_max` or `valid_range` are no values; `_Unsigned` says that signed integers are to be read as
unsigned ones.  All but the first are compared with the stored numbers (CF conventions, sections 2.5.1 and 8.1; NetCDF
users' guide, appendix A).  PyTables stores truth values as HDF5's bit fields, MATLAB 7.3 the axes of arrays in reversed
order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi.data.hdf5 import BYTE_SCALE, attribute, damage, number
from dbmpi.errors import UserError

_MATLAB_NUMBERS = {"double", "single", "logical"} | {f"{sign}int{bits}" for sign in "u " for bits in (8, 16, 32, 64)}
_MATLAB_NUMBERS = {name.strip() for name in _MATLAB_NUMBERS}


@dataclass(frozen=True)
class Convention:
    """How stored numbers become values: ``value = stored * scale + offset``, unless they are missing."""

    kind: np.dtype[Any]
    """Type as which the stored numbers are to be taken, in this machine's byte order."""
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


def meaning(path: Path, name: str, dataset: h5py.Dataset, *, inputs: bool = False) -> Convention:
    """Return what the numbers of a dataset stand for.

    Parameters
    ----------
    name
        Of the dataset, for messages.
    inputs
        Whether bytes have the default factor 1/255, and the attribute `scale` is honoured.

    Raises
    ------
    UserError
        If attributes contradict one another, or are not what the conventions say.
    """
    with damage(path, f"dataset {name!r}"):
        bits = dataset.id.get_type().get_class() == h5py.h5t.BITFIELD
        kind = dataset.dtype.newbyteorder("=")
        matlab = _matlab_class(path, name, dataset)
    truth = kind == np.bool_ or bits or matlab == "logical"
    notes = []
    if matlab:
        notes.append(
            f"{name!r} was written by MATLAB: its axes are taken in MATLAB's order, {dataset.shape[::-1]}, not in that "
            f"of the file, {dataset.shape}"
        )
    if kind.kind not in "iuf" or truth:
        return Convention(kind, truth=truth, reversed_axes=bool(matlab), notes=tuple(notes))
    kind = _signedness(path, name, dataset, kind)
    scale, offset = _factor(path, name, dataset, kind, inputs)
    least, most = _valid(path, name, dataset, kind)
    missing = _missing(path, name, dataset, kind)
    return Convention(kind, scale, offset, missing, least, most, bool(matlab), notes=tuple(notes))


def _matlab_class(path: Path, name: str, dataset: h5py.Dataset) -> str:
    """Return MATLAB's class of an array of numbers, or "" where MATLAB has not written it."""
    found = attribute(path, dataset, "MATLAB_class")
    if found is None:
        return ""
    text = found.decode("ascii", "replace") if isinstance(found, bytes) else str(found)
    if text not in _MATLAB_NUMBERS:
        raise UserError(f"{path}: {name!r} is a MATLAB {text[:40]!r}; expected an array of numbers, e.g. double(...)")
    if attribute(path, dataset, "MATLAB_empty"):
        raise UserError(f"{path}: {name!r} is an empty array of MATLAB; expected at least one sample and feature")
    return text


def _signedness(path: Path, name: str, dataset: h5py.Dataset, kind: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of integers that the attribute `_Unsigned` says they have."""
    found = attribute(path, dataset, "_Unsigned")
    if found is None or kind.kind == "f":
        return kind
    text = found.decode("ascii", "replace") if isinstance(found, bytes) else str(found)
    if text.lower() not in ("true", "false"):
        raise UserError(f"{path}: attribute '_Unsigned' of {name!r} is {text[:40]!r}; expected 'true' or 'false'")
    return np.dtype(f"{'u' if text.lower() == 'true' else 'i'}{kind.itemsize}")


def _factor(path: Path, name: str, dataset: h5py.Dataset, kind: np.dtype[Any], inputs: bool) -> tuple[float, float]:
    """Return scale and offset."""
    packed = [key for key in ("scale_factor", "add_offset") if key in dataset.attrs]
    scale, offset = number(path, dataset, "scale_factor", 1.0), number(path, dataset, "add_offset", 0.0)
    if not (math.isfinite(scale) and scale != 0 and math.isfinite(offset)):
        raise UserError(
            f"{path}: {name!r} has scale_factor {scale:g} and add_offset {offset:g}; expected finite numbers, the "
            f"first not 0"
        )
    if not inputs:
        return scale, offset
    if "scale" in dataset.attrs:
        if packed:
            raise UserError(
                f"{path}: {name!r} has the attributes 'scale' and {packed[0]!r}, which say two different things; "
                f"remove one of them, e.g. with h5py: del file[{name!r}].attrs['scale']"
            )
        scale = number(path, dataset, "scale", 1.0)
        if not (math.isfinite(scale) and scale > 0):
            raise UserError(f"{path}: attribute 'scale' of {name!r} is {scale}; expected a number above 0")
    elif kind == np.uint8 and not packed:
        scale = BYTE_SCALE
    return scale, offset


def _valid(path: Path, name: str, dataset: h5py.Dataset, kind: np.dtype[Any]) -> tuple[float | None, float | None]:
    """Return the least and the largest stored number that is a value."""
    both = _numbers(path, name, dataset, "valid_range", kind)
    if both and len(both) != 2:
        raise UserError(f"{path}: attribute 'valid_range' of {name!r} is {both}; expected two numbers")
    bounds: list[float | None] = list(both) or [None, None]
    for place, key in enumerate(("valid_min", "valid_max")):
        found = _numbers(path, name, dataset, key, kind)
        if found:
            bounds[place] = found[0]
    return bounds[0], bounds[1]


def _missing(path: Path, name: str, dataset: h5py.Dataset, kind: np.dtype[Any]) -> tuple[float, ...]:
    """Return the stored numbers that mark what is missing.

    The fill value of a dataset marks what was never written, also where no attribute says so: netCDF writes just that.
    One of 0 says nothing, and one of single bytes may be any value.
    """
    found = [
        *_numbers(path, name, dataset, "_FillValue", kind),
        *_numbers(path, name, dataset, "missing_value", kind),
    ]
    with damage(path, f"dataset {name!r}"):
        defined = dataset.id.get_create_plist().fill_value_defined() == h5py.h5d.FILL_VALUE_USER_DEFINED
        fill = np.asarray(dataset.fillvalue) if defined and kind.itemsize > 1 else np.zeros(1)
    if fill.dtype.kind in "iuf" and fill.size == 1 and fill.any():
        found.append(fill.reshape(()).astype(fill.dtype.newbyteorder("=")).view(_viewed(fill.dtype, kind)).item())
    return tuple(dict.fromkeys(found))


def _numbers(path: Path, name: str, dataset: h5py.Dataset, key: str, kind: np.dtype[Any]) -> tuple[float, ...]:
    """Return the numbers of an attribute, as numbers of the dataset's `kind` where it has the type of the dataset."""
    value = attribute(path, dataset, key)
    if value is None:
        return ()
    array = np.atleast_1d(np.asarray(value))
    if array.dtype.kind not in "iuf":
        raise UserError(f"{path}: attribute {key!r} of {name!r} is {str(value)[:40]!r}; expected numbers")
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
    return tuple(array.reshape(-1).view(_viewed(array.dtype, kind)).tolist())


def _viewed(found: np.dtype[Any], kind: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type as which a number beside the data is to be taken: signed or unsigned as they are."""
    same = found.kind in "iu" and kind.kind in "iu" and found.itemsize == kind.itemsize
    return kind if same else found.newbyteorder("=")
