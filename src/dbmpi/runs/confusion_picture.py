"""The picture of a confusion matrix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.errors import UserError
from dbmpi.monitor.pictures import figures, plain, save
from dbmpi.runs.class_measures import ClassMeasures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = (".png", ".pdf", ".svg")
_NUMBERED, _NAMED, _CELLS = 20, 50, 500
"""Classes up to which the cells have numbers, the rows names, and each class has a row of its own."""


def check(path: Path) -> None:
    """Raise UserError unless a picture may be written to `path`: of a known kind, and Matplotlib is there."""
    if path.suffix not in KINDS:
        raise UserError(f"{path}: expected a name that ends in {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.absolute().parent} to write it to; make it first")
    figures()


def draw(measures: ClassMeasures, title: str, path: Path) -> Path:
    """Draw a confusion matrix, each row in shares of its class, and return the path.

    Parameters
    ----------
    measures
        What was found.
    title
        Of the picture.
    path
        The file; its suffix, one of `KINDS`, says of what kind.
    """
    figure_of, style = figures()
    counts = measures.matrix(_CELLS)
    classes, size = measures.classes, len(counts)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    with style():
        figure = figure_of()
        side = 5.6 if classes <= _NUMBERED // 2 else 8.5
        figure.set_size_inches(side + 1.0, side)
        axes = figure.subplots()
        axes.grid(visible=False)
        # The square root shows rare mistakes, too.
        image = axes.imshow(100 * shares, cmap="Blues", norm="linear", vmin=0, vmax=100, interpolation="nearest")
        if classes > _NUMBERED:
            from matplotlib.colors import PowerNorm

            image.set_norm(PowerNorm(0.5, 0, 100))
        figure.colorbar(image, label="share of the row (%)", shrink=0.8)
        together = f" (each cell about {classes / size:.3g} x {classes / size:.3g} classes)" if size < classes else ""
        axes.set(xlabel=f"taken for{together}", ylabel="class")
        axes.set_title(plain(title, 70))
        if classes <= _NAMED:
            names = [plain(str(measures.label(number)), 20) for number in range(classes)]
            small = 9 if classes <= _NUMBERED else 6
            turned = 0 if max(map(len, names)) <= 3 else 90
            axes.set_xticks(range(classes), names, rotation=turned, fontsize=small)
            axes.set_yticks(range(classes), names, fontsize=small)
        elif size < classes:
            edges = np.linspace(0, size, 6)[:-1]
            axes.set_xticks(edges, [f"{edge * classes / size:,.0f}" for edge in edges])
            axes.set_yticks(edges, [f"{edge * classes / size:,.0f}" for edge in edges])
        if classes <= _NUMBERED:
            _write_counts(axes, counts, shares)
        return save(figure, path)


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for (row, column), count in np.ndenumerate(counts):
        if count:
            ink = "white" if shares[row, column] > 0.55 else "black"
            size = 9 if count < 10_000 else 7
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=ink, fontsize=size)
