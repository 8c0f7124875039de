"""Arrays by name, written one after the other: an archive of NumPy, and a file of safetensors."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dbmpi.formats.whole_file import whole_file
from dbmpi.index.layout import Tensor

_ALIGNMENT = 64
"""Bytes: the arrays behind a header begin at a multiple, so that they can be mapped into memory."""
_TYPES = {"float32": "F32", "float64": "F64"}
"""Names of types in safetensors."""

Read = Callable[[str], np.ndarray]
"""``read(name)`` returns one array, C-contiguous."""


def write_npz(path: Path, names: Mapping[str, str], read: Read) -> None:
    """Write an archive that ``numpy.load`` opens.

    Parameters
    ----------
    path
        The file.
    names
        For the name of each array in the archive the one that it is read by.
    read
        Called once for each array; only one is in memory at a time.
    """
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, origin in names.items():
            # With a fixed date, so that equal arrays make equal files.
            member = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=True) as out:
                np.lib.format.write_array(out, read(origin), allow_pickle=False)


def write_safetensors(
    path: Path, names: Mapping[str, Tensor], dtype: np.dtype[np.generic], read: Read, facts: Mapping[str, str]
) -> None:
    """Write a file of safetensors: the length of a header, the header as JSON, and the arrays.

    The format is described at https://huggingface.co/docs/safetensors.

    Parameters
    ----------
    path
        The file.
    names
        For the name of each array in the file the tensor that it holds.
    dtype
        float32 or float64: of all arrays.
    read
        Called once for each tensor's name; only one array is in memory at a time.
    facts
        Texts by name, kept in the header.
    """
    header: dict[str, object] = {"__metadata__": dict(facts)}
    begin = 0
    for name, tensor in names.items():
        end = begin + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype.name], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in names.values():
            file.write(read(tensor.name).astype(dtype.newbyteorder("<"), copy=False).data)
