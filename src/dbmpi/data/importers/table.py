"""The importers and their arguments on the command line: light to import, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Argument:
    """An argument of a command, named as the importer's parameter that it sets."""

    name: str
    """As the user writes it, e.g. ``--out``."""
    settings: Mapping[str, Any]
    """For :meth:`argparse.ArgumentParser.add_argument`."""
    alternative: bool = False
    """Whether it excludes the others that are alternatives."""


@dataclass(frozen=True)
class Importer:
    """A function that writes a data file from another format."""

    function: str
    """``import_<kind>`` of the module ``<kind>`` in this package."""
    summary: str
    """Of the format."""
    arguments: tuple[Argument, ...]

    @property
    def kind(self) -> str:
        """The name on the command line."""
        return self.function.removeprefix("import_")

    def load(self) -> Callable[..., Any]:
        """Return the function; this imports NumPy and h5py."""
        module = importlib.import_module(f"dbmpi.data.importers.{self.kind}")
        return getattr(module, self.function)  # type: ignore[no-any-return]


def count(text: str) -> int:
    """Return the number in an argument's `text`, which must be at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _argument(name: str, text: str, *, alternative: bool = False, **settings: Any) -> Argument:
    return Argument(name, {"help": text, **settings}, alternative)


def _delimiter(text: str) -> str:
    return "\t" if text == "tab" else text


def _gap(text: str) -> str | float:
    if text in ("refuse", "drop", "mean"):
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected refuse, drop, mean or a number, got {text!r}")
    return number


def _size(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS, e.g. 64x64, got {text!r}")
    return int(rows), int(columns)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


_path = partial(_argument, type=Path, metavar="FILE")
_given = partial(_path, required=True)
_count = partial(_argument, type=count, metavar="N")
_columns = partial(_argument, action="append", metavar="COLUMN")
_values = partial(_argument, "--values", action="store_const", dest="kind", const="values", default="classes")
_like = partial(_path, "--like", metavar="TRAIN.h5")
_one_hot = partial(_columns, "--one-hot", default=[])
_gaps = partial(
    _argument,
    "--gaps",
    "what to do where an input is missing: refuse the table (default), drop the line, or take the mean or a number",
    type=_gap,
    metavar="HOW",
    default="refuse",
)
_group = partial(
    _argument, "--group", "column that says whose each sample is, e.g. the patient; it is recorded", metavar="COLUMN"
)


def _per_file(what: str) -> Argument:
    text = f"{what} in each data file, whose name then has {{}} for its number; an import that was interrupted "
    return _count("--per-file", text + "goes on behind the files that are complete")


_OUT = _given("--out", "data file to write", metavar="FILE.h5")
_CLASSES = _count("--classes", "number of classes (default: the largest label plus one)")
_BYTE_SCALE = _argument("--scale", "factor on bytes when they are used (default: 1/255)", type=float, default=1 / 255)

IMPORTERS = (
    Importer(
        "import_digits",
        "the 1,797 handwritten digits of scikit-learn: DIR/digits-train.h5 and DIR/digits-test.h5",
        (_given("--out", "directory for the two files", metavar="DIR"),),
    ),
    Importer(
        "import_idx",
        "IDX files as those of MNIST, plain or gzip",
        (_given("--images", "the images"), _given("--labels", "their labels"), _OUT, _CLASSES, _BYTE_SCALE),
    ),
    Importer(
        "import_csv",
        "tables, one sample a line, plain or gzip; all but the target are numbers",
        (
            _path("file", "the table"),
            _OUT,
            _columns(
                "--target",
                "column of the target, by name or number (0 is the first, -1 the last, which is the default); "
                "repeat it for several values",
                dest="targets",
            ),
            _columns("--drop", "column to leave out, likewise; may be repeated", default=[]),
            _like("use the labels and the number of inputs of this data file: for a test file"),
            _argument(
                "--header",
                "whether the first line names the columns (default: if none of it is a number)",
                choices=("auto", "yes", "no"),
                default="auto",
            ),
            _argument(
                "--delimiter", "character between columns, or 'tab' (default: ',')", type=_delimiter, default=","
            ),
            _one_hot(
                "column of categories, by name or number, which becomes inputs of 0 and 1; may be repeated; '*': all "
                "that hold text"
            ),
            _gaps(),
            _group(),
            _argument("--scale", "factor on every input, e.g. 0.00392157 for pixels", type=float, default=1.0),
            _count(
                "--classes",
                "the target is a class: a whole number or text (default); N classes, numbered from 0 if they are "
                "numbers",
                nargs="?",
                alternative=True,
            ),
            _values("the targets are values", alternative=True),
        ),
    ),
    Importer(
        "import_parquet",
        "Parquet and Arrow (Feather) files (needs pyarrow)",
        (
            _path("file", "the table"),
            _OUT,
            _columns(
                "--target", "column of the target (default: the last); repeat it for several values", dest="targets"
            ),
            _columns("--drop", "column to leave out; may be repeated", default=[]),
            _like("use the categories, labels and numbers for gaps of this data file: for a test file"),
            _gaps(),
            _group(),
            _values("the targets are values, not classes"),
        ),
    ),
    Importer(
        "import_npy",
        "NumPy arrays whose first axis is the sample",
        (
            _given("--inputs", "the inputs: (samples, features ...)"),
            _given(
                "--targets", "integers or booleans (samples,) for classes, or numbers (samples, outputs) for values"
            ),
            _OUT,
            _CLASSES,
            _BYTE_SCALE,
        ),
    ),
    Importer(
        "import_libsvm",
        "LIBSVM files (label index:value ...), plain or gzip",
        (
            _path("file", "the samples"),
            _OUT,
            _count("--features", "number of inputs (default: the largest index)"),
            _like("use the number of inputs and the labels of this data file: for a test file"),
            _values("the labels are values, not classes"),
            _argument(
                "--sparse", "leave zeros out of the data file, too (default: inputs are dense)", action="store_true"
            ),
            _argument("--first-index", "index of the first input (default: 1)", type=int, choices=(0, 1), default=1),
        ),
    ),
    Importer(
        "import_images",
        "a folder of images for each class (needs Pillow)",
        (
            _path("folder", "folder with a folder for each class", metavar="FOLDER"),
            _OUT,
            _argument("--size", "cut and scale all images to this size", type=_size, metavar="ROWSxCOLUMNS"),
            _argument("--color", "default: as the first image is", choices=("grey", "rgb")),
            _like("use the classes, the size and the colors of this data file: for a test file"),
            _per_file("images"),
        ),
    ),
    Importer(
        "import_text",
        "text, plain or gzip: windows of characters or bytes, and what follows as the class",
        (
            _path("file", "the text"),
            _OUT,
            _argument(
                "--tokens",
                "what is numbered (default: characters)",
                choices=("characters", "bytes"),
                default="characters",
            ),
            _count("--window", "tokens of a sample (default: 16)", default=16),
            _count("--stride", "tokens from a sample to the next (default: 1)", default=1),
            _path("--test-out", "test file to write", metavar="FILE.h5"),
            _argument("--test-fraction", "how much of the end of the text goes there", type=float, metavar="NUMBER"),
            _like("use the characters and the window of this data file: for a test file"),
        ),
    ),
    Importer(
        "import_wav",
        "recordings of speech: 40 log mel energies every 10 ms, in a context of 11 frames",
        (
            _path("source", "a WAV file, a directory of them, or a tar of them", metavar="SOURCE"),
            _OUT,
            _argument(
                "--test-speakers",
                "speakers whose recordings go into the test file",
                type=_names,
                metavar="NAME,...",
                default=(),
            ),
            _path("--test-out", "test file to write", metavar="FILE.h5"),
            _path(
                "--table",
                "labels, numbers or texts: columns file and label, if wanted start, end (seconds) and speaker",
                metavar="FILE.csv",
            ),
            _argument(
                "--labels",
                "without a table, where labels come from: names, label_speaker_number.wav (default), or the folders of "
                "SOURCE",
                choices=("names", "folders"),
                default="names",
            ),
            _count("--states", "parts of a label that are classes of their own (default: 3; with --table 1)"),
            _count("--context", "frames of a sample, an odd number (default: 11)"),
            _count("--rate", "resample what has another rate (default: refuse it)", metavar="HZ"),
            _CLASSES,
            _like("normalise by the mean and deviation of this data file: for a test file"),
            _per_file("recordings of a directory"),
        ),
    ),
)
