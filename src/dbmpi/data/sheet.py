"""A sample sheet: some samples of each class as a picture, and how the classes and the inputs are distributed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dbmpi.data.source import Source
from dbmpi.data.survey import MOST_SHOWN, Survey, numbers
from dbmpi.errors import UserError
from dbmpi.monitor.pictures import figures, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

KINDS = (".png", ".pdf", ".svg")
_BLUE, _ORANGE = "#0072b2", "#d55e00"
_MOST_SAMPLES = 20_000
"""That are looked at for histograms, and for samples of each class."""
_MOST_BARS = 24
_PANELS = 12
MOST_CLASSES = 10
"""Of which samples are shown."""


def draw(out: Path, survey: Survey) -> Path:
    """Draw a sample sheet of the data of a survey.

    Parameters
    ----------
    out
        The picture, of a kind that its suffix names.
    survey
        Of data that are open.

    Raises
    ------
    UserError
        If it cannot be written, or Matplotlib is not installed.
    """
    if out.suffix not in KINDS:
        raise UserError(f"--plot {out}: expected a name that ends in {', '.join(KINDS)}")
    make, style = figures()
    source = survey.source
    chosen, names = _chosen(survey)
    shape = source.parts[0].shape[1:]
    picture = _as_picture(shape)
    with style():
        figure = make()
        height = 5.4
        if source.encoding.one_hot:
            height = 0.27 * len(names) + 0.2
        elif picture:
            height = min(0.9, 0.9 * shape[-2] / shape[-1] + 0.06) * len(names) + 0.2
        figure.set_size_inches(9.5, height + 2.6)
        figure.suptitle(f"{Path(source.path).name}: {source.samples:,} samples", fontsize=12, fontweight="bold")
        (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(height, 2.3))
        if source.encoding.one_hot:
            _tokens(top, source, chosen, names)
        elif picture:
            _images(top, source, chosen, names, shape)
        else:
            _histograms(top, survey)
        _distributions(bottom, survey)
        return save(figure, out)


def _chosen(survey: Survey) -> tuple[list[np.ndarray], list[str]]:
    """Return some samples of each of the first classes, or of the data, and what the classes are called."""
    source = survey.source
    looked = min(source.samples, _MOST_SAMPLES)
    where = np.unique(np.linspace(0, source.samples - 1, looked).astype(np.int64))
    if source.classes is None:
        rows = where[np.linspace(0, len(where) - 1, min(len(where), 4 * MOST_SHOWN)).astype(int)]
        return [part for part in np.array_split(rows, 4) if len(part)], [""] * min(4, len(rows))
    classes = source.targets(where)
    found, names = [], []
    counts = np.bincount(classes, minlength=source.classes)
    there = np.flatnonzero(counts) if not source.encoding.one_hot else np.argsort(-counts, kind="stable")
    for code in there[:MOST_CLASSES]:
        found.append(where[classes == code][:MOST_SHOWN])
        names.append(survey.labels[code])
    return found, names


def _as_picture(shape: tuple[int, ...]) -> bool:
    return (len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1) or (len(shape) == 2 and min(shape) > 1)


def _values(source: Source, rows: np.ndarray) -> np.ndarray:
    """Return inputs ``(rows, features)`` as they were measured."""
    stored = source.parts[0]
    order = np.unique(rows)
    found = numbers(stored, stored.read(order))
    return found[np.searchsorted(order, rows)]


def _images(
    area: SubFigure, source: Source, chosen: list[np.ndarray], names: list[str], shape: tuple[int, ...]
) -> None:
    axes = area.subplots(len(chosen), MOST_SHOWN, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
    values = [_values(source, rows) for rows in chosen]
    least, most = (float(fold([fold(block) for block in values])) for fold in (np.nanmin, np.nanmax))
    colour = len(shape) == 3 and shape[0] == 3
    grey: dict[str, Any] = {"cmap": "gray" if least >= 0 else "viridis", "vmin": least, "vmax": most}
    for line, block, name in zip(axes, values, names, strict=True):
        for axis, index in zip(line, range(MOST_SHOWN), strict=True):
            axis.set_axis_off()
            if index < len(block):
                image = block[index].reshape(shape)
                shown = np.moveaxis(image, 0, -1) if colour else image.reshape(shape[-2:])
                if colour:
                    shown = np.clip((shown - least) / (most - least or 1), 0, 1)
                axis.imshow(shown, aspect="equal", interpolation="nearest", **({} if colour else grey))
        line[0].set_axis_on()
        line[0].set(xticks=[], yticks=[])
        line[0].grid(visible=False)
        for spine in line[0].spines.values():
            spine.set_visible(False)
        line[0].set_ylabel(_short(name), rotation=0, ha="right", va="center", fontsize=9)


def _tokens(area: SubFigure, source: Source, chosen: list[np.ndarray], names: list[str]) -> None:
    axis = area.subplots()
    axis.set_axis_off()
    letters = source.labels if source.labels and len(source.labels) == source.encoding.one_hot else None
    lines = []
    for rows, name in zip(chosen, names, strict=True):
        texts = []
        for tokens in _values(source, rows[:4]).astype(int):
            plain = "".join(map(str, (letters[token] for token in tokens))) if letters else " ".join(map(str, tokens))
            texts.append(repr(plain) if letters else plain)
        lines.append(f"{_short(name):>6}  follows  " + "  ".join(texts))
    axis.text(0, 1, "\n\n".join(lines), family="monospace", fontsize=8, va="top", transform=axis.transAxes)


def _histograms(area: SubFigure, survey: Survey) -> None:
    """Draw the inputs that vary, each for itself, of the first two classes apart."""
    source = survey.source
    where = np.unique(np.linspace(0, source.samples - 1, min(source.samples, _MOST_SAMPLES)).astype(np.int64))
    values = _values(source, where)
    varying = np.flatnonzero(survey.moments.deviation > 0)
    shown = varying[:: max(1, -(-len(varying) // _PANELS))][:_PANELS] if len(varying) else np.arange(1)
    columns = min(4, len(shown))
    axes = area.subplots(-(-len(shown) // columns), columns, squeeze=False).reshape(-1)
    known = source.meaning.input_names if len(source.parts) == 1 else ()
    classes = source.targets(where) if source.classes is not None else None
    codes = [] if classes is None else np.argsort(-np.bincount(classes), kind="stable")[:2].tolist()
    for axis, feature in zip(axes, shown, strict=False):
        column = values[:, feature]
        there = np.isfinite(column)
        edges = np.histogram_bin_edges(column[there], 24)
        for code, tint in zip(codes, (_BLUE, _ORANGE), strict=False):
            part = column[there & (classes == code)]
            axis.hist(part, edges, color=tint, alpha=0.55, label=_short(survey.labels[code]))
        if not codes:
            axis.hist(column[there], edges, color=_BLUE)
        axis.set_title(_short(known[feature] if len(known) == values.shape[1] else f"input {feature}", 26), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_yticks([])
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    if codes:
        axes[0].legend(fontsize=7)


def _distributions(area: SubFigure, survey: Survey) -> None:
    left, right = area.subplots(1, 2) if not survey.source.encoding.one_hot else (area.subplots(), None)
    if survey.counts is not None:
        order = np.argsort(-survey.counts, kind="stable")[:_MOST_BARS]
        left.bar(range(len(order)), survey.counts[order], color=_BLUE)
        names = [_short(survey.labels[code], 14) for code in order]
        left.set_xticks(
            range(len(order)), names, rotation=0 if max(map(len, names)) * len(names) < 40 else 90, fontsize=8
        )
        more = len(survey.counts) - len(order)
        left.set_title("samples of each class" + (f" ({more} more)" if more > 0 else ""))
        left.grid(visible=False, axis="x")
    else:
        _values_of_targets(left, survey)
    if right is None:
        return
    deviation = survey.moments.deviation
    mean = survey.moments.mean
    right.scatter(mean, deviation, s=8, color=_BLUE, linewidths=0)
    right.set(xlabel="mean", ylabel="deviation")
    right.set_title("each input")
    text = f"{survey.missing:,} missing" if survey.missing else "nothing is missing"
    constant = f", {survey.constant:,} of {len(mean):,} never vary" if survey.constant else ""
    right.text(0.98, 0.02, text + constant, transform=right.transAxes, ha="right", va="bottom", fontsize=8)


def _values_of_targets(axis: Axes, survey: Survey) -> None:
    source = survey.source
    axis.set_title("targets")
    if not source.has_targets:
        axis.text(0.5, 0.5, "none", ha="center")
        axis.set_axis_off()
        return
    where = np.unique(np.linspace(0, source.samples - 1, min(source.samples, _MOST_SAMPLES)).astype(np.int64))
    values = source.targets(where).reshape(-1, len(where))
    for number, row in enumerate(values[:4]):
        axis.hist(row[np.isfinite(row)], 30, histtype="step", linewidth=1.4, label=f"value {number}")
    if len(values) > 1:
        axis.legend()


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
