"""What a user can get wrong: every rank leaves the run with an error, one rank tells it, and nothing is touched.

The same from the launcher's side, with exit codes, is in ``failure/test_bad_input.py``.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from parallel import tiny

from dbmpi.checkpoint import leftovers
from dbmpi.checkpoint.directory import checkpoint_path, shard_path
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.errors import ToldElsewhere, UserError
from dbmpi.mpi import waiting
from dbmpi.runs.training import train

EXAMPLES = Path(__file__).parents[2] / "examples"
Changes = dict[str, dict[str, object]]


def assert_told_once(comm, run: Run, *words: str) -> None:
    with pytest.raises(UserError) as raised:
        train(run, comm)
    told = comm.allgather(None if isinstance(raised.value, ToldElsewhere) else str(raised.value))
    messages = [message for message in told if message]
    assert len(messages) == 1, told
    assert all(word in messages[0] for word in words), messages[0]


@pytest.mark.parallel([1, 3])
def test_a_mistake_is_raised_on_every_rank_and_told_by_one(comm, place) -> None:
    """And the communicator is as good as before: the last run succeeds."""
    train(tiny.describe(place, optimizer={"epochs": 1}), comm)
    if comm.rank == 0:
        good = np.zeros((8, tiny.FEATURES)), np.arange(8) % tiny.CLASSES
        tiny.write_file(place / "wide.h5", np.zeros((8, 9)), good[1])
        tiny.write_file(place / "images.h5", np.zeros((8, 2, 5, 6)), good[1])
        tiny.write_file(place / "label.h5", good[0], good[1] + 1)
        tiny.write_file(place / "five.h5", good[0], good[1], classes=5)
        tiny.write_file(place / "nan.h5", np.where(np.eye(8, tiny.FEATURES) > 0, np.nan, good[0]), good[1])
        tiny.write_file(place / "other.h5", *good)
        tiny.write_file(place / "values.h5", good[0], np.ones((8, 3), np.float32), classes=None)
        whole = (place / "train.h5").read_bytes()
        (place / "torn.h5").write_bytes(whole[: len(whole) // 2])
        (place / "text.h5").write_text("no HDF5")
        (place / "file").write_text("")
        shutil.copytree(place / "run", place / "torn", symlinks=True)
        for path in (place / "torn" / "checkpoints").glob("step-*.h5"):
            path.write_bytes(path.read_bytes()[:-500])
        left = checkpoint_path(place / "run", 999)
        leftovers.note(left, "0123abcd")
        shard_path(left, 1, 2, "0123abcd").write_text("what a killed run has left")
    waiting.barrier(comm, "the files")
    fresh: Changes = {"run": {"directory": place / "fresh"}}
    local = {"layers": [{"type": "local", "maps": 2, "field": [3, 7]}, *tiny.LAYERS]}
    mistakes: list[tuple[tuple[str, ...], Changes]] = [
        (("no such data file", "dbmpi data import"), fresh | {"data": {"train": place / "absent.h5"}}),
        (("is not an HDF5 file", "dbmpi data import"), fresh | {"data": {"train": place / "text.h5"}}),
        (("torn.h5", "damaged"), fresh | {"data": {"train": place / "torn.h5"}}),
        (("test.h5: samples have shape (6,)", "(9,)"), fresh | {"data": {"train": place / "wide.h5"}}),
        (("label 3 of sample 2 is not a class", "from 0 to 2"), fresh | {"data": {"train": place / "label.h5"}}),
        (
            ("5 classes, but the network's last layer has 3",),
            fresh | {"data": {"train": place / "five.h5", "test": None}},
        ),
        (("sample 0 holds NaN", "finite"), fresh | {"data": {"train": place / "nan.h5"}}),
        (
            ("network.loss = 'softmax' needs classes",),
            fresh | {"data": {"train": place / "values.h5", "test": None}},
        ),
        (
            ("layer 'local1'", "(3, 7)", "(2, 5, 6)"),
            fresh | {"data": {"train": place / "images.h5", "test": None}, "network": local},
        ),
        (
            ("parameters", "'dense2/weights' of shape (7, 100000000000)", "GiB on each of", "of memory"),
            fresh | {"network": {"layers": [{"units": 10**11}, *tiny.LAYERS]}},
        ),
        (("set topology.",), fresh | {"topology": {"shards": 9}}),
        (("more than can be counted",), fresh | {"optimizer": {"epochs": 1e300}}),
        (("server.inbox_mib",), fresh | {"server": {"inbox_mib": 0.001}}),
        (("cannot be used as the run directory",), {"run": {"directory": place / "file" / "run"}}),
        (("nothing is overwritten", 'checkpoint.resume = "auto"'), {"checkpoint": {"resume": "never"}}),
        (("a checkpoint of another network", "is 7x6 in the file"), {"network": {"layers": [{"units": 3}]}}),
        (("optimizer.batch_size = 6",), {"optimizer": {"batch_size": 7}}),
        (("run.seed = 3",), {"run": {"seed": 4}}),
        (("it has learned from other data",), {"data": {"train": place / "other.h5"}}),
        (("no checkpoint that can be read",), {"run": {"directory": place / "torn"}}),
    ]
    before = tiny.snapshot(place)
    for words, changes in mistakes:
        assert_told_once(comm, tiny.describe(place, **changes), *words)
    assert tiny.snapshot(place) == before
    waiting.barrier(comm, "the others to look")
    result = train(tiny.describe(place, optimizer={"epochs": 2}), comm)
    with Checkpoint.open(result.checkpoint) as checkpoint:
        assert checkpoint.info.step == 14
    assert not [path for path in (place / "run" / "checkpoints").iterdir() if "999" in path.name]


@pytest.fixture
def immutable(comm, place) -> Iterator[list[Path]]:
    """An empty directory, and a run's directory of checkpoints, that nobody can write to, root included."""
    train(tiny.describe(place, optimizer={"epochs": 1}), comm)
    closed = [place / "read-only", place / "run" / "checkpoints"]
    refused = False
    if comm.rank == 0:
        closed[0].mkdir()
        refused = not all(_chattr("+i", path) for path in closed)
    try:
        if comm.allgather(refused)[0]:
            pytest.skip("chattr +i does not work here: it needs root, and a file system that has it")
        yield closed
        waiting.barrier(comm, "the others to look")
    finally:
        for path in closed if comm.rank == 0 else ():
            _chattr("-i", path)


