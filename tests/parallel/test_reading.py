"""Runs that read their samples from the file while they learn: the same results as from memory."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from parallel import tiny

from dbmpi.errors import UserError
from dbmpi.mpi import waiting
from dbmpi.runs.training import train

SAMPLES, CHUNK = 40 * 15, 16
LAYOUTS = {
    "contiguous": {},
    "chunked": {"chunks": (CHUNK, 4)},
    "gzip": {"chunks": (CHUNK, tiny.FEATURES), "compression": "gzip", "shuffle": True},
    "lzf": {"chunks": (CHUNK, tiny.FEATURES), "compression": "lzf"},
}


@pytest.fixture
def files(comm, shared_path):
    """The same samples in files of several layouts, in directories of their own."""
    if comm.rank == 0:
        tiny.write_data(shared_path, SAMPLES)
        with h5py.File(shared_path / "train.h5") as file:
            inputs, targets, classes = file["inputs"][()], file["targets"][()], file["targets"].attrs["classes"]
        for name, layout in LAYOUTS.items():
            (shared_path / name).mkdir()
            tiny.write_data(shared_path / name, SAMPLES)
            with h5py.File(shared_path / name / "train.h5", "w") as file:
                file.create_dataset("inputs", data=inputs, **layout)
                file["targets"] = targets
                file["targets"].attrs["classes"] = classes
    waiting.barrier(comm, "the data")
    return shared_path


def learned(place, comm, *, keep: str, shuffle, epochs: float = 2.3, shards: int = 1):
    """Return the parameters after a run of one replica, cut over the other ranks."""
    run = tiny.describe(
        place,
        run={"directory": place / f"run-{keep}-{shuffle}"},
        data={"keep": keep, "shuffle": shuffle},
        topology={"shards": 1, "replicas": 1, "partitions": max(comm.size - 1, 1), "colocate": comm.size == 1},
        optimizer={"epochs": epochs},
    )
    return tiny.vectors(train(run, comm).checkpoint)["parameters"]


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_from_its_file_equals_one_from_memory_bit_for_bit(comm, files, layout) -> None:
    packed = layout in ("gzip", "lzf")
    expected = learned(files / "contiguous", comm, keep="memory", shuffle=CHUNK if packed else "samples")
    np.testing.assert_array_equal(learned(files / layout, comm, keep="file", shuffle="auto"), expected)


@pytest.mark.parallel([1, 2])
def test_a_run_goes_on_in_the_order_that_it_began_with(comm, files) -> None:
    place = files / "gzip"
    for epochs in (0.6, 1.7, 2.3):  # resumes
        found = learned(place, comm, keep="file", shuffle="auto", epochs=epochs)
    np.testing.assert_array_equal(found, learned(files / "contiguous", comm, keep="memory", shuffle=CHUNK))
    run = tiny.describe(
        place,
        run={"directory": place / "run-file-auto"},
        data={"keep": "file", "shuffle": "samples"},
        topology={"shards": 1, "replicas": 1, "colocate": comm.size == 1},
    )
    message = r"was written with data\.shuffle = 16, this run has samples|rank 0 reports a mistake"
    with pytest.raises(UserError, match=message):
        train(run, comm)


@pytest.mark.parallel([4])
def test_replicas_share_what_they_unpack_and_learn_every_sample_once(comm, files) -> None:
    run = tiny.describe(
        files / "gzip",
        data={"keep": "file"},
        topology={"shards": 1, "replicas": 3},
        optimizer={"epochs": 3},
    )
    result = train(run, comm)
    assert result.samples == 3 * SAMPLES


@pytest.mark.parallel([1, 3])
def test_copies_on_the_hosts_own_disk_are_made_once_and_read(comm, files) -> None:
    place = files / "gzip"
    expected = learned(place, comm, keep="file", shuffle="auto")
    for turn in range(2):
        run = tiny.describe(
            place,
            run={"directory": place / f"run-copied-{turn}"},
            data={"keep": "file", "copy_to": files / "disk" / "of-host"},
            topology={"shards": 1, "replicas": 1, "partitions": max(comm.size - 1, 1), "colocate": comm.size == 1},
            optimizer={"epochs": 2.3},
        )
        found = tiny.vectors(train(run, comm).checkpoint)["parameters"]
        np.testing.assert_array_equal(found, expected)
        assert len(list((files / "disk" / "of-host").iterdir())) == 2
