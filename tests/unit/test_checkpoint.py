"""Checkpoints: what is written is read back, whatever the ranges, and what was good stays good."""

import binascii
import json
import os
import shutil
import signal
import subprocess
from contextlib import nullcontext
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.checkpoint_files import LAYOUT, as_version_1, make_info, run_python, write

from dbmpi.checkpoint import directory, retention, schema, summary
from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.writer import CheckpointWriter, Coverage
from dbmpi.errors import Damaged, DiskFailed, RunFailed, UserError
from dbmpi.index.layout import Layout, Tensor, cut

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
@pytest.mark.slow
@pytest.mark.slow
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
    empty = {"input_shape": (), "holes": (), "done": (), "configuration": "", "classes": 0}
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
    assert "(0): 125" in output


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


def test_state_of_an_objective_is_kept_and_verified(tmp_path):
    state = {
        "mean": np.arange(6.0).reshape(2, 3),
        "inner/seen": np.array(7),
        "large": np.arange(200_000, dtype=np.float32),
        "mask": np.array([1, 0], np.uint8),
        "none": np.zeros((0, 2)),
    }
    path = checkpoint_path(tmp_path, 1)
    with CheckpointWriter(path, LAYOUT, objective_state=state) as writer:
        writer.write("parameters", 0, np.zeros(LAYOUT.size, np.float32))
        writer.commit(make_info(step=1))
    with Checkpoint.open(path) as checkpoint:
        checkpoint.verify()
        found = checkpoint.objective_state()
        assert [*found] == [*state]
        for name, values in state.items():
            np.testing.assert_array_equal(found[name], values)
            assert found[name].dtype == values.dtype
        assert checkpoint.read_state("large", 100_000, 100_002).tolist() == [100_000, 100_001]
        described = {array["name"]: array for array in summary.describe(path)["arrays"]}
        assert described["objective state: inner/seen"]["mean"] == 7
    with h5py.File(path, "r+") as file:
        file["objective_state/large"][150_000] = 1
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.read_state("large", 0, 10)[9] == 9
        for read in (checkpoint.verify, checkpoint.objective_state):
            with pytest.raises(Damaged, match="/objective_state/large is damaged"):
                read()
    with h5py.File(path, "r+") as file:
        del file["objective_state/mask"]
    with pytest.raises(Damaged, match="/objective_state/mask is missing"):
        Checkpoint.open(path)


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


def test_the_newest_whole_file_counts_whatever_latest_says(tmp_path):
    """As a kill between the two leaves them."""
    for step in (1, 2):
        write(tmp_path, step)
    latest = tmp_path / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to("step-000000001.h5")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert (checkpoint.info.step, checkpoint.notice) == (2, "")
    with Checkpoint.open(latest) as checkpoint:  # who asks for this one gets it
        assert checkpoint.info.step == 1