def _chattr(flag: str, path: Path) -> bool:
    try:
        return subprocess.run(["chattr", flag, str(path)], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parallel([2])
def test_a_directory_that_cannot_be_written_to_is_told_before_the_run_begins(comm, place, immutable) -> None:
    """The checkpoints of an earlier run can be read, and the run could train for hours before the first one fails."""
    empty, checkpoints = immutable
    before = tiny.snapshot(place)
    for directory in (empty, empty / "run"):
        run = tiny.describe(place, run={"directory": directory})
        assert_told_once(comm, run, str(empty), "cannot be used as the run directory", "set run.directory")
    run = tiny.describe(place, optimizer={"epochs": 3})
    assert_told_once(comm, run, f"{checkpoints.parent}: cannot be used as the run directory")
    assert tiny.snapshot(place) == before


@pytest.mark.parallel([2])
def test_placements_that_cannot_be_are_told(comm, place) -> None:
    mistakes = [
        ({"boxes": ("0:3", "4:7")}, ("layer 'dense1': 1 of 7 outputs belong to no partition", "[3:4]", "shape (7,)")),
        ({"boxes": ("0:4", "3:7")}, ("layer 'dense1'", "overlap in [3:4]")),
    ]
    topology = {"partitions": 2, "replicas": 1, "colocate": True}
    for placed, words in mistakes:
        run = tiny.describe(place, topology=topology, placement={"layers": {"dense1": placed}})
        assert_told_once(comm, run, *words)
    run = tiny.describe(place, topology=topology, placement={"layers": {"dense7": {"split": "outputs"}}})
    assert_told_once(comm, run, "there is no layer 'dense7'", "dense1, dense2")
    assert not (place / "run").exists()


@pytest.mark.parallel([3])
def test_own_layers_that_cannot_be_are_told(comm, place) -> None:
    source = (EXAMPLES / "own_layer.py").read_text()
    wrong = source.replace("largest_piece(task", "return task.outputs.astype(float)[:1]; largest_piece(task")
    assert wrong != source
    if comm.rank == 0:
        (place / "no_layer.py").write_text("import dbmpi\nclass Layer:\n    pass\n")
        (place / "wrong_layer.py").write_text(wrong)
    waiting.barrier(comm, "the files")
    mistakes = [
        ({"type": "no_layer:Layer"}, ("layer 'layer1': no_layer:Layer is no layer: it has no input_box",)),
        (
            {"type": "wrong_layer:Maxout", "units": 4},
            ("layer 'maxout1': forward returns float64 (1, 3)", "'outputs', float32 (2, 3)"),
        ),
    ]
    for layer, words in mistakes:
        network = {"code": place, "layers": [layer, {"units": tiny.CLASSES}]}
        assert_told_once(comm, tiny.describe(place, network=network), *words)
    assert not (place / "run").exists()
