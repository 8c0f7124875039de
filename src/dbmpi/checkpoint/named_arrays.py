"""First values of parameters by name: from ``.npz`` and ``.safetensors`` files, other checkpoints, and dictionaries.

Nothing here unpickles or runs anything.  Names and shapes are read first and compared with the model's; what does not
fit is not read, so that a file takes no more memory than the model's largest array.  Files of safetensors are read
here, because that is short (a length, a header of JSON, raw bytes) and lets a shard read just its part.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbmpi.checkpoint.checksums import read_at
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.schema import PARAMETERS
from dbmpi.errors import UserError
from dbmpi.index.layout import Layout

_LONGEST_HEADER = 1 << 22
"""Bytes of a header of safetensors: enough for some ten thousand arrays, and little as Python's objects."""
_MOST_AXES = 32
_SHOWN = 40
"""Mistakes in one message."""
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Of safetensors, as NumPy calls them; bfloat16 is the upper half of a float32."""
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy")
_READING = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What a damaged file may raise, MemoryError apart."""

Fill = Callable[[int, np.ndarray], None]
"""``fill(start, out)`` writes the values at positions ``start ... start + len(out)`` of the whole vector."""


class StoredValues(NamedTuple):
    """An array that can be read in parts."""

    shape: tuple[int, ...]
    kind: str
    """What its elements are, for messages; floating-point numbers are ``float...``."""
    read: Callable[[int, int], np.ndarray]
    """``read(first, last)`` returns these elements, in C order."""


@contextmanager
def opened(path: Path) -> Iterator[dict[str, StoredValues]]:
    """Open a file of named arrays for the block, and give them.

    Parameters
    ----------
    path
        An ``.npz`` or ``.safetensors`` file, a checkpoint, or the directory of a run (its newest checkpoint).

    Raises
    ------
    UserError
        If there is no such file, or it is none of these, or damaged.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; expected first values: .npz, .safetensors, a checkpoint or a run")
    if path.suffix in _PICKLED:
        raise UserError(
            f"{path}: files like this may contain code and are not read; save the arrays by name, with "
            "numpy.savez or safetensors"
        )
    if path.suffix not in (".npz", ".safetensors"):
        with Checkpoint.open(path) as checkpoint:
            yield {
                tensor.name: StoredValues(tensor.shape, "float", _of_checkpoint(checkpoint, tensor.name))
                for tensor in checkpoint.layout.tensors
            }
        return
    with ExitStack() as stack:
        with _damage(path):
            file = stack.enter_context(path.open("rb"))
            if path.suffix == ".npz":
                found = _of_npz(stack.enter_context(zipfile.ZipFile(file)))
            else:
                found = _of_safetensors(file.fileno(), path.stat().st_size)
        yield found


def given(arrays: Mapping[str, Any], what: str, before: str = "") -> dict[str, StoredValues]:
    """Return the arrays of a dictionary, by their names; dictionaries within it are named as in ``outer/inner``.

    Parameters
    ----------
    arrays
        NumPy arrays, or what can be made into one.
    what
        What the dictionary is called in messages.
    before
        The beginning of the names.
    """
    found: dict[str, StoredValues] = {}
    for name, value in arrays.items():
        if not isinstance(name, str):
            raise UserError(f"{what}: {name!r:.60} is no name; expected a dictionary of arrays by name")
        if isinstance(value, Mapping):
            found |= given(value, what, f"{before}{name}/")
            continue
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise UserError(f"{what}: {before + name!r} is a {type(value).__name__}; expected an array of numbers")
        found[before + name] = StoredValues(array.shape, array.dtype.name, _of_array(array))
    return found


def match(
    layout: Layout, stored: Mapping[str, StoredValues], source: str, *, partly: bool = False
) -> dict[str, StoredValues]:
    """Return the arrays by the names of a layout's tensors, after comparing all names and shapes.

    Another spelling, ``a.b`` for ``a/b``, or as in PyTorch ``a.weight`` for ``a/weights``, is the same name.

    Parameters
    ----------
    layout
        The model's.
    stored
        The arrays by their own names.
    source
        Where they are from, for messages.
    partly
        Whether either side may have names that the other one lacks.

    Raises
    ------
    UserError
        With all that does not fit.
    """
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    spelled: dict[str, list[str]] = {}
    for name in tensors:
        dotted = name.replace("/", ".")
        for spelling in {dotted, re.sub(r"\.weights$", ".weight", dotted)}:
            spelled.setdefault(spelling, []).append(name)
    found: dict[str, StoredValues] = {}
    seen, mistakes = set(), []
    for name, values in stored.items():
        others = spelled.get(name.replace("/", "."), [])
        key = name if name in tensors else others[0] if len(others) == 1 else None
        if key is None:
            if not partly:
                mistakes.append(f"{name!r} is no parameter")
            continue
        seen.add(key)
        if key in found:
            mistakes.append(f"{name!r} is there twice, in two spellings")
        elif (values.shape or (1,)) != tensors[key].shape:
            mistakes.append(f"{name!r} has shape {values.shape}, the parameter {tensors[key].shape}")
        elif not values.kind.startswith("float"):
            mistakes.append(f"{name!r} is {values.kind}, expected floating-point numbers")
        else:
            found[key] = values
    missing = [name for name in tensors if name not in seen]
    if not partly:
        mistakes += [f"{name!r} of shape {tensors[name].shape} is missing" for name in missing]
    elif not found and not mistakes:
        mistakes.append(f"none of its names is one of the model's; those are {', '.join(map(repr, tensors))}"[:2000])
    if mistakes:
        more = f"; and {len(mistakes) - _SHOWN} more" if len(mistakes) > _SHOWN else ""
        hint = "" if partly else '.  Set run.initial_names = "some" to take only the names that both have.'
        raise UserError(f"{source}: does not fit the model: {'; '.join(mistakes[:_SHOWN])}{more}{hint}")
    return found


def filler(layout: Layout, found: Mapping[str, StoredValues], source: str, otherwise: Fill) -> Fill:
    """Return a function that writes first values, however the vector is cut.

    Parameters
    ----------
    layout
        Of the vector.
    found
        What :func:`match` returned.
    source
        Where the arrays are from, for messages.
    otherwise
        Writes the values of the tensors that are not among them.

    Raises
    ------
    UserError
        From the function, if values are not finite as float32, or cannot be read.
    """

    def fill(start: int, out: np.ndarray) -> None:
        if len(found) < len(layout.tensors):
            otherwise(start, out)
        for tensor, first, last in layout.pieces(start, start + out.size):
            if tensor.name not in found:
                continue
            position = layout.offsets[tensor.name] + first - start
            part = out[position : position + last - first]
            with _damage(Path(source)), np.errstate(over="ignore"):
                part[:] = found[tensor.name].read(first, last)
            if not np.isfinite(part).all():
                raise UserError(f"{source}: the values of {tensor.name!r} are not all finite as float32")

    return fill


def _of_array(array: np.ndarray) -> Callable[[int, int], np.ndarray]:
    return lambda first, last: array.reshape(-1)[first:last]


def _of_checkpoint(checkpoint: Checkpoint, name: str) -> Callable[[int, int], np.ndarray]:
    def read(first: int, last: int) -> np.ndarray:
        out = np.empty(last - first, np.float32)
        checkpoint.read(PARAMETERS, checkpoint.layout.offsets[name] + first, out)
        return out

    return read


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Say that a file is damaged, whatever its reader raises."""
    try:
        yield
    except UserError:
        raise
    except _READING as error:
        raise UserError(f"{path}: cannot be read (damaged file?): {' '.join(str(error).split())[:200]}") from error


