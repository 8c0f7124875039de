"""Runs of several shards that are killed while they write, and readers that look meanwhile: only whole checkpoints."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from failure.jobs import FOR_EVER, Jobs
from harness.programs import Program

from dbmpi.checkpoint import directory
from dbmpi.checkpoint.reader import Checkpoint

KILLS = int(os.environ.get("DBMPI_TEST_KILLS", "2"))
"""How often each run is killed; each time takes some seconds."""
WRITES = int(os.environ.get("DBMPI_TEST_WRITES", "20"))
"""Checkpoints that a run writes under the eyes of a reader."""
ALWAYS = f"optimizer.epochs={FOR_EVER}", "checkpoint.every_seconds=0.001", "network.layers.0.units=400"
SANDBLASTER = "optimizer.method=sandblaster", "sandblaster.gtol=0", "sandblaster.ftol=0", "sandblaster.l2=0.01"
BATCHES = ("sandblaster.batch_portions=3",)
RUNS = {
    "downpour": ("optimizer.rule=adagrad", "topology.shards=2"),
    "sandblaster": (*SANDBLASTER, *BATCHES, "topology.shards=2"),
    "three shards": ("topology.shards=3", "topology.colocate=true", "optimizer.rule=adagrad"),
    "compressed": ("topology.shards=2", "optimizer.rule=adagrad", "checkpoint.compression=zstd"),
    "one file": ("topology.shards=2", "checkpoint.layout=single"),
}


def others(jobs: Jobs) -> set[str]:
    """Return the files in the directory of the checkpoints that belong to none of them; all of these are whole."""
    place = jobs.run_directory / "checkpoints"
    own = set(directory.POINTERS)
    for path in directory.checkpoints(place):
        with Checkpoint.open(path) as checkpoint:
            checkpoint.verify()
            own |= {file.name for file in checkpoint.files}
    return {path.name for path in place.iterdir()} - own


def wait_for_new_files(jobs: Jobs, program: Program) -> None:
    place = jobs.run_directory / "checkpoints"
    before = set(place.iterdir()) if (place / "latest").exists() else set()
    jobs.wait_for(program, lambda: (place / "latest").exists() and not set(place.iterdir()) <= before)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_is_killed_while_it_writes_leaves_a_whole_checkpoint(jobs: Jobs, kind: str) -> None:
    if kind == "compressed":
        pytest.importorskip("hdf5plugin", reason="needs hdf5plugin: the extra dbmpi[compression]")
    moments, steps, left = random.Random(kind), [0], 0
    for _ in range(KILLS):
        program = jobs.start(3, *ALWAYS, *RUNS[kind])
        wait_for_new_files(jobs, program)
        time.sleep(moments.uniform(0, 0.4))
        program.send(program.processes(), signal.SIGKILL)
        jobs.launch.finish(program, 40)
        left += bool(others(jobs))
        with jobs.checkpoint() as checkpoint:
            assert np.isfinite(checkpoint.parameters()).all()
            assert checkpoint.info.step >= steps[-1]
            steps.append(checkpoint.info.step)
    print(f"{kind}: {KILLS} kills, {left} of them with other files left, {steps[-1]} steps")
    settings = [each for each in RUNS[kind] if not each.startswith("topology")]
    done = jobs(None, *settings, ALWAYS[-1], f"optimizer.epochs={steps[-1] // 7 + 8}")
    assert done.returncode == 0, done.transcript
    assert f"going on after {steps[-1]:,} steps" in done.stdout, done.transcript
    assert others(jobs) == set()


def read_by_h5py(path: Path) -> bool | None:
    """Read all arrays as any program would; return whether none is NaN, or None if it was deleted meanwhile."""
    try:
        inode, found = path.stat().st_ino, []
    except FileNotFoundError:
        return None
    try:
        with h5py.File(path, "r", locking=False) as file:
            file.visititems(lambda _, node: found.append(node) if isinstance(node, h5py.Dataset) else None)
            arrays = [node[()] for node in found if node.dtype.kind == "f"]
            sources = {source.file_name for node in found if node.is_virtual for source in node.virtual_sources()}
            assert sources == {name.decode() for name in file["shards/files"][()]}
        if path.stat().st_ino != inode:
            return None
    except (OSError, KeyError):
        assert not path.exists() or path.stat().st_ino != inode
        return None
    return all(np.isfinite(array).all() for array in arrays)


@pytest.mark.parametrize("kind", ["downpour", "sandblaster"])
def test_a_reader_sees_only_whole_checkpoints_while_a_run_writes(jobs: Jobs, kind: str) -> None:
    """By dbmpi always; by h5py, if the file still has its name when all of it is read."""
    place, seen, reads, deleted = jobs.run_directory / "checkpoints", set(), 0, 0
    program = jobs.start(3, *ALWAYS, *RUNS[kind], "checkpoint.keep=1")
    jobs.wait_for_checkpoint(program)
    while len(seen) < WRITES:
        assert program.returncode is None, program.stdout + program.stderr
        path = directory.read_pointer(place)
        assert path is not None
        whole = read_by_h5py(path)
        assert whole is not False, path
        deleted += whole is None
        for each in (jobs.run_directory, place / directory.LATEST):
            with Checkpoint.open(each) as checkpoint:
                assert checkpoint.notice == ""
                checkpoint.verify()
                assert np.isfinite(checkpoint.parameters()).all()
                seen.add(checkpoint.info.step)
        reads += 1
    program.signal(signal.SIGTERM, 0)
    done = jobs.finish(program)
    assert done.returncode == 128 + signal.SIGTERM, done.transcript
    print(f"{kind}: {WRITES} checkpoints, {3 * reads} reads, {deleted} of one that was deleted meanwhile")
    assert others(jobs) == set()
