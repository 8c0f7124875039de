"""``dbmpi data import``: other formats to data files."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbmpi.cli.options import count

if TYPE_CHECKING:
    from dbmpi.data.importers.reading import Progress

SUMMARY = "convert data to the HDF5 files that dbmpi learns from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "make a data file from another format"
    kinds = actions.add_parser("import", help=text, description=text).add_subparsers(
        title="kinds", metavar="KIND", required=True
    )
    _add(
        kinds,
        "digits",
        "the 1,797 handwritten digits of scikit-learn: DIR/digits-train.h5 and DIR/digits-test.h5",
        _run_digits,
        ("--out", {"type": Path, "required": True, "metavar": "DIR", "help": "directory for the two files"}),
    )
    _add(
        kinds,
        "idx",
        "IDX files as those of MNIST, plain or gzip",
        _run_idx,
        ("--images", {"type": Path, "required": True, "metavar": "FILE", "help": "the images"}),
        ("--labels", {"type": Path, "required": True, "metavar": "FILE", "help": "their labels"}),
        _OUT,
        _CLASSES,
        _BYTE_SCALE,
    )
    csv = _add(
        kinds,
        "csv",
        "tables, one sample a line, plain or gzip; all but the target are numbers",
        _run_csv,
        ("file", {"type": Path, "metavar": "FILE", "help": "the table"}),
        _OUT,
        (
            "--target",
            {
                "action": "append",
                "metavar": "COLUMN",
                "dest": "targets",
                "help": "column of the target, by name or number (0 is the first, -1 the last, which is the default); "
                "repeat it for several values",
            },
        ),
        (
            "--drop",
            {
                "action": "append",
                "metavar": "COLUMN",
                "default": [],
                "help": "column to leave out, likewise; may be repeated",
            },
        ),
        (
            "--like",
            {
                "type": Path,
                "metavar": "TRAIN.h5",
                "help": "use the labels and the number of inputs of this data file: for a test file",
            },
        ),
        (
            "--header",
            {
                "choices": ("auto", "yes", "no"),
                "default": "auto",
                "help": "whether the first line names the columns (default: if none of it is a number)",
            },
        ),
        ("--delimiter", {"default": ",", "help": "character between columns, or 'tab' (default: ',')"}),
        ("--scale", {"type": float, "default": 1.0, "help": "factor on every input, e.g. 0.00392157 for pixels"}),
    )
    _add_kind(
        csv,
        "the target is a class: a whole number or text (default); N classes, numbered from 0 if they are numbers",
        "the targets are values",
    )
    _add(
        kinds,
        "npy",
        "NumPy arrays whose first axis is the sample",
        _run_npy,
        (
            "--inputs",
            {"type": Path, "required": True, "metavar": "FILE", "help": "the inputs: (samples, features ...)"},
        ),
        (
            "--targets",
            {
                "type": Path,
                "required": True,
                "metavar": "FILE",
                "help": "integers or booleans (samples,) for classes, or numbers (samples, outputs) for values",
            },
        ),
        _OUT,
        _CLASSES,
        _BYTE_SCALE,
    )
    _add(
        kinds,
        "libsvm",
        "LIBSVM files (label index:value ...), plain or gzip; the inputs become dense",
        _run_libsvm,
        ("file", {"type": Path, "metavar": "FILE", "help": "the samples"}),
        _OUT,
        ("--features", {"type": count, "metavar": "N", "help": "number of inputs (default: the largest index)"}),
        (
            "--like",
            {
                "type": Path,
                "metavar": "TRAIN.h5",
                "help": "use the number of inputs and the labels of this data file: for a test file",
            },
        ),
        ("--values", {"action": "store_true", "help": "the labels are values, not classes"}),
        (
            "--first-index",
            {"type": int, "choices": (0, 1), "default": 1, "help": "index of the first input (default: 1)"},
        ),
    )
    _add(
        kinds,
        "wav",
        "recordings of speech: 40 log mel energies every 10 ms, in a context of 11 frames",
        _run_wav,
        ("source", {"type": Path, "metavar": "SOURCE", "help": "a WAV file, a directory of them, or a tar of them"}),
        _OUT,
        (
            "--test-speakers",
            {"metavar": "NAME,...", "default": "", "help": "speakers whose recordings go into the test file"},
        ),
        ("--test-out", {"type": Path, "metavar": "FILE.h5", "help": "test file to write"}),
        (
            "--table",
            {
                "type": Path,
                "metavar": "FILE.csv",
                "help": "labels: columns file and label, if wanted start, end (seconds) and speaker (default: names "
                "are label_speaker_number.wav)",
            },
        ),
        (
            "--states",
            {
                "type": count,
                "metavar": "N",
                "help": "parts of a label that are classes of their own (default: 3; with --table 1)",
            },
        ),
        ("--context", {"type": count, "metavar": "N", "help": "frames of a sample, an odd number (default: 11)"}),
        ("--rate", {"type": count, "metavar": "HZ", "help": "resample what has another rate (default: refuse it)"}),
        _CLASSES,
        (
            "--like",
            {
                "type": Path,
                "metavar": "TRAIN.h5",
                "help": "normalise by the mean and deviation of this data file: for a test file",
            },
        ),
    )


def run(arguments: argparse.Namespace) -> int:
    """Import, and print what was written."""
    with _progress() as progress:
        written = arguments.run_import(arguments, progress)
    for each in written if isinstance(written, list) else [written]:
        print(each, flush=True)
    return 0


_Argument = tuple[str, dict[str, Any]]


_OUT: _Argument = ("--out", {"type": Path, "required": True, "metavar": "FILE.h5", "help": "data file to write"})
_CLASSES: _Argument = (
    "--classes",
    {"type": count, "metavar": "N", "help": "number of classes (default: the largest label plus one)"},
)
_BYTE_SCALE: _Argument = (
    "--scale",
    {"type": float, "default": 1 / 255, "help": "factor on bytes when they are used (default: 1/255)"},
)


def _add(
    kinds: Any, kind: str, text: str, run_import: Callable[..., Any], *options: _Argument
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(kind, help=text, description=f"Make a data file from {text}.")
    for name, settings in options:
        parser.add_argument(name, **settings)
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.set_defaults(run_import=run_import)
    return parser


def _add_kind(parser: argparse.ArgumentParser, classes: str, values: str) -> None:
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--classes", type=count, nargs="?", metavar="N", help=classes)
    kind.add_argument("--values", action="store_true", help=values)


def _run_digits(arguments: argparse.Namespace, progress: Progress) -> Any:
    from dbmpi.data.importers.digits import import_digits

    return import_digits(arguments.out, force=arguments.force, progress=progress)


def _run_idx(arguments: argparse.Namespace, progress: Progress) -> Any:
    from dbmpi.data.importers.idx import import_idx

    return import_idx(
        arguments.images,
        arguments.labels,
        arguments.out,
        classes=arguments.classes,
        scale=arguments.scale,
        force=arguments.force,
        progress=progress,
    )


def _run_csv(arguments: argparse.Namespace, progress: Progress) -> Any:
    from dbmpi.data.importers.csv import import_csv

    return import_csv(
        arguments.file,
        arguments.out,
        targets=arguments.targets or ("-1",),
        drop=arguments.drop,
        like=arguments.like,
        kind="values" if arguments.values else "classes",
        classes=arguments.classes,
        header=arguments.header,
        delimiter="\t" if arguments.delimiter == "tab" else arguments.delimiter,
        scale=arguments.scale,
        force=arguments.force,
        progress=progress,
    )


def _run_npy(arguments: argparse.Namespace, progress: Progress) -> Any:
    from dbmpi.data.importers.npy import import_npy

    return import_npy(
        arguments.inputs,
        arguments.targets,
        arguments.out,
        classes=arguments.classes,
        scale=arguments.scale,
        force=arguments.force,
        progress=progress,
    )


def _run_libsvm(arguments: argparse.Namespace, progress: Progress) -> Any:
    from dbmpi.data.importers.libsvm import import_libsvm

    return import_libsvm(
        arguments.file,
        arguments.out,
        features=arguments.features,
        like=arguments.like,
        kind="values" if arguments.values else "classes",
        first_index=arguments.first_index,
        force=arguments.force,
        progress=progress,
    )


def _run_wav(arguments: argparse.Namespace, progress: Progress) -> Any:
    from dbmpi.data.importers.wav import import_wav

    return import_wav(
        arguments.source,
        arguments.out,
        test_out=arguments.test_out,
        test_speakers=[name for name in arguments.test_speakers.split(",") if name],
        table=arguments.table,
        states=arguments.states,
        rate=arguments.rate,
        context=arguments.context,
        classes=arguments.classes,
        like=arguments.like,
        force=arguments.force,
        progress=progress,
    )


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Show a bar on a terminal; elsewhere the lines at the end are enough."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("importing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
