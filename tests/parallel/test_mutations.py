"""Damaged checkpoints, loaded in every way: each change is refused in a sentence, or changes nothing that is computed.

``DBMPI_TEST_MUTATIONS`` is the number of changes to each kind of checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parallel import mutations, tiny

from dbmpi.checkpoint import summary
from dbmpi.checkpoint.directory import shard_files
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.data.source import Source
from dbmpi.errors import RunFailed, UserError
from dbmpi.runs.inference import Inference
from dbmpi.runs.training import train

COUNT = int(os.environ.get("DBMPI_TEST_MUTATIONS", "40"))
METHODS = {
    "downpour": {},
    "sandblaster": {"memory": 3, "deterministic": True, "l2": 0.01, "gtol": 0, "ftol": 0},
}


def describe(place: Path, method: str, epochs: int, directory: str, compression: str = "none") -> Run:
    return tiny.describe(
        place,
        run={"directory": place / directory, "seed": 3},
        optimizer={"method": method, "batch_size": 20, "epochs": epochs, "rule": "adagrad"},
        sandblaster=METHODS[method],
        checkpoint={"compression": compression},
    )


def evaluated(run: Run) -> list[np.ndarray]:
    """Return the outcome on the held-out samples, and the predictions."""
    found = Inference(run.run.directory)
    try:
        with Source.open(run.data.test, 100) as source:
            outcome = found.evaluate(source)
            return [np.array(outcome[:3]), *(rows.copy() for _, rows in found.predict(source))]
    finally:
        found.free()


def resumed(run: Run, comm) -> list[np.ndarray]:
    """Return all vectors at the end of a run that goes on."""
    result = train(run, comm)
    with Checkpoint.open(result.checkpoint) as checkpoint:
        vectors = [np.empty(checkpoint.layout.size, np.float32) for _ in checkpoint.vectors]
        for name, vector in zip(checkpoint.vectors, vectors, strict=True):
            checkpoint.read(name, 0, vector)
        info = checkpoint.info
    return [np.array([info.step, info.samples, info.frontier, info.total, *info.holes, *info.done]), *vectors]


@pytest.mark.parallel([1], timeout=60 + 3 * COUNT)
@pytest.mark.parametrize("kind", ["version 1", "plain", "compressed"])
@pytest.mark.parametrize("method", METHODS)
def test_damage_is_refused_or_does_no_harm(comm, place, method: str, kind: str) -> None:
    if kind == "compressed":
        pytest.importorskip("hdf5plugin", reason="needs hdf5plugin: the extra dbmpi[compression]")
    train(describe(place, method, 4, "first", "zstd" if kind == "compressed" else "none"), comm)
    file = Path(os.path.realpath(place / "first" / "checkpoints" / "latest"))
    if kind == "version 1":
        with mutations.h5py.File(file, "r+") as opened:
            mutations.as_version_1(opened)
    run = describe(place, method, 6, "damaged")

    def renew() -> Path:
        shutil.rmtree(place / "damaged", ignore_errors=True)
        shutil.copytree(place / "first", place / "damaged", symlinks=True)
        return place / "damaged" / "checkpoints" / file.name

    path = renew()
    ways = {
        "inspect": lambda: summary.describe(path),
        "use": lambda: evaluated(run),
        "resume": lambda: resumed(run, comm),
    }
    expected = {name: way() for name, way in ways.items()}
    random = np.random.default_rng(int(os.environ.get("DBMPI_TEST_SEED", "1")))
    names = [(each.name, name) for each in (file, *sorted(shard_files(file))) for name in mutations.places(each)]
    refused = 0
    for _ in range(COUNT):
        path = renew()
        changed, place_in_file = names[random.integers(len(names))]
        told = f"{changed}: {place_in_file}: {mutations.mutate(path.with_name(changed), place_in_file, random)}"
        for name, way in ways.items():
            found = attempt(way, f"{told}: {name}")
            if isinstance(found, str):
                refused += 1
                assert len(found) > 20, told
                assert kind == "version 1" or str(path) in found, (told, name, found)
            elif kind != "version 1" and name != "inspect":
                assert all(map(np.array_equal, found, expected[name])), (told, name)
    assert refused > COUNT  # else nothing was changed


def attempt(way: Callable[[], Any], told: str) -> Any:
    """Return what comes out, or the sentence by which it is refused; anything else fails the test."""
    try:
        return way()
    except (UserError, RunFailed) as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{told} ends in {error!r}") from error
