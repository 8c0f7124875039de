"""Pictures of a checkpoint: histograms of its parameters, and the receptive fields of the units of the first layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.checkpoint import array_blocks, comparison, receptive_fields, statistics
from dbmpi.checkpoint.array_blocks import StoredNumbers
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.receptive_fields import Sheet
from dbmpi.checkpoint.statistics import Statistics
from dbmpi.errors import Damaged, UserError
from dbmpi.monitor.pictures import figures, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

KINDS = (".png", ".pdf", ".svg")
MOST_PANELS = 96
"""Arrays that have a histogram."""
_BINS = 60
_COLOURS = {"weights": "#0072b2", "weight": "#0072b2", "bias": "#d55e00"}
_OTHER, _QUIET, _GAP = "#009e73", "0.45", "0.8"
_LOGARITHMIC = 30
"""Factor between the largest and the middle count from which counts are drawn on a logarithmic scale."""
_WIDEST = 12.0
"""Inches."""
_TILE = 32
"""Pixels along a side from which images are not enlarged."""
_ASPECT = 1.8
"""Width of a sheet over its height, about."""


@dataclass(frozen=True)
class Panel:
    """What is to be drawn of an array.

    Attributes
    ----------
    name, shape
        Of the array.
    found : Statistics or str
        Of its values, or why there are none.
    """

    name: str
    shape: tuple[int, ...]
    found: Statistics | str


def draw(
    out: Path, first: Checkpoint, second: Checkpoint | None = None, input_shape: tuple[int, ...] | None = None
) -> dict[str, Statistics]:
    """Draw a checkpoint, or how another one differs from it.

    Parameters
    ----------
    out
        The picture; its suffix, one of `KINDS`, says of what kind.
    first
        The checkpoint.
    second
        A later checkpoint, of which the differences from the first one are drawn.
    input_shape
        Shape of one sample; by default that of the checkpoint.

    Returns
    -------
    dict of str to Statistics
        Of the arrays, or of the differences, as far as they were read, by name.

    Raises
    ------
    UserError
        If the two have no array in common, Matplotlib is missing, or the picture cannot be written.
    """
    if out.suffix not in KINDS:
        raise UserError(f"{out}: expected a name that ends in {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    figure_of, style = figures()
    shape = input_shape or first.info.input_shape
    before = array_blocks.parameters(first)
    if second is None:
        title = f"{_end(str(first.path), 60)}   ·   step {first.info.step:,}"
        panels = [Panel(array.name, array.shape, _read(array)) for array in before[:MOST_PANELS]]
        sheet, total = _sheet(before, None, shape), len(before)
    else:
        title = f"changes from step {first.info.step:,} to step {second.info.step:,}"
        after = array_blocks.parameters(second)
        pairs = list(comparison.pairs(before, after))
        if not pairs:
            raise UserError(f"{first.path}, {second.path}: no array is in both, in one shape: there is nothing to draw")
        panels = [Panel(one.name, one.shape, _read(one, two)) for one, two in pairs[:MOST_PANELS]]
        sheet, total = _sheet([one for one, _ in pairs], after, shape), len(pairs)
    if total > len(panels):
        title += f"   ·   the first {len(panels)} of {total:,} arrays"
    with style():
        figure = figure_of()
        _draw(figure, title, panels, sheet)
        save(figure, out)
    return {panel.name: panel.found for panel in panels if isinstance(panel.found, Statistics)}


def _read(array: StoredNumbers, other: StoredNumbers | None = None) -> Statistics | str:
    try:
        return statistics.of_array(array) if other is None else comparison.of_differences(array, other)
    except Damaged:
        return "damaged"


def _sheet(
    arrays: Sequence[StoredNumbers], others: Sequence[StoredNumbers] | None, input_shape: tuple[int, ...]
) -> Sheet | None:
    """Return the receptive fields of the first layer, or their differences; None where there are none."""
    weights = receptive_fields.first_layer(arrays)
    if weights is None:
        return None
    reads = [weights.read]
    if others is not None:
        reads += [array.read for array in others if array.name == weights.name]

    def read(start: int, stop: int) -> np.ndarray:
        values = reads[0](start, stop).astype(np.float64)
        with np.errstate(invalid="ignore"):
            return values if len(reads) == 1 else reads[1](start, stop) - values

    try:
        return receptive_fields.sheet(weights.name, weights.shape, read, input_shape)
    except Damaged:
        return None


def _draw(figure: Figure, title: str, panels: Sequence[Panel], sheet: Sheet | None) -> None:
    columns = next(columns for most, columns in ((2, 2), (16, 4), (36, 6), (MOST_PANELS, 8)) if len(panels) <= most)
    rows = max(1, -(-len(panels) // columns))
    width = max(7.5, min(_WIDEST, 2.6 * columns))
    heights = [1.75 * rows + 0.2]
    if sheet is not None:
        grid = _grid(sheet)
        heights.append(min(max(0.8 * width * grid.shape[0] / grid.shape[1], 1.2), 0.8 * width) + 0.6)
    figure.set_size_inches(width, sum(heights) + 0.4)
    figure.suptitle(title, fontsize=12, parse_math=False)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = parts[0].subplots(rows, columns, squeeze=False).ravel()
    for one, panel in zip(axes, panels, strict=False):
        histogram(one, panel)
    for one in axes[len(panels) :]:
        one.set_axis_off()
    if sheet is not None:
        _fields(parts[1], sheet, grid)


def _end(text: str, length: int) -> str:
    """Return the end of a text, which tells names and paths apart; characters that no font has are left out."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= length else f"...{text[3 - length :]}"


