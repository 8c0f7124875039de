"""Small checkpoints for the tests to look at, damage and write over."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np

from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.schema import CheckpointInfo, library_versions
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.index.layout import Layout, Tensor

LAYOUT = Layout((Tensor("dense2/weights", (5, 7)), Tensor("dense2/bias", (5,)), Tensor("dense1/weights", (3, 5))))


def make_info(step: int = 123, **fields) -> CheckpointInfo:
    holes = (7, 118) if step > 118 else ()
    given = {
        "configuration": json.dumps({"run": {"seed": 1}, "note": "π and \n a new line"}),
        "step": step,
        "samples": 128 * step,
        "shard_versions": (120, 123),
        "shards": 2,
        "replicas": 3,
        "partitions": 1,
        "input_shape": (28, 28),
        "classes": 10,
        "frontier": step + len(holes),
        "total": 1000,
        "holes": holes,
        "done": (step // 3, step // 3, step - 2 * (step // 3)),
        "libraries": library_versions("MPICH Version: 4.3\nbuilt somewhere\0"),
    }
    return CheckpointInfo(**(given | fields))


def write(run: Path, step: int = 123, layout: Layout = LAYOUT, fill: float = 0.0, **fields) -> Path:
    with CheckpointWriter(checkpoint_path(run, step), layout, ("parameters", "accumulator")) as writer:
        for number, vector in enumerate(("parameters", "accumulator")):
            values = np.arange(layout.size, dtype=np.float32) + np.float32(fill + 1000 * number)
            writer.write(vector, 0, values)
        return writer.commit(make_info(step=step, **fields))


def as_version_1(file: h5py.File) -> None:
    """Make an open checkpoint what the first version of the format was: without checksums."""
    del file["checksums"]
    file.attrs.modify("format_version", 1)


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a program, with everything in this file at hand, in a process of its own."""
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\nfrom unit.checkpoint_files import *\n"
    command = [sys.executable, "-c", start + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def read_all(path: Path) -> None:
    """Read every element that a checkpoint has."""
    with Checkpoint.open(path) as checkpoint:
        for vector in checkpoint.vectors:
            checkpoint.read(vector, 0, np.empty(checkpoint.layout.size, np.float32))
