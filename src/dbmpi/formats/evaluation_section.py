"""The part of a report that an evaluation in detail is in, from what ``dbmpi evaluate --details --json`` printed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dbmpi.errors import UserError
from dbmpi.formats.html import Html, table, tag

_LARGEST = 64 << 20
"""Bytes of a file; 21,000 classes are 4 MB."""
_ROWS, _WORST, _MATRIX, _MISTAKES = 60, 20, 30, 15
_HOW = "expected what `dbmpi evaluate RUN_DIR --data FILE --details --json` prints"


def read(path: Path) -> Any:
    """Return an evaluation as read from a file.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    UserError
        If it cannot be read, or is something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {_HOW}") from None
    if len(content) > _LARGEST:
        raise UserError(f"{path}: is larger than {_LARGEST >> 20} MiB; {_HOW}")
    try:
        found = json.loads(content, parse_constant=lambda name: None)
        if not evaluation_section(found):
            raise ValueError(found)
    except (ValueError, RecursionError, KeyError, TypeError, IndexError):
        raise UserError(f"{path}: is no evaluation; {_HOW}") from None
    return found


def evaluation_section(found: Any) -> list[Html]:
    """Return the section; nothing where there is no evaluation.

    Parameters
    ----------
    found
        What was read from JSON; ValueError, TypeError, KeyError or IndexError if it is something else.
    """
    if found is None:
        return []
    details = found["details"]
    facts = (
        f"{found['checkpoint']}, step {int(found['step']):,}, on {int(found['samples']):,} samples of {found['data']}"
    )
    parts = [tag("p", f"{facts}. Loss {_number(found['loss'], 5)}.")]
    return parts + (_classes(details) if "classes" in details else _outputs(details))


def _classes(details: dict[str, Any]) -> list[Html]:
    classes = details["classes"]
    columns = ("precision", "recall", "f1", "auc")
    shown, note = classes, ""
    if len(classes) > _ROWS:
        shown = sorted(classes, key=lambda one: 2.0 if one["f1"] is None else float(one["f1"]))[:_WORST]
        note = f"The {_WORST} of {len(classes):,} classes with the lowest F1."
    rows = [(one["label"], f"{int(one['samples']):,}", *(_share(one[name]) for name in columns)) for one in shown]
    total = f"{sum(int(one['samples']) for one in classes):,}"
    for name, key in (("mean over classes", "mean"), ("weighted by samples", "weighted_mean")):
        rows.append((name, total, *(_share(details[key][column]) for column in columns)))
    parts = [
        tag(
            "p",
            "Precision: of the samples taken for a class, how many belong to it. Recall: of the samples of a class, "
            "how many are taken for it. F1 is their harmonic mean. AUC: how often a sample of the class has a higher "
            "score for it than one of another class. ",
            note,
        ),
        table(("class", "samples", "precision", "recall", "F1", "AUC"), rows),
    ]
    matrix = details.get("confusion_matrix")
    if matrix is not None and len(matrix) <= _MATRIX:
        parts += [
            tag("h3", "Confusion matrix"),
            tag("p", "A row for each class: how many of its samples were taken for which class."),
            _matrix([one["label"] for one in classes], matrix),
        ]
    labels = {int(one["class"]): one["label"] for one in classes}
    mistakes = [
        (
            labels.get(int(one["class"]), one["class"]),
            "no number" if one["taken_for"] is None else labels.get(int(one["taken_for"]), one["taken_for"]),
            f"{int(one['samples']):,}",
        )
        for one in details["mistakes"][:_MISTAKES]
    ]
    if mistakes:
        parts += [tag("h3", "The most frequent mistakes"), table(("class", "taken for", "samples"), mistakes, (0, 1))]
    return parts


def _matrix(labels: list[Any], matrix: list[list[int]]) -> Html:
    rows = []
    for label, row in zip(labels, matrix, strict=True):
        total = max(1, sum(map(int, row)))
        cells = [tag("th", label, scope="row")]
        for value in map(int, row):
            share = value / total
            ink = "#fff" if share > 0.5 else "#1c2430"
            # From white to the blue of the pictures.
            red, green, blue = (round(255 + share * (end - 255)) for end in (0, 114, 178))
            colors = f"background:rgb({red},{green},{blue});color:{ink}"
            cells.append(tag("td", f"{value:,}" if value else "", style=colors))
        rows.append(tag("tr", *cells))
    head = tag("tr", tag("th", ""), *(tag("th", label, scope="col") for label in labels))
    return tag(
        "div", tag("table", tag("thead", head), tag("tbody", *rows), class_="matrix"), class_="scroll", tabindex=0
    )


def _outputs(details: dict[str, Any]) -> list[Html]:
    outputs = details["outputs"]
    columns = ("r2", "mean_absolute_error", "root_mean_squared_error")
    shown, note = outputs, ""
    if len(outputs) > _ROWS:
        shown = sorted(outputs, key=lambda one: 2.0 if one["r2"] is None else float(one["r2"]))[:_WORST]
        note = f"The {_WORST} of {len(outputs):,} outputs with the lowest R2."
    rows = [(one["label"], *(_number(one[name], 4) for name in columns)) for one in shown]
    rows.append(("mean over outputs", *(_number(details["mean"][name], 4) for name in columns)))
    return [
        tag(
            "p", "R2 is the share of the targets' variance that is predicted: 1 at best, 0 for always the mean. ", note
        ),
        table(("output", "R2", "mean absolute error", "root mean squared error"), rows),
    ]


def _number(value: Any, digits: int = 4) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{float(value):.{digits}g}"


def _share(value: Any) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{float(value):.4f}"
