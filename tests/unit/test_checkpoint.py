"""Checkpoints: what is written is read back, whatever the ranges, and what was good stays good."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.checkpoint_files import LAYOUT, make_info, run_python, write

from dbmpi.checkpoint import directory
from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.writer import CheckpointWriter, Coverage
from dbmpi.errors import RunFailed, UserError
from dbmpi.paramserver.layout import Layout, Tensor, cut

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@given(ranges=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10))))
def test_coverage_agrees_with_a_set(ranges):
    coverage, covered = Coverage(), set()
    for start, length in ranges:
        coverage.add(start, start + length)
        covered |= set(range(start, start + length))
    missing = [position for position in range(40) if position not in covered]
    gap = coverage.first_gap(40)
    assert (gap is None) == (not missing)
    if gap is not None:
        assert gap[0] == missing[0]
        assert set(range(*gap)) <= set(missing)
        assert gap[1] == 40 or gap[1] in covered


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.lists(shapes, min_size=1, max_size=4),
    dtype=st.sampled_from([np.float32, np.float64]),
    data=st.data(),
)
def test_any_ranges_that_cover_a_layout_are_read_back(tmp_path_factory, tensors, dtype, data):
    run = tmp_path_factory.mktemp("run")
    layout = Layout(tuple(Tensor(f"layer{10 - place}/w", shape) for place, shape in enumerate(tensors)))
    edges = data.draw(st.sets(st.integers(0, layout.size), max_size=6)) | {0, layout.size}
    ranges = data.draw(st.permutations(list(zip(sorted(edges), sorted(edges)[1:], strict=False))))
    values = {name: np.random.default_rng(1).random(layout.size).astype(dtype) for name in ("parameters", "b", "a")}
    with CheckpointWriter(checkpoint_path(run, 1), layout, tuple(values), dtype) as writer:
        for start, stop in ranges:
            for vector, whole in values.items():
                writer.write(vector, start, whole[start:stop])
        writer.commit(make_info(step=1))
    with Checkpoint.open(run) as checkpoint:
        assert checkpoint.layout == layout
        assert checkpoint.dtype == dtype
        assert set(checkpoint.vectors) == set(values)
        for vector, whole in values.items():
            start = data.draw(st.integers(0, layout.size))
            out = np.full(data.draw(st.integers(0, layout.size - start)), np.nan, dtype)
            checkpoint.read(vector, start, out)
            assert (out == whole[start : start + len(out)]).all()
        assert (checkpoint.parameters(dtype) == values["parameters"]).all()
    shutil.rmtree(run)


def test_the_description_survives(tmp_path):
    info = make_info()
    with Checkpoint.open(write(tmp_path)) as checkpoint:
        found = checkpoint.info
    for name in vars(info):
        if name not in ("created", "libraries"):
            assert getattr(found, name) == getattr(info, name), name
    assert found.libraries == {**info.libraries, "hdf5": h5py.version.hdf5_version}
    assert found.libraries["mpi"] == "MPICH Version: 4.3"


def test_empty_lists_and_texts_survive(tmp_path):
    empty = {"shard_versions": (), "input_shape": (), "holes": (), "done": (), "configuration": "", "classes": 0}
    with Checkpoint.open(write(tmp_path, **empty)) as checkpoint:
        assert {name: getattr(checkpoint.info, name) for name in empty} == empty


def test_a_long_configuration_survives(tmp_path):
    text = json.dumps({"layers": ["ü" * 1000] * 200})
    with Checkpoint.open(write(tmp_path, configuration=text)) as checkpoint:
        assert checkpoint.info.configuration == text


def test_arrays_are_whole_and_named_for_any_hdf5_program(tmp_path):
    path = write(tmp_path)
    with h5py.File(path) as file:
        weights = file["parameters/dense1/weights"]
        assert weights.shape == (3, 5)
        assert weights.chunks is None
        assert weights[()].ravel().tolist() == list(range(40, 55))
        assert file["state/accumulator/dense2/bias"][()].tolist() == list(range(1035, 1040))
        assert file["run/step"][()] == 123
        assert file["data/holes"][()].tolist() == [7, 118]
        assert json.loads(file["run/configuration"][()])["run"]["seed"] == 1


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="needs h5dump (Debian: hdf5-tools)")
def test_h5dump_reads_it(tmp_path):
    path = write(tmp_path)
    command = ["h5dump", "-d", "/parameters/dense2/bias", "-d", "/data/frontier", "-d", "/run/created", str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "(0): 35, 36, 37, 38, 39" in output
    assert "(0): 120" in output


def test_more_shards_than_elements(tmp_path):
    layout = Layout((Tensor("a", ()), Tensor("empty", (0, 3)), Tensor("b", (2,))))
    with CheckpointWriter(checkpoint_path(tmp_path, 1), layout) as writer:
        for part in cut(layout.size, 7):
            writer.write("parameters", part.start, np.arange(part.start, part.stop, dtype=np.float32))
        writer.commit(make_info())
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.layout == layout
        assert checkpoint.parameters().tolist() == [0, 1, 2]


def test_a_missing_range_is_never_committed(tmp_path):
    write(tmp_path, 1)
    writer = CheckpointWriter(checkpoint_path(tmp_path, 2), LAYOUT)
    writer.write("parameters", 0, np.zeros(20, np.float32))
    writer.write("parameters", 21, np.zeros(LAYOUT.size - 21, np.float32))
    with pytest.raises(ValueError, match=r"\[20, 21\) of 'parameters'"):
        writer.commit(make_info(step=2))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-000000001.h5"]


@pytest.mark.parametrize(
    ("start", "values"),
    [(0, np.zeros(3)), (0, np.zeros((2, 2), np.float32)), (-1, np.zeros(1, np.float32)), (54, np.zeros(2, np.float32))],
)
def test_a_wrong_write_is_refused(tmp_path, start, values):
    with CheckpointWriter(checkpoint_path(tmp_path, 1), LAYOUT) as writer, pytest.raises(ValueError, match="vector"):
        writer.write("parameters", start, values)
    assert os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("names", [("a", "a/b"), ("a//b",), ("../a",), ("a\0",), ("",)])
def test_names_that_hdf5_cannot_hold(tmp_path, names):
    with pytest.raises(UserError):
        CheckpointWriter(checkpoint_path(tmp_path, 1), Layout(tuple(Tensor(name, (2,)) for name in names)))


def test_older_checkpoints_go_after_a_newer_one_is_whole(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    with CheckpointWriter(checkpoint_path(tmp_path, 4), LAYOUT) as writer:
        writer.write("parameters", 0, np.zeros(LAYOUT.size, np.float32))
        assert len(directory.checkpoints(tmp_path / "checkpoints")) == 3
        writer.commit(make_info(step=4), keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-000000003.h5", "step-000000004.h5"]
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "step-000000004.h5"


def test_going_on_from_an_earlier_step_keeps_the_new_file(tmp_path):
    write(tmp_path, 900)
    with CheckpointWriter(checkpoint_path(tmp_path, 10), LAYOUT) as writer:
        writer.write("parameters", 0, np.zeros(LAYOUT.size, np.float32))
        writer.commit(make_info(step=10), keep=1)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.info.step == 10
    assert len(directory.checkpoints(tmp_path / "checkpoints")) == 1


def test_where_links_are_impossible_latest_is_text(tmp_path, monkeypatch):
    def refuse(self, target, target_is_directory=False):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for step in (1, 2):
        write(tmp_path, step)
        latest = tmp_path / "checkpoints" / "latest"
        assert latest.read_text() == f"step-{step:09d}.h5\n"
        for place in (tmp_path, latest.parent, latest):
            with Checkpoint.open(place) as checkpoint:
                assert checkpoint.info.step == step
                assert checkpoint.notice == ""


@pytest.mark.parametrize("damage", ["torn", "deleted", "no latest", "foreign latest"])
def test_a_broken_latest_falls_back_and_says_so(tmp_path, damage):
    for step in (1, 2):
        write(tmp_path, step)
    newest, latest = checkpoint_path(tmp_path, 2), tmp_path / "checkpoints" / "latest"
    if damage == "torn":
        newest.write_bytes(newest.read_bytes()[:-100])
    elif damage == "deleted":
        newest.unlink()
    else:
        latest.unlink()
        if damage == "foreign latest":
            latest.symlink_to("../../step-000000001.h5")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.info.step == (2 if "latest" in damage else 1)
        assert str(checkpoint.path) in checkpoint.notice
        assert ("latest" if "latest" in damage else "step-000000002.h5") in checkpoint.notice


def test_nothing_to_open(tmp_path):
    with pytest.raises(UserError, match="no checkpoint that can be read"):
        Checkpoint.open(tmp_path)
    with pytest.raises(UserError, match="no such checkpoint"):
        Checkpoint.open(tmp_path / "step-000000001.h5")


def test_another_network_is_named(tmp_path):
    write(tmp_path)
    other = Layout((Tensor("dense2/weights", (5, 8)), Tensor("dense2/bias", (5,)), Tensor("dense3/weights", (3, 5))))
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.expect(LAYOUT, ("accumulator",))
        with pytest.raises(UserError, match="another network") as raised:
            checkpoint.expect(other)
        for part in ("dense2/weights is 5x7", "5x8 in the network", "dense1/weights", "dense3/weights is absent"):
            assert part in str(raised.value)
        assert "dense2/bias" not in str(raised.value)
        with pytest.raises(UserError, match="another order"):
            checkpoint.expect(Layout(LAYOUT.tensors[::-1]))
        with pytest.raises(UserError, match="'history'"):
            checkpoint.expect(LAYOUT, ("accumulator", "history"))


def test_killed_in_the_middle_of_a_write(tmp_path):
    write(tmp_path, 1, fill=5)
    ended = run_python(
        """
        import os, signal
        writer = CheckpointWriter(checkpoint_path(Path(sys.argv[1]), 2), LAYOUT)
        writer.write("parameters", 0, np.zeros(LAYOUT.size, np.float32))
        writer._file._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert ended.returncode == -signal.SIGKILL
    place = tmp_path / "checkpoints"
    assert len(list(place.glob(".*.tmp"))) == 1
    with Checkpoint.open(tmp_path) as checkpoint:
        assert (checkpoint.info.step, checkpoint.notice) == (1, "")
        assert checkpoint.parameters()[0] == 5
    assert len(directory.clean(place)) == 1
    assert sorted(os.listdir(place)) == ["latest", "step-000000001.h5"]


