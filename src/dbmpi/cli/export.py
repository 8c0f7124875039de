"""``dbmpi export``: the parameters, or the network, of a checkpoint for other programs."""

from __future__ import annotations

import argparse
import time
from contextlib import suppress
from pathlib import Path

from dbmpi.cli import options
from dbmpi.errors import UserError

SUMMARY = (
    "write a checkpoint's parameters, or its network, for NumPy, PyTorch, HDF5 or ONNX, or records for TensorBoard"
)

_EVERY = 2.0
"""Seconds between two looks at the records of a run that is followed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run directory (its latest checkpoint)"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write: .npz, .safetensors, .h5 for a checkpoint of one file, or .onnx for the network itself",
    )
    where.add_argument(
        "--tensorboard",
        type=Path,
        metavar="DIR",
        help="write the records of a run as event files for TensorBoard, to a directory of the run's name in DIR",
    )
    parser.add_argument(
        "--follow", action="store_true", help="with --tensorboard: go on while the run does, e.g. for a live view"
    )
    parser.add_argument(
        "--names",
        choices=("dbmpi", "torch"),
        default="dbmpi",
        help="names of the arrays: as in the checkpoint, or as in a state_dict of PyTorch (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE, or event files, that exist")
    options.add_allow_code(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the file that these `arguments` name, say so, and return the exit code."""
    if arguments.tensorboard is not None:
        return _events(arguments)
    if arguments.follow:
        raise UserError("--follow: is for --tensorboard, and a checkpoint does not grow; leave it out")

    from dbmpi.formats.export import export

    path = export(
        arguments.checkpoint,
        arguments.out,
        names=arguments.names,
        code=arguments.allow_code,
        force=arguments.force,
    )
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def _events(arguments: argparse.Namespace) -> int:
    """Write the records of a run as event files."""
    options.refuse_configuration(arguments.checkpoint, "export", "the directory of a run")

    from dbmpi.checkpoint.run_presence import RunPresence
    from dbmpi.monitor.event_files import SUFFIX, EventFiles
    from dbmpi.monitor.records import record_files, without_records
    from dbmpi.monitor.tail import RecordTail

    run = arguments.checkpoint
    out = arguments.tensorboard / run.resolve().name
    if not record_files(run):
        raise UserError(without_records(run))
    old = sorted(out.glob(f"*{SUFFIX}"))
    if old and not arguments.force:
        raise UserError(f"{out}: has event files of a run already; give --tensorboard another directory, or --force")
    tail, presence = RecordTail(run, whole=True), RunPresence(run)
    with EventFiles(out) as events, suppress(KeyboardInterrupt):
        while True:
            working = presence.look()
            events.add(tail.poll())
            events.flush()
            for path in old:  # not before the new ones are there
                path.unlink(missing_ok=True)
            if not (arguments.follow and working):
                break
            time.sleep(_EVERY)
    print(f"{out}: {events.written:,} values; to see them: tensorboard --logdir {arguments.tensorboard}")
    return 0
