"""Changes to a checkpoint, of every dataset and attribute: one bit, other numbers, other types, or nothing at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Random = np.random.Generator
NUMBERS = (0, -1, 1, 2**31, 2**62, 2**63 - 1, -(2**63), 10**6)
TEXTS = ("", "NaN", "\0", "x" * 5000, "{}", "[]", "null", "ü", "9999-12-31T23:59:59.999999")


def as_version_1(file: h5py.File) -> None:
    """Take the checksums away, as the first version of the format had none."""
    del file["checksums"]
    file.attrs.modify("format_version", 1)


def places(path: Path) -> list[str]:
    """Return the paths of all datasets and groups, and ``@name`` for the attributes of the file."""
    found: list[str] = []
    with h5py.File(path) as file:
        file.visit(found.append)
        found += [f"@{name}" for name in file.attrs]
    return found


def mutate(path: Path, place: str, random: Random) -> str:
    """Change something of one dataset, group or attribute; return what."""
    if place.startswith("@"):
        return _mutate_attribute(path, place[1:], random)
    with h5py.File(path, "r+") as file:
        node = file[place]
        if isinstance(node, h5py.Group):
            kinds: list[Callable[[h5py.File, str, Random], str]] = [_remove, _rename, _become_data]
            return kinds[random.integers(len(kinds))](file, place, random)
        number = int(random.integers(8))
        if number > 1:
            kinds = [_remove, _rename, _retype, _reshape, _become_group, _revalue]
            return kinds[number - 2](file, place, random)
        offset, size = node.id.get_offset(), node.id.get_storage_size()
        if not size:
            return _reshape(file, place, random)
        if node.chunks:
            chunk = node.id.get_chunk_info(0)
            offset, size = chunk.byte_offset, chunk.size
    data = bytearray(path.read_bytes())
    bit = int(random.integers(8 * size))
    data[offset + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bit {bit}"


def _mutate_attribute(path: Path, name: str, random: Random) -> str:
    with h5py.File(path, "r+") as file:
        values = (None, 0, 1, 2, 3, -1, 2**40, 1.5, "dbmpi", "", [1, 2])
        value = values[int(random.integers(len(values)))]
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value
        return f"becomes {value!r}"


def _replace(file: h5py.File, place: str, data: Any) -> None:
    del file[place]
    file[place] = data


def _remove(file: h5py.File, place: str, random: Random) -> str:
    del file[place]
    return "missing"


def _rename(file: h5py.File, place: str, random: Random) -> str:
    file.move(place, f"{place}x")
    return "renamed"


def _become_data(file: h5py.File, place: str, random: Random) -> str:
    _replace(file, place, 5)
    return "a number"


def _become_group(file: h5py.File, place: str, random: Random) -> str:
    del file[place]
    file.create_group(place)
    return "a group"


def _retype(file: h5py.File, place: str, random: Random) -> str:
    values = file[place][()]
    kinds = ["f2", "f4", "f8", ">f4", "i1", "i8", ">i8", "u4", "u8", "c8", "S7", "bool"]
    kind = kinds[int(random.integers(len(kinds)))]
    try:
        _replace(file, place, np.asarray(values).astype(kind))
    except (ValueError, TypeError):
        _replace(file, place, np.zeros(np.shape(values), kind))
    return f"as {kind}"


def _reshape(file: h5py.File, place: str, random: Random) -> str:
    values = np.asarray(file[place][()])
    shapes = [values[np.newaxis], values.reshape(-1), np.append(values.reshape(-1), values.reshape(-1)[:1])]
    shapes += [values.reshape(-1)[:0], values.reshape(-1)[1:], values.T.copy()]
    chosen = shapes[int(random.integers(len(shapes)))]
    _replace(file, place, chosen)
    return f"shape {chosen.shape}"


def _revalue(file: h5py.File, place: str, random: Random) -> str:
    """Change one number, or the text; in a JSON text one value of it."""
    data = np.array(file[place][()])
    if data.dtype.kind == "S":
        if data.ndim:
            data.reshape(-1)[random.integers(data.size)] = b"other/name"
            _replace(file, place, data)
            return "another name"
        text = bytes(data[()]).decode()
        text = _change_json(text, random) if text.startswith("{") else TEXTS[int(random.integers(len(TEXTS)))]
        _replace(file, place, np.array(text.encode(), f"S{max(len(text.encode()), 1)}"))
        return f"text {text[:60]!r}"
    if not data.size:
        _replace(file, place, np.array([int(random.choice(NUMBERS))], data.dtype.newbyteorder("=")))
        return "not empty"
    at = np.unravel_index(int(random.integers(data.size)), data.shape) if data.shape else ()
    if data.dtype.kind == "f":
        value: Any = random.choice([np.nan, np.inf, -1e30, data[at] + 1, np.nextafter(data[at], np.inf)])
    else:
        near = [int(data[at]) - 1, int(data[at]) + 1]
        value = int(random.choice([*near, *NUMBERS])) % 2**63 if random.random() < 0.7 else -int(data[at])
        if data.dtype.kind == "u":
            value = value % 2**32
    data[at] = value
    file[place][()] = data
    return f"{at} becomes {value}"


def _change_json(text: str, random: Random) -> str:
    """Change one value somewhere in a JSON document."""
    document = json.loads(text)
    node, key = document, None
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[int(random.integers(len(keys)))]
        below = node[key]
        if not isinstance(below, (dict, list)) or not below or random.random() < 0.15:
            break
        node = below
    choices: list[Any] = [None, -1, 0, 1e300, 2**70, "x", [], {}, [[1], [2, 3]], float("nan"), True]
    if isinstance(below, (int, float)) and not isinstance(below, bool):
        choices += [below + 1, below - 1, -below, below * 2, below + 0.5] * 2
    if random.random() < 0.15 and isinstance(node, dict):
        del node[key]
    else:
        node[key] = choices[int(random.integers(len(choices)))]
    return json.dumps(document)
