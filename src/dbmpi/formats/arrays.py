"""Arrays by name, written one after the other: an archive of NumPy, and a file of safetensors."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbmpi.errors import UserError
from dbmpi.formats.whole_file import whole_file

_ALIGNMENT = 64
"""Bytes: the arrays behind a header begin at a multiple, so that they can be mapped into memory."""
_TYPES = {
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
"""Names of types in safetensors."""


class ExportedArray(NamedTuple):
    """An array that is to be written."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """Returns it, C-contiguous."""


def write_npz(path: Path, arrays: Mapping[str, ExportedArray]) -> None:
    """Write an archive that ``numpy.load`` opens.

    Parameters
    ----------
    path
        The file.
    arrays
        By their names in the archive; only one is in memory at a time.
    """
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            # With a fixed date, so that equal arrays make equal files.
            member = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=True) as out:
                np.lib.format.write_array(out, array.read(), allow_pickle=False)


def write_safetensors(path: Path, arrays: Mapping[str, ExportedArray], facts: Mapping[str, str]) -> None:
    """Write a file of safetensors: the length of a header, the header as JSON, and the arrays.

    The format is described at https://huggingface.co/docs/safetensors.

    Parameters
    ----------
    path
        The file.
    arrays
        By their names in the file; only one is in memory at a time.
    facts
        Texts by name, kept in the header.

    Raises
    ------
    UserError
        If the format has no name for the type of an array.
    """
    header: dict[str, object] = {"__metadata__": dict(facts)}
    # Those with the widest elements first, so that each begins at a multiple of its elements' size.
    in_order = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))
    begin = 0
    for name, (dtype, shape, _) in in_order.items():
        if dtype.name not in _TYPES:
            raise UserError(f"{path}: {name!r} is an array of {dtype}, which safetensors has not; export as .npz")
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for dtype, _, read in in_order.values():
            file.write(read().reshape(-1).astype(dtype.newbyteorder("<"), copy=False).data)
