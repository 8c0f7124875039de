"""``dbmpi predict``: outputs and classes of a trained network for a data file."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.cli import options
from dbmpi.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from dbmpi.data.source import Source
    from dbmpi.runs.inference import Inference

SUMMARY = "write the outputs of a checkpoint for a data file to an HDF5 file"

FORMAT = "dbmpi-predictions"
NO_LABEL = -(2**63)
"""Stored instead of a numeric label where a sample has no class; the attribute `_FillValue` says so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    options.add_inference(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.h5",
        help="HDF5 file to write: /outputs and, if any, /classes and /labels",
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE.h5 if it exists")


def run(arguments: argparse.Namespace) -> int:
    """Predict with these `arguments`, write the file, say so, and return the exit code."""

    def check(checkpoint: Path) -> None:
        for read in (arguments.data, checkpoint):
            _check_out(arguments.out, read, arguments.force)

    with options.opened(arguments, targets=False, check=check) as (network, source):
        broken, units = 0, network.units(source)
        if network.is_first:
            broken = _write(arguments, network, source, units)
        else:
            deque(network.predict(source), maxlen=0)
        broken = network.total(broken)
        text = f"the outputs of {broken:,} of {source.samples:,} samples are NaN or infinite"
        text += "; their class is -1" if network.trained.info.classes else ""
        return options.verdict(network, text if broken else "")


def _write(arguments: argparse.Namespace, network: Inference, source: Source, units: int) -> int:
    """Write the file, while all ranks predict; return of how many samples the outputs are no numbers."""
    import numpy as np

    import dbmpi
    from dbmpi.checkpoint.meaning import Meaning
    from dbmpi.checkpoint.new_file import ARRAYS, NewFile

    trained = network.trained
    classifies, broken = 0 < trained.info.classes <= units, 0
    loss, meaning = trained.network.loss, trained.info.meaning or Meaning()
    labels = _labels(meaning.labels, units) if classifies and meaning.labels else None
    kind, description = ("outputs", "outputs of the last layer, or of the objective") if loss is None else loss.predicts
    attributes: dict[str, str | int] = {
        "format": FORMAT,
        "format_version": 1,
        "dbmpi": dbmpi.__version__,
        "checkpoint": str(trained.path),
        "step": trained.info.step,
        "data": str(arguments.data),
    }
    with NewFile(arguments.out, ARRAYS) as out:
        for name, value in attributes.items():
            out.set_attribute(name, value)
        out.create("outputs", (source.samples, units), np.float32)
        if classifies:
            out.create("classes", (source.samples,), np.int32)
        out.set_attribute("kind", kind, "outputs")
        out.set_attribute("description", description, "outputs")
        if labels is not None:
            out.create("labels", (source.samples,), labels.dtype)
            if labels.dtype.kind == "i":
                out.set_attribute("_FillValue", NO_LABEL, "labels")
            out.put("class_labels", _plain(meaning.labels))
        if meaning.target_names:
            out.put("output_names", _plain(meaning.target_names))
        out.check_space()
        with options.progress(source, "predicting", True) as shown:
            for first, rows in network.predict(source):
                out.write("outputs", first * units, rows.reshape(-1))
                classes = _classes(rows)
                broken += int((classes < 0).sum())
                if classifies:
                    out.write("classes", first, classes)
                if labels is not None:
                    out.write("labels", first, labels[classes])
                shown(len(rows))
        out.commit()
    more = ", classes" * classifies + (", labels" if labels is not None else "")
    print(f"{arguments.out}: {kind} {source.samples:,} x {units:,}{more}")
    return broken


def _labels(labels: Sequence[int | str], units: int) -> np.ndarray:
    """Return the label of each output, and behind the last one that of no class, which outputs without a class have."""
    import h5py
    import numpy as np

    without = units + 1 - len(labels)
    if isinstance(labels[0], str):
        texts = [str(label).encode() for label in labels]
        return np.array([*texts, *[b""] * without], h5py.string_dtype("utf-8", max(1, *map(len, texts))))
    return np.array([*labels, *[NO_LABEL] * without], np.int64)


def _plain(labels: Sequence[int | str]) -> Sequence[int] | Sequence[bytes]:
    return [label.encode() if isinstance(label, str) else label for label in labels]  # type: ignore[return-value]


def _classes(outputs: np.ndarray) -> np.ndarray:
    """Return the largest output of each sample, int32; -1 where one is NaN or the largest is infinite."""
    import numpy as np

    return np.where(np.isfinite(outputs.max(axis=1)), outputs.argmax(axis=1), -1).astype(np.int32)


def _check_out(out: Path, read: Path, force: bool) -> None:
    """Refuse to overwrite the input, or any existing file unless `force` is given."""
    if not out.exists():
        return
    if not out.is_file():
        raise UserError(f"{out}: is not a file; expected the name of an HDF5 file to write")
    if read.exists() and out.samefile(read):
        raise UserError(f"{out}: is the file to read from; give --out another name")
    if not force:
        raise UserError(f"{out}: exists and is not overwritten; give --out another name, or --force")