def test_clean_spares_what_others_write(tmp_path):
    living = tmp_path / f".step-000000001.h5.{os.uname().nodename}-{os.getppid()}.tmp"
    elsewhere = tmp_path / ".step-000000001.h5.another-node-77.tmp"
    abandoned = tmp_path / ".step-000000002.h5.another-node-77.tmp"
    foreign = tmp_path / ".notes.tmp"
    for path in (living, elsewhere, abandoned, foreign):
        path.touch()
    os.utime(abandoned, (1, 1))
    os.utime(foreign, (1, 1))
    assert directory.clean(tmp_path) == [abandoned]
    assert set(tmp_path.iterdir()) == {living, elsewhere, foreign}
    assert directory.clean(tmp_path / "missing") == []


@pytest.mark.parametrize("limit", [2000, 250_000, 404_500])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, limit):
    write(tmp_path, 1)
    # The limit on a file's size stands in for a full disk: writes fail in the same place, at any byte one likes.
    ended = run_python(
        """
        import resource
        from dbmpi.errors import RunFailed
        layout = Layout((Tensor("large", (100, 1000)),))
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
        try:
            with CheckpointWriter(checkpoint_path(Path(sys.argv[1]), 2), layout) as writer:
                for start in range(0, layout.size, 10_000):
                    writer.write("parameters", start, np.ones(10_000, np.float32))
                writer.commit(make_info(step=2), keep=1)
        except RunFailed as error:
            print(error)
            sys.exit(7)
        """,
        tmp_path,
        limit,
    )
    assert ended.returncode == 7, ended.stderr
    assert "step-000000002.h5: could not be written" in ended.stdout
    assert "the last checkpoint is" in ended.stdout
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-000000001.h5"]
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.info.step == 1


def test_no_room_is_found_out_before_writing(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(RunFailed, match="MiB are needed"):
        CheckpointWriter(checkpoint_path(tmp_path, 1), Layout((Tensor("huge", (free // 4 + 2**20,)),)))
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="cannot be written here"):
        CheckpointWriter(checkpoint_path(tmp_path / "run", 1), LAYOUT)


def test_a_checkpoint_is_read_while_the_next_is_written(tmp_path):
    write(tmp_path, 1, fill=1)
    with CheckpointWriter(checkpoint_path(tmp_path, 2), LAYOUT) as writer:
        writer.write("parameters", 0, np.zeros(LAYOUT.size, np.float32))
        with Checkpoint.open(tmp_path) as checkpoint:
            ended = run_python("print(Checkpoint.open(Path(sys.argv[1])).info.step)", tmp_path)
            assert ended.stdout.strip() == "1", ended.stderr
            writer.commit(make_info(step=2), keep=1)
            assert checkpoint.parameters()[0] == 1  # deleted by now, and still open
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.info.step == 2
