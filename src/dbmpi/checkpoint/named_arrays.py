"""First values of parameters by name: from ``.npz`` and ``.safetensors`` files, other checkpoints, and dictionaries.

Nothing here unpickles or runs anything.  Names and shapes are read first and compared with the model's; what does not
fit is not read.  The rest is read in small parts, but for an array of NumPy in Fortran's order, which is in memory as a
whole while its values are taken.  Files of safetensors are read here, because that is short (a length, a header of
JSON, raw bytes) and lets a shard read just its part.
"""

from __future__ import annotations

import json
import math
import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dbmpi.checkpoint.checksums import read_at
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.schema import OBJECTIVE_STATE, PARAMETERS
from dbmpi.errors import UserError
from dbmpi.index.layout import Layout

_LONGEST_HEADER = 1 << 22
"""Bytes of a header of safetensors: enough for some ten thousand arrays, and little as Python's objects."""
_MOST_AXES = 32
_WIDEST = 8
"""Bytes of a number that is read."""
_AT_ONCE = 1 << 18
"""Elements that are read at a time; bytes of an archive."""
_SHOWN = 40
"""Mistakes in one message."""
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Of safetensors, as NumPy calls them; bfloat16 is the upper half of a float32."""
_INTEGERS = {
    **{f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)},
    "BOOL": "u1",
}
"""Likewise; parameters cannot be of these types, but state can."""
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
    """What its elements are, for messages."""
    floats: bool
    """Whether they are floating-point numbers that can be read."""
    read: Callable[[int, int], Iterator[np.ndarray]]
    """``read(first, last)`` yields these elements, in C order, as some parts."""
    numbers: bool
    """Whether they are numbers of any type, or booleans, that can be read."""


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
            state = checkpoint.state_arrays
            yield {
                tensor.name: StoredValues(tensor.shape, "float", True, _of_checkpoint(checkpoint, tensor.name), True)
                for tensor in checkpoint.layout.tensors
            } | {
                outside: _of_state(checkpoint, name)
                for name, outside in names_outside(checkpoint.layout, state).items()
            }
        return
    with ExitStack() as stack:
        with damaged_file(path):
            file = stack.enter_context(path.open("rb"))
            if path.suffix == ".npz":
                found = _of_npz(stack.enter_context(zipfile.ZipFile(file)))
            else:
                found = _of_safetensors(file.fileno(), path.stat().st_size)
        yield found


def names_outside(layout: Layout, names: Iterable[str]) -> dict[str, str]:
    """Return what arrays of an objective's state are called beside its parameters: as they are, if that is free.

    Parameters
    ----------
    layout
        Of the parameters.
    names
        Of the state.
    """
    taken = {tensor.name.replace("/", ".") for tensor in layout.tensors}
    return {name: f"{OBJECTIVE_STATE}/{name}" if name.replace("/", ".") in taken else name for name in names}


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
        floats, numbers = array.dtype.kind == "f", array.dtype.kind in "fiub"
        found[before + name] = StoredValues(array.shape, array.dtype.name, floats, _of_array(array), numbers)
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
        elif not values.floats:
            mistakes.append(f"{name!r} is {values.kind}, expected floating-point numbers of up to {8 * _WIDEST} bits")
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
            with damaged_file(Path(source)), np.errstate(over="ignore"):
                done = 0
                for values in found[tensor.name].read(first, last):
                    part[done : done + len(values)] = values
                    done += len(values)
            if not np.isfinite(part).all():
                raise UserError(f"{source}: the values of {tensor.name!r} are not all finite as float32")

    return fill


def _of_array(array: np.ndarray) -> Callable[[int, int], Iterator[np.ndarray]]:
    return lambda first, last: iter((array.reshape(-1)[first:last],))


def _in_parts(read: Callable[[int, int], np.ndarray]) -> Callable[[int, int], Iterator[np.ndarray]]:
    """Return what calls `read`, which returns a range of elements, for a few at a time."""

    def parts(first: int, last: int) -> Iterator[np.ndarray]:
        for start in range(first, last, _AT_ONCE):
            yield read(start, min(start + _AT_ONCE, last))

    return parts


def _of_checkpoint(checkpoint: Checkpoint, name: str) -> Callable[[int, int], Iterator[np.ndarray]]:
    def read(first: int, last: int) -> np.ndarray:
        out = np.empty(last - first, np.float32)
        checkpoint.read(PARAMETERS, checkpoint.layout.offsets[name] + first, out)
        return out

    return _in_parts(read)


def _of_state(checkpoint: Checkpoint, name: str) -> StoredValues:
    array = checkpoint.state_arrays[name]
    read = _in_parts(partial(checkpoint.read_state, name))
    return StoredValues(array.shape, array.dtype.name, array.dtype.kind == "f", read, True)


@contextmanager
def damaged_file(path: Path) -> Iterator[None]:
    """Say that the file at a `path` is damaged, whatever its reader raises."""
    try:
        yield
    except UserError:
        raise
    except _READING as error:
        raise UserError(f"{path}: cannot be read (damaged file?): {' '.join(str(error).split())[:200]}") from error


def _of_npz(archive: zipfile.ZipFile) -> dict[str, StoredValues]:
    """Return the arrays of a file of ``numpy.savez``; of each only a header of at most 64 KiB is read so far."""
    npy = np.lib.format
    found = {}
    for info in archive.infolist():
        name = info.filename
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
            raise ValueError(f"{name[:80]!r} is packed in another way than numpy.savez_compressed packs")
        with archive.open(name) as member:
            if not name.endswith(".npy") or npy.read_magic(member) != (1, 0):
                raise ValueError(f"{name[:80]!r} is no array of plain numbers")
            try:
                shape, in_columns, dtype = npy.read_array_header_1_0(member)
            except (SyntaxError, tokenize.TokenError, MemoryError) as error:  # the last if it is nested deeply
                raise ValueError(f"{name[:80]!r} has no header that can be read") from error
            read = _member(archive, info, member.tell(), dtype, shape if in_columns else None)
        numbers = dtype.kind in "fiub" and dtype.itemsize <= _WIDEST
        floats = numbers and dtype.kind == "f"
        found[name.removesuffix(".npy")] = StoredValues(shape, dtype.name, floats, read, numbers)
    return found


def _member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, begin: int, dtype: np.dtype[Any], shape: tuple[int, ...] | None
) -> Callable[[int, int], Iterator[np.ndarray]]:
    """Return what reads an array in an archive, whose values begin at `begin` of one of its files.

    What lies before a range is unpacked and dropped, so that the archive's check value is compared at the end.  The
    `shape` is given of an array in Fortran's order.
    """

    def stored(first: int, last: int) -> Iterator[np.ndarray]:
        with archive.open(info) as stream:
            for part in _lengths(begin + first * dtype.itemsize):
                _take(stream, part)
            for part in _lengths((last - first) * dtype.itemsize):
                yield np.frombuffer(_take(stream, part), dtype)

    def transposed(first: int, last: int) -> Iterator[np.ndarray]:
        assert shape is not None
        whole, done = np.empty(math.prod(shape), dtype), 0
        for part in stored(0, len(whole)):
            whole[done : done + len(part)] = part
            done += len(part)
        in_order = whole.reshape(shape, order="F").flat
        yield from _in_parts(lambda start, stop: in_order[start:stop])(first, last)

    return stored if shape is None else transposed


def _lengths(count: int) -> Iterator[int]:
    """Yield the lengths of the parts that so many bytes are read in: multiples of any element's."""
    for start in range(0, count, _AT_ONCE):
        yield min(_AT_ONCE, count - start)


def _take(stream: IO[bytes], count: int) -> bytes:
    found = stream.read(count)
    if len(found) < count:
        raise ValueError("an array ends too early")
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
    types = _TYPES | _INTEGERS
    known = isinstance(kind, str) and kind in types
    dtype = np.dtype(types[kind] if known else "<f4")
    if not whole or len(shape) > _MOST_AXES or begin + last > size:
        raise ValueError(f"{name[:80]!r} does not lie in the file")
    if known and last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name[:80]!r} of shape {shape} has {last - first} bytes")

    def read(start: int, stop: int) -> np.ndarray:
        out = np.empty(stop - start, dtype)
        read_at(descriptor, begin + first + start * dtype.itemsize, out.view(np.uint8).data)
        return (out.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else out

    return StoredValues(shape, str(kind)[:20], known and kind in _TYPES, _in_parts(read), known)