def test_a_torn_checkpoint_does_not_count_among_those_to_keep(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoint_path(tmp_path, 3).write_bytes(checkpoint_path(tmp_path, 3).read_bytes()[:-100])
    assert "the last checkpoint is" in retention.kept(tmp_path / "checkpoints")
    assert retention.kept(tmp_path / "checkpoints").endswith("step-000000002.h5")
    with CheckpointWriter(checkpoint_path(tmp_path, 4), LAYOUT) as writer:
        writer.write("parameters", 0, np.zeros(LAYOUT.size, np.float32))
        writer.commit(make_info(step=4), keep=2)
    assert [found.step for found in retention.whole(tmp_path / "checkpoints")] == [4, 2]
    assert checkpoint_path(tmp_path, 3).exists()


def test_a_clock_that_is_set_back_does_not_make_the_newest_old(tmp_path):
    """As another host's may be, on which the run goes on."""
    write(tmp_path, 2, created="2100-01-01T00:00:00.000000+00:00")
    write(tmp_path, 3)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert (checkpoint.info.step, checkpoint.info.created) == (3, "2100-01-01T00:00:00.000001+00:00")


# Checksums


def naive_sums(path: str, array: np.ndarray) -> list[int]:
    """Return the checksums as the documentation of the format has them, by binascii instead of zlib."""
    data, head = array.tobytes(), f"{path} {array.dtype.str} {array.shape}".encode()
    return [binascii.crc32(head + data[place : place + 2**18]) for place in range(0, len(data), 2**18)]


@pytest.mark.parametrize("order", ["forwards", "backwards", "twice"])
def test_every_dataset_has_its_checksums(tmp_path, order):
    layout = Layout((Tensor("a/long", (3, 50_000)), Tensor("b", (0,)), Tensor("a/short", (7,))))
    values = np.random.default_rng(0).random(layout.size).astype(np.float32)
    pieces = [slice(start, start + 10_007) for start in range(0, layout.size, 10_007)]
    with CheckpointWriter(checkpoint_path(tmp_path, 1), layout) as writer:
        if order == "twice":
            writer.write("parameters", 0, values[::-1].copy())
        for piece in pieces if order == "forwards" else pieces[::-1]:
            writer.write("parameters", piece.start, values[piece])
        path = writer.commit(make_info(step=1))
    seen = []
    with h5py.File(path) as file:

        def compare(name, node):
            if isinstance(node, h5py.Dataset) and not name.startswith("checksums/") and not node.is_scale:
                seen.append(name)
                assert file[f"checksums/{name}"][()].tolist() == naive_sums(name, np.array(node[()], node.dtype))

        file.visititems(compare)
        assert len(file["checksums/parameters/a/long"]) == 3
    assert {"parameters/a/long", "parameters/b", "run/step", "run/configuration", "data/holes"} < set(seen)
    with Checkpoint.open(path) as checkpoint:
        checkpoint.verify()
        np.testing.assert_array_equal(checkpoint.parameters(), values)


@settings(max_examples=40, deadline=None)
@given(bit=st.integers(0, 8 * 600_000 - 1), start=st.integers(0, 150_000), length=st.integers(1, 150_000))
@pytest.mark.slow
def test_a_flipped_bit_is_found_where_and_only_where_it_is_read(tmp_path_factory, bit, start, length):
    run = tmp_path_factory.mktemp("run")
    layout = Layout((Tensor("w", (150_000,)),))
    with CheckpointWriter(checkpoint_path(run, 1), layout) as writer:
        writer.write("parameters", 0, np.zeros(layout.size, np.float32))
        path = writer.commit(make_info(step=1))
    with h5py.File(path) as file:
        offset = file["parameters/w"].id.get_offset()
    whole = bytearray(path.read_bytes())
    whole[offset + bit // 8] ^= 1 << bit % 8
    path.write_bytes(whole)
    out = np.empty(min(length, layout.size - start), np.float32)
    block = bit // 8 // 2**18
    read = range(4 * start // 2**18, (4 * (start + len(out)) - 1) // 2**18 + 1)
    with Checkpoint.open(path) as checkpoint:
        for _ in range(2):
            if block in read:
                with pytest.raises(Damaged, match=r"/parameters/w is damaged: its bytes"):
                    checkpoint.read("parameters", start, out)
            else:
                checkpoint.read("parameters", start, out)
        parts = [block not in range(3 * part // 2, 3 * (part + 1) // 2) for part in range(2)]
        for part, sound in enumerate(parts):
            with nullcontext() if sound else pytest.raises(Damaged):
                checkpoint.verify(part, 2)


@pytest.mark.parametrize(
    ("vector", "value"), [("parameters", np.nan), ("parameters", -np.inf), ("accumulator", np.nan)]
)
def test_a_number_to_go_on_from_is_finite(tmp_path, vector, value):
    path = write(tmp_path)
    place = "parameters" if vector == "parameters" else "state/accumulator"
    with h5py.File(path, "r+") as file:
        as_version_1(file)
        file[f"{place}/dense2/bias"][3] = value
    out = np.empty(LAYOUT.size, np.float32)
    with Checkpoint.open(path) as checkpoint:
        checkpoint.read(vector, 0, out)  # for those who only look
        with pytest.raises(UserError, match=rf"/{place}/dense2/bias holds {value} at \(3\)"):
            checkpoint.load(vector, 0, out)
        checkpoint.load(vector, 0, out[:30])


CONTRADICTIONS = {
    "frontier": 1001,
    "holes": (118, 7),
    "done": (40, 41),
    "step": 100,
    "samples": 5,
    "shard_versions": (120,),
    "begun": 124,
    "shards": 0,
    "replicas": 4,
    "total": 2**62,
    "input_shape": (28, -1),
    "created": "yesterday",
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_numbers_that_contradict_one_another_are_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        write(tmp_path / "written", **({"done": (41, 41, 41)} | {name: CONTRADICTIONS[name]}))
    path = write(tmp_path)
    place = (schema.TEXTS | schema.INTEGERS | schema.OPTIONAL_INTEGERS | schema.INTEGER_LISTS)[name]
    value = CONTRADICTIONS[name]
    with h5py.File(path, "r+") as file:
        as_version_1(file)
        file.pop(place, None)
        file[place] = np.bytes_(value) if isinstance(value, str) else np.array(value, np.int64)
    with pytest.raises(Damaged, match=rf"step-000000123\.h5: .*{name}"):
        Checkpoint.open(path)


@pytest.mark.parametrize("begun", [0, 1, 123])
def test_a_count_of_updates_is_kept_where_it_is_one(tmp_path, begun):
    """Files of earlier versions of dbmpi have none."""
    path = write(tmp_path, begun=begun)
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.info.begun == begun
    with h5py.File(path) as file:
        assert ("run/begun" in file) == (begun > 0)


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
        writer._file.hdf5.flush()
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
    with pytest.raises(DiskFailed, match=r"cannot be written here.*; there is no earlier checkpoint"):
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
