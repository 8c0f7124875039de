"""What ``dbmpi evaluate --details`` prints: tables for people, or JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dbmpi.cli.tables import printable, table

if TYPE_CHECKING:
    import numpy as np

    from dbmpi.runs.class_measures import ClassMeasures
    from dbmpi.runs.value_measures import ValueMeasures

_ROWS, _WORST, _MATRIX = 30, 10, 20
"""Classes that are all printed, or else how many; and classes up to which the matrix is."""
_WHOLE_MATRIX, _MISTAKES = 100, 1000
"""Classes up to which JSON has the whole matrix, or else how many entries beside its diagonal."""


def lines(measures: ClassMeasures | ValueMeasures) -> Iterator[str]:
    """Yield the lines of a table.

    Parameters
    ----------
    measures
        What was found.
    """
    from dbmpi.runs.class_measures import ClassMeasures

    return class_lines(measures) if isinstance(measures, ClassMeasures) else value_lines(measures)


def as_json(measures: ClassMeasures | ValueMeasures) -> dict[str, Any]:
    """Return the same for programs.

    Parameters
    ----------
    measures
        What was found.
    """
    from dbmpi.runs.class_measures import ClassMeasures

    return class_json(measures) if isinstance(measures, ClassMeasures) else value_json(measures)


def class_lines(measures: ClassMeasures) -> Iterator[str]:
    """Yield tables of classes and of what they were taken for.

    Parameters
    ----------
    measures
        What was found.
    """
    import numpy as np

    everything = measures.classes <= _ROWS
    shown = np.arange(measures.classes)
    if not everything:
        some = np.flatnonzero(measures.support > 0)
        shown = some[np.argsort(measures.f1[some], kind="stable")][:_WORST]
        yield f"the {len(shown)} of {measures.classes:,} classes with the lowest F1:"
    rows = [
        [
            printable(str(measures.label(number)), 30),
            f"{measures.support[number]:,}",
            *(_share(column[number]) for column in (measures.precision, measures.recall, measures.f1)),
            _share(measures.area[number], 4),
        ]
        for number in shown.tolist()
    ]
    for name, weighted in (("mean over classes", False), ("weighted by samples", True)):
        means = measures.averages(weighted=weighted)
        *shares, area = means.values()
        rows.append([name, f"{measures.support.sum():,}", *map(_share, shares), _share(area, 4)])
    yield from table(["class", "samples", "precision", "recall", "F1", "AUC"], rows, left=(0,))
    yield ""
    if measures.classes <= _MATRIX:
        yield from _matrix_lines(measures)
    else:
        yield "the most frequent mistakes:"
        mistakes = [
            [printable(str(measures.label(target)), 30), _predicted(measures, predicted), f"{count:,}"]
            for target, predicted, count in measures.confusions(_WORST)
        ]
        yield from table(["class", "taken for", "samples"], mistakes, left=(0, 1))


def class_json(measures: ClassMeasures) -> dict[str, Any]:
    """Return the same for programs; 21,000 classes are some megabytes.

    Parameters
    ----------
    measures
        What was found.
    """
    columns = {
        "precision": measures.precision,
        "recall": measures.recall,
        "f1": measures.f1,
        "auc": measures.area,
    }
    classes = [
        {
            "class": number,
            "label": measures.label(number),
            "samples": int(measures.support[number]),
            **{name: _number(column[number]) for name, column in columns.items()},
        }
        for number in range(measures.classes)
    ]
    found: dict[str, Any] = {
        "mean": {name: _number(value) for name, value in measures.averages(weighted=False).items()},
        "weighted_mean": {name: _number(value) for name, value in measures.averages(weighted=True).items()},
        "classes": classes,
        "mistakes": [
            {"class": target, "taken_for": None if predicted < 0 else predicted, "samples": count}
            for target, predicted, count in measures.confusions(_MISTAKES)
        ],
    }
    if measures.classes <= _WHOLE_MATRIX:
        found["confusion_matrix"] = measures.matrix().tolist()
    return found


def value_lines(measures: ValueMeasures) -> Iterator[str]:
    """Yield a table of outputs.

    Parameters
    ----------
    measures
        What was found.
    """
    import numpy as np

    r2, absolute, squared = measures.r2, measures.mean_absolute_error, measures.root_mean_squared_error
    shown = np.arange(r2.size)
    if r2.size > _ROWS:
        shown = np.argsort(r2, kind="stable")[:_WORST]
        yield f"the {len(shown)} of {r2.size:,} outputs with the lowest R2:"
    rows = [
        [
            printable(str(measures.label(number)), 30),
            _share(r2[number]),
            f"{absolute[number]:.4g}",
            f"{squared[number]:.4g}",
        ]
        for number in shown.tolist()
    ]
    if r2.size > 1:
        overall = _mean(r2), _mean(absolute), _mean(squared)
        rows.append(["mean over outputs", _share(overall[0]), *(f"{value:.4g}" for value in overall[1:])])
    yield from table(["output", "R2", "mean absolute error", "root mean squared error"], rows, left=(0,))


def value_json(measures: ValueMeasures) -> dict[str, Any]:
    """Return the same for programs.

    Parameters
    ----------
    measures
        What was found.
    """
    columns = {
        "r2": measures.r2,
        "mean_absolute_error": measures.mean_absolute_error,
        "root_mean_squared_error": measures.root_mean_squared_error,
    }
    return {
        "mean": {name: _number(_mean(column)) for name, column in columns.items()},
        "outputs": [
            {
                "output": number,
                "label": measures.label(number),
                **{name: _number(column[number]) for name, column in columns.items()},
            }
            for number in range(measures.r2.size)
        ],
    }


def _matrix_lines(measures: ClassMeasures) -> Iterator[str]:
    names = [printable(str(measures.label(number)), 12) for number in range(measures.classes)]
    matrix = measures.matrix()
    rows = [[name, *(f"{count:,}" if count else "." for count in row)] for name, row in zip(names, matrix, strict=True)]
    yield "confusion matrix: a row for each class, and in it how many samples were taken for what"
    yield from table(["", *names], rows, left=(0,))
    if left := int(measures.support.sum() - matrix.sum()):
        yield f"  {left:,} samples have no number as output, or an output that is no class"


def _predicted(measures: ClassMeasures, number: int) -> str:
    return "no number" if number < 0 else printable(str(measures.label(number)), 30)


def _share(value: float, decimals: int = 3) -> str:
    return f"{value:.{decimals}f}" if math.isfinite(value) else "-"


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


def _mean(values: np.ndarray) -> float:
    """Return the mean of those that are defined."""
    import numpy as np

    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan
