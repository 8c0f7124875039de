"""Small checkpoints for the tests to look at, damage and write over."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import h5py
import numpy as np

from dbmpi.checkpoint import shard_boxes
from dbmpi.checkpoint.directory import checkpoint_path, shard_path
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.schema import CheckpointInfo, library_versions
from dbmpi.checkpoint.sharded_writer import write_shard, write_whole
from dbmpi.checkpoint.snapshot import Snapshot
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.index.layout import Layout, Tensor
from dbmpi.replica.arrangement import Arrangement

LAYOUT = Layout((Tensor("dense2/weights", (5, 7)), Tensor("dense2/bias", (5,)), Tensor("dense1/weights", (3, 5))))
VECTORS = ("parameters", "accumulator")


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


def values_of(layout: Layout, vectors: Sequence[str] = VECTORS, fill: float = 0.0) -> dict[str, np.ndarray]:
    """Return numbers for each whole vector, all different."""
    return {name: np.arange(layout.size) + fill + 1000 * number for number, name in enumerate(vectors)}


def write_sharded(
    run: Path,
    arrangement: Arrangement,
    step: int = 123,
    dtype: str = "f4",
    fill: float = 0.0,
    identity: str = "0123abcd",
    objective_state: Mapping[str, np.ndarray] = MappingProxyType({}),
    keep: int | None = None,
    compression: str = "none",
) -> Path:
    """Write a checkpoint of as many files as an arrangement has shards, as a run does."""
    path, facts = checkpoint_path(run, step), []
    path.parent.mkdir(parents=True, exist_ok=True)
    for shard, held in enumerate(arrangement.ranges):
        vectors = {name: np.empty(len(held), dtype) for name in VECTORS}
        for name, values in values_of(arrangement.layout, fill=fill).items():
            for start, local, length in arrangement.pieces(held):
                vectors[name][local : local + length] = values[start : start + length]
        file = shard_path(path, shard, len(arrangement.ranges), identity)
        facts.append(write_shard(file, vectors, Snapshot(vectors), lambda *_: None, compression=compression))
    info = make_info(step=step, shards=len(facts), shard_versions=(step,) * len(facts))
    boxes = shard_boxes.of_arrangement(arrangement)
    return write_whole(
        path,
        arrangement.layout,
        boxes,
        facts,
        identity,
        info,
        dtype=np.dtype(dtype),
        keep=keep,
        objective_state=objective_state,
        compression=compression,
    )
