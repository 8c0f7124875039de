"""How pictures are drawn and written.

Matplotlib is imported when something is drawn, and its state (pyplot) is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbmpi.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.borderpad": 0.2,
    "legend.edgecolor": "none",
}


def figures() -> tuple[Callable[[], Figure], Callable[[], Any]]:
    """Return how to make a figure, and the style to make it in."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise UserError(
            "drawing needs Matplotlib, which is not installed in this environment: pip install 'dbmpi[plot]'"
        ) from None

    def figure_of() -> Figure:
        figure = Figure(dpi=110, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
        FigureCanvasAgg(figure)
        return figure

    @contextmanager
    def style() -> Iterator[None]:
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(_STYLE)
            yield

    return figure_of, style


def plain(text: str, length: int = 80) -> str:
    """Return a `text` of strangers, such as a run's name, for a picture: as it is, whatever it holds.

    Parameters
    ----------
    text
        Matplotlib would take what is between dollars for a formula.
    length
        Letters that are kept; a longer one lacks its middle.
    """
    if len(text) > length:
        text = f"{text[: length // 2 - 1]}…{text[len(text) - length // 2 :]}"
    return "".join(letter if letter.isprintable() else "?" for letter in text).replace("$", r"\$")


def make_folder(out: Path) -> None:
    """Make the folder `out` for pictures where it is missing; UserError if that is not possible."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot make this directory for the pictures: {error.strerror}") from None


def save(figure: Figure, path: Path) -> Path:
    """Write the picture `figure`, of the kind that the suffix of `path` names, and return the path.

    It is written under another name first, so that a viewer never finds half of one.  Raises UserError if it cannot be.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format=path.suffix[1:])
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write the picture: {error.strerror}") from None
    return path