def histogram(axes: Axes, panel: Panel) -> None:
    """Draw the histogram of an array.

    Parameters
    ----------
    axes
        Where to draw.
    panel
        The array.
    """
    axes.set_title(_end(panel.name, 28), fontsize=9, parse_math=False)
    axes.tick_params(labelsize=7)
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    found = panel.found
    size = math.prod(panel.shape)
    if isinstance(found, str) or not math.isfinite(found.minimum):
        text = found if isinstance(found, str) else "no finite values" if size else "empty"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_QUIET, fontsize=8)
        axes.set_xticks([])
        return
    shape = " x ".join(f"{length:,}" for length in panel.shape) or "one number"
    bad = f", {found.non_finite:,} not finite" if found.non_finite else ""
    low, high = found.minimum, found.maximum
    colour = _COLOURS.get(panel.name.rpartition("/")[2].rpartition(".")[2], _OTHER)
    if low == high:
        axes.set_xlabel(f"{shape}{bad}", fontsize=7, color=_QUIET)
        axes.axvline(low, color=colour, lw=3)
        axes.set_xticks([low], [f"{low:.4g}"])
        axes.set_xlim(low - (abs(low) or 1.0), low + (abs(low) or 1.0))
        axes.text(0.55, 0.9, "all are the same", transform=axes.transAxes, ha="left", va="top", fontsize=7)
        return
    axes.set_xlabel(f"{shape}, std {found.deviation:.3g}{bad}", fontsize=7, color=_QUIET)
    edges = np.linspace(low, high, min(_BINS, max(6, 2 * math.isqrt(size))) + 1)
    counts = found.distribution.histogram(edges)
    axes.stairs(counts, edges, fill=True, color=colour)
    if low < 0 < high:
        axes.axvline(0, color="black", lw=0.6)
    some = counts[counts > 0.5]
    if some.size and counts.max() > _LOGARITHMIC * np.median(some):
        axes.set_yscale("log")
        axes.set_ylim(0.5, None)
        axes.set_title("log", loc="right", fontsize=7, fontweight="normal", color=_QUIET)
        axes.yaxis.set_tick_params(which="both", left=False, labelleft=False)
    axes.locator_params(axis="x", nbins=3)


