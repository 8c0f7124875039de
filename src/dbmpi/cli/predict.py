"""``dbmpi predict``: outputs and classes of a trained network for a data file."""

from __future__ import annotations

import argparse
from pathlib import Path

from dbmpi.cli import inference
from dbmpi.errors import UserError

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
    _check_out(arguments.out, arguments.data, arguments.force)
    inference.prepare()

    import numpy as np

    import dbmpi
    from dbmpi.checkpoint.arrayfile import ArrayFile
    from dbmpi.data.source import Source

    trained = inference.load(arguments.checkpoint, arguments.allow_code)
    _check_out(arguments.out, trained.path, arguments.force)
    units, classifies = trained.units, trained.info.classes > 0
    with Source.open(arguments.data, inference.MEMORY_MIB, targets="optional") as source:
        trained.expect(source, targets=False)
        source.validate(full=True)
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
            for indices in inference.batches(source, arguments.batch_size, "predicting"):
                outputs = trained.network.predict(trained.parameters, source.inputs(indices))
                first = int(indices[0])
                rows = np.ascontiguousarray(outputs.T, np.float32)
                out.write("outputs", first * units, rows.reshape(-1))
                if classifies:
                    out.write("classes", first, outputs.argmax(axis=0).astype(np.int32))
            out.commit()
    print(f"{arguments.out}: outputs {source.samples:,} x {units:,}" + (", classes" if classifies else ""))
    return 0


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
