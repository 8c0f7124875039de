"""``dbmpi predict``: outputs and classes of a trained network for a data file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.cli import inference
from dbmpi.errors import UserError

if TYPE_CHECKING:
    from dbmpi.data.source import Source
    from dbmpi.inference import Inference

SUMMARY = "write the outputs of a checkpoint for a data file to an HDF5 file"

FORMAT = "dbmpi-predictions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    inference.add_arguments(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.h5", help="HDF5 file to write: /outputs and, if any, /classes"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE.h5 if it exists")


def run(arguments: argparse.Namespace) -> int:
    """Predict, write the file and say so."""
    inference.prepare()

    from dbmpi.data.source import Source

    with inference.opened(arguments) as network:
        trained = network.trained
        with network.together("opening the data"):
            if network.is_first:
                _check_out(arguments.out, arguments.data, arguments.force)
                _check_out(arguments.out, trained.path, arguments.force)
            source = Source.open(
                arguments.data, inference.MEMORY_MIB, targets="optional", reading=inference.reading(trained, arguments)
            )
        with source:
            if network.is_first:
                inference.tell(source)
            with network.together("looking at the data", inference.LONG):
                trained.expect(source, targets=False)
                if network.is_first:
                    source.validate(full=True)
            if network.is_first:
                _write(arguments, network, source)
            else:
                for _ in network.predict(source):
                    pass
    return 0


def _write(arguments: argparse.Namespace, network: Inference, source: Source) -> None:
    """Write the file, on the first rank, while all predict."""
    import numpy as np

    import dbmpi
    from dbmpi.checkpoint.arrayfile import ArrayFile

    trained = network.trained
    units, classifies = trained.units, trained.info.classes > 0
    with ArrayFile(arguments.out) as out:
        out.set_attribute("format", FORMAT)
        out.set_attribute("format_version", 1)
        out.set_attribute("dbmpi", dbmpi.__version__)
        out.set_attribute("checkpoint", str(trained.path))
        out.set_attribute("step", trained.info.step)
        out.set_attribute("data", str(arguments.data))
        out.create("outputs", (source.samples, units), np.float32)
        if classifies:
            out.create("classes", (source.samples,), np.int32)
        out.check_room()
        with inference.progress(source, "predicting", True) as shown:
            for first, rows in network.predict(source):
                out.write("outputs", first * units, rows.reshape(-1))
                if classifies:
                    out.write("classes", first, rows.argmax(axis=1).astype(np.int32))
                shown(len(rows))
        out.commit()
    print(f"{arguments.out}: outputs {source.samples:,} x {units:,}" + (", classes" if classifies else ""))


def _check_out(out: Path, read: Path, force: bool) -> None:
    """Refuse to overwrite what is read, and what exists unless it is meant."""
    if not out.exists():
        return
    if not out.is_file():
        raise UserError(f"{out}: is not a file; expected the name of an HDF5 file to write")
    if read.exists() and out.samefile(read):
        raise UserError(f"{out}: is the file to read from; give --out another name")
    if not force:
        raise UserError(f"{out}: exists and is not overwritten; give --out another name, or --force")
