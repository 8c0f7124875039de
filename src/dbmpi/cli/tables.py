"""Tables, and texts of strangers, on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

_TEXT_SHOWN = 200


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> Iterator[str]:
    """Yield the lines of a table, whose columns are as wide as needed.

    Parameters
    ----------
    heading
        Names of the columns.
    rows
        The cells; a row may be shorter.
    left
        Columns that are aligned on the left.
    """
    # The last text of a shorter row may be long.
    fitting = [row if len(row) == len(heading) else row[:-1] for row in rows]
    widths = [len(name) for name in heading]
    for row in fitting:
        widths[: len(row)] = map(max, widths, map(len, row))
    for row in [heading, *rows]:
        cells = [
            f"{cell:<{width}}" if column in left or len(row) < len(heading) else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def printable(value: Any, length: int = _TEXT_SHOWN) -> str:
    """Return a text of up to some `length`, or a `value` as JSON, without what could control the terminal."""
    text = value if isinstance(value, str) else json.dumps(value)
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:length])
    return shown + ("..." if len(text) > length else "")
