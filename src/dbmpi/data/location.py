"""Where data are: files, several of them or a pattern, and a path within each, as in ``file.h5:/group/x``."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dbmpi.config.data import DataParts, DataPlace
from dbmpi.errors import UserError

MOST_FILES = 512
"""That are open at once."""
_PATTERN = re.compile(r"[*?\[]")


class Within(NamedTuple):
    """A file, and a path within it; empty for all of it."""

    file: Path
    inside: str


def files_of(place: Path | tuple[Path, ...]) -> list[Within]:
    """Return the files that a `place` names: in the order given, and those of a pattern by name, part-9 before part-10.

    Raises
    ------
    UserError
        If a pattern fits no file, or there are more than MOST_FILES.
    """
    found: list[Within] = []
    for each in place if isinstance(place, tuple) else (place,):
        file, inside = split(each)
        if _is_pattern(file):
            matching = sorted(_matching(file), key=_natural)
            if not matching:
                raise UserError(f"{file}: no file has such a name; expected a pattern of data files, e.g. 'part-*.h5'")
            found += [Within(match, inside) for match in matching]
        else:
            found.append(Within(file, inside))
    if len(found) > MOST_FILES:
        raise UserError(
            f"{called(place)}: are {len(found)} files; expected at most {MOST_FILES}: join some, e.g. by a virtual "
            "dataset of h5py"
        )
    return found


def split(place: Path) -> Within:
    """Return the file and the path inside of a `place`, ``file.h5:/group/x``; one that exists as it is, is a file."""
    text = str(place)
    if ":" not in text or place.exists():
        return Within(place, "")
    cuts = [position for position, letter in enumerate(text) if letter == ":"]
    for cut in cuts:
        file = Path(text[:cut])
        if file.is_file() or (_is_pattern(file) and next(_matching(file), None) is not None):
            return Within(file, text[cut + 1 :])
    # Nothing is there: messages name what would be the file.
    cut = next((cut for cut in cuts if Path(text[:cut]).suffix), 0)
    return Within(Path(text[:cut]), text[cut + 1 :]) if cut else Within(place, "")


def called(place: DataPlace | None) -> str:
    """Return what messages call the data at a `place`."""
    if isinstance(place, DataParts):
        return called(place.inputs)
    if isinstance(place, tuple):
        return f"{place[0]} ... {place[-1]}" if len(place) > 1 else str(place[0])
    return str(place)


def exist(place: DataPlace | None) -> bool:
    """Return whether there is something at a `place`."""
    if isinstance(place, DataParts):
        return exist(place.inputs)
    if place is None:
        return False
    try:
        return all(within.file.exists() for within in files_of(place))
    except UserError:
        return False


def _is_pattern(file: Path) -> bool:
    return bool(_PATTERN.search(str(file))) and not file.exists()


def _matching(pattern: Path) -> Iterator[Path]:
    return (path for path in map(Path, glob.iglob(str(pattern))) if path.is_file())


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key by which numbers in names are in their order."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", str(path))]
