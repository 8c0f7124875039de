"""``dbmpi export``: the parameters, or the network, of a checkpoint for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from dbmpi.cli import options

SUMMARY = "write a checkpoint's parameters, or its network, for NumPy, PyTorch, HDF5 or ONNX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run directory (its latest checkpoint)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="file to write: .npz, .safetensors, .h5 for a checkpoint of one file, or .onnx for the network itself",
    )
    parser.add_argument(
        "--names",
        choices=("dbmpi", "torch"),
        default="dbmpi",
        help="names of the arrays: as in the checkpoint, or as in a state_dict of PyTorch (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE if it exists")
    options.add_allow_code(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the file that these `arguments` name, say so, and return the exit code."""
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