def _of_npz(archive: zipfile.ZipFile) -> dict[str, StoredValues]:
    """Return the arrays of a file of ``numpy.savez``; of each only a header of at most 64 KiB is read so far."""
    npy = np.lib.format

    @lru_cache(maxsize=1)  # the parts of an array are read one after the other
    def whole(name: str) -> np.ndarray:
        with archive.open(name) as member:
            return npy.read_array(member, allow_pickle=False).reshape(-1)

    def reader(name: str) -> Callable[[int, int], np.ndarray]:
        return lambda first, last: whole(name)[first:last]

    found = {}
    for info in archive.infolist():
        name = info.filename
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
            raise ValueError(f"{name[:80]!r} is packed in another way than numpy.savez_compressed packs")
        with archive.open(name) as member:
            if not name.endswith(".npy") or npy.read_magic(member) != (1, 0):
                raise ValueError(f"{name[:80]!r} is no array of plain numbers")
            shape, _, dtype = npy.read_array_header_1_0(member)
        found[name.removesuffix(".npy")] = StoredValues(shape, dtype.name, reader(name))
    return found


def _of_safetensors(descriptor: int, size: int) -> dict[str, StoredValues]:
    """Return the arrays of a file of safetensors: a length of 8 bytes, a header of JSON, and their bytes."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    begin = 8 + length
    if length > _LONGEST_HEADER or begin > size:
        raise ValueError(f"its header has {length} bytes; expected at most {_LONGEST_HEADER}, and not beyond its end")
    header = json.loads(os.pread(descriptor, length, 8).decode())
    return {
        name: _tensor(descriptor, begin, size, name, entry) for name, entry in header.items() if name != "__metadata__"
    }


def _tensor(descriptor: int, begin: int, size: int, name: str, entry: dict[str, Any]) -> StoredValues:
    """Return an array that a header of safetensors describes, once it is known to lie in the file."""
    kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    whole = all(type(number) is int and 0 <= number <= size for number in (*shape, first, last))
    dtype = np.dtype(_TYPES.get(kind, "<f4"))
    if not whole or len(shape) > _MOST_AXES or begin + last > size:
        raise ValueError(f"{name[:80]!r} does not lie in the file")
    if kind in _TYPES and last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name[:80]!r} of shape {shape} has {last - first} bytes")

    def read(start: int, stop: int) -> np.ndarray:
        out = np.empty(stop - start, dtype)
        read_at(descriptor, begin + first + start * dtype.itemsize, out.view(np.uint8).data)
        return (out.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else out

    return StoredValues(shape, f"float ({kind})" if kind in _TYPES else str(kind)[:20], read)