@dataclass(frozen=True)
class _Grid:
    """Where the tiles of a sheet are, in pixels."""

    tile: tuple[int, int]
    rows: int
    columns: int
    gap: int

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.tile
        return self.rows * (height + self.gap) + self.gap, self.columns * (width + self.gap) + self.gap

    def slices(self, number: int, margin: int = 0) -> tuple[slice, slice]:
        """Return where tile `number` is, or it with a `margin`."""
        corner = zip(self.tile, divmod(number, self.columns), strict=True)
        starts = [self.gap + (length + self.gap) * place for length, place in corner]
        rows, columns = (
            slice(start - margin, start + length + margin) for start, length in zip(starts, self.tile, strict=True)
        )
        return rows, columns


def _grid(sheet: Sheet) -> _Grid:
    """Return a grid for a sheet that is about `_ASPECT` as wide as high, with whole units in its rows."""
    height, width = (length * _enlarged(sheet) for length in sheet.tiles[0].shape)
    if not sheet.image:
        return _Grid((height, width), 1, 1, 0)
    number, (rows, columns) = len(sheet.tiles), sheet.each
    across = min(number, max(1, round(math.sqrt(_ASPECT * number * height / width))))
    if rows * columns > 1:
        across = across // (rows * columns) * rows * columns or columns
    else:  # with few places left over in the last row
        across = min(range(across, min(across + 2, number) + 1), key=lambda count: -number % count)
    return _Grid((height, width), -(-number // across), across, 1 + min(height, width) // 24)


def _enlarged(sheet: Sheet) -> int:
    """Return how often to repeat the pixels of a small image, so that the gap beside it is narrow."""
    short, long = sorted(sheet.tiles[0].shape)
    return max(1, min(_TILE // short, 8 * _TILE // long)) if sheet.image else 1


def _fields(figure: Figure | SubFigure, sheet: Sheet, grid: _Grid) -> None:
    """Draw receptive fields in colours about zero: the same weight has the same colour in all of them."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgba

    values = np.abs(np.stack(sheet.tiles))
    whole = np.isfinite(values)
    # Single weights that are much larger would leave the others pale.
    limit = float(np.quantile(values[whole], 0.998)) or float(values[whole].max()) if whole.any() else 0.0
    scale, colours = Normalize(-(limit or 1.0), limit or 1.0), colormaps["RdBu_r"].with_extremes(bad="black")
    picture, often = np.full((*grid.shape, 4), 255, np.uint8), _enlarged(sheet)
    for number in range(len(sheet.tiles)):
        picture[grid.slices(number, grid.gap)] = np.multiply(to_rgba(_GAP), 255)
    for number, tile in enumerate(sheet.tiles):
        colour = colours(scale(np.where(np.isfinite(tile), tile, np.nan)), bytes=True)
        picture[grid.slices(number)] = colour.repeat(often, axis=0).repeat(often, axis=1)
    axes = figure.subplots()
    scales = (1, 1) if sheet.image else sheet.each
    corner = [length * scale - 0.5 for length, scale in zip(grid.shape, scales, strict=True)]
    extent = (-0.5, corner[1], corner[0], -0.5)
    axes.imshow(picture, interpolation="nearest", aspect="equal" if sheet.image else "auto", extent=extent)
    axes.grid(visible=False)
    title = sheet.title + ("" if whole.all() else "; black: not finite")
    axes.set_title(_end(title, 110), fontsize=9, parse_math=False)
    if sheet.image:
        middles = [grid.slices(row * grid.columns)[0].start + (grid.tile[0] - 1) / 2 for row in range(grid.rows)]
        axes.set_xticks([])
        firsts = [divmod(row * grid.columns, math.prod(sheet.each)) for row in range(grid.rows)]
        axes.set_yticks(middles, ["" if within else str(unit) for unit, within in firsts])
        axes.spines[:].set_visible(False)
    else:
        axes.set(xlabel="input", ylabel="unit")
        axes.locator_params(integer=True, min_n_ticks=1)
    axes.tick_params(labelsize=7, length=0 if sheet.image else 3)
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=axes, shrink=0.8, aspect=25, extend="both", pad=0.02)
    bar.ax.tick_params(labelsize=7)
