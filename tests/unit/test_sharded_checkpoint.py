"""Checkpoints of several files: the same as one of one file, in dbmpi and in h5py; and what is said of damaged ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.checkpoint_files import LAYOUT, VECTORS, read_all, run_python, values_of, write, write_sharded
from unit.test_shard_boxes import arrangements

from dbmpi.checkpoint import directory, leftovers, retention, stored_arrays, summary
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.errors import Damaged, DiskFailed, UserError
from dbmpi.index.layout import Layout, Tensor
from dbmpi.replica.arrangement import equal

THREE = equal(LAYOUT, 3)


@pytest.fixture(autouse=True)
def no_disk(monkeypatch) -> None:
    """Do not wait for the disk some thousand times."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def path(tmp_path) -> Path:
    return write_sharded(tmp_path, THREE)


def shards_of(path: Path) -> list[Path]:
    return sorted(directory.shard_files(path))


def views(path: Path, vector: str, layout: Layout) -> np.ndarray:
    """Return a whole vector as h5py shows it."""
    group = "parameters" if vector == "parameters" else f"state/{vector}"
    with h5py.File(path) as file:
        return np.concatenate([np.ravel(file[group][tensor.name][()]) for tensor in layout.tensors])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrangements(), st.sampled_from(["f4", "f8"]), st.data())
def test_every_range_is_what_was_written_and_what_h5py_shows(tmp_path, arrangement, dtype, data):
    layout = arrangement.layout
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    state = {"counts": np.arange(6, dtype="i2").reshape(2, 3), "none": np.empty((0, 2))}
    path = write_sharded(tmp_path / "run", arrangement, dtype=dtype, objective_state=state)
    with Checkpoint.open(tmp_path / "run") as checkpoint:
        assert checkpoint.path == path
        assert checkpoint.layout == layout
        assert checkpoint.vectors == VECTORS
        assert checkpoint.dtype == dtype
        assert checkpoint.has_checksums
        assert checkpoint.nbytes == sum(file.stat().st_size for file in (path, *shards_of(path)))
        assert set(checkpoint.files) == {path, *shards_of(path)}
        assert all(np.array_equal(checkpoint.objective_state()[name], array) for name, array in state.items())
        for name, values in values_of(layout).items():
            start = data.draw(st.integers(0, layout.size))
            stop = data.draw(st.integers(start, layout.size))
            for wanted in ("f4", "f8"):
                out = np.full(stop - start, np.nan, wanted)
                checkpoint.read(name, start, out)
                np.testing.assert_array_equal(out, values[start:stop])
        for part in range(3):
            checkpoint.verify(part, 3)
    for name, values in values_of(layout).items():
        np.testing.assert_array_equal(views(path, name, layout), values)


def test_more_shards_than_elements_and_more_files_than_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_arrays, "_OPEN_FILES", 5)
    before = len(os.listdir("/proc/self/fd"))
    path = write_sharded(tmp_path, equal(LAYOUT, 2 * LAYOUT.size))
    with Checkpoint.open(path) as checkpoint:
        assert len(os.listdir("/proc/self/fd")) <= before + 7
        assert checkpoint.parameters().tolist() == list(range(LAYOUT.size))
        checkpoint.verify()
    assert len(os.listdir("/proc/self/fd")) == before


def test_h5py_finds_all_by_latest_and_where_the_directory_has_moved(path, tmp_path):
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to("elsewhere/latest")
    for name in ("elsewhere/latest", f"elsewhere/{path.name}", "link"):
        for vector, values in values_of(LAYOUT).items():
            np.testing.assert_array_equal(views(tmp_path / name, vector, LAYOUT), values, err_msg=name)
        with Checkpoint.open(tmp_path / name) as checkpoint:
            assert checkpoint.parameters().tolist() == list(range(LAYOUT.size))


def test_what_is_missing_reads_as_nan_in_h5py(path):
    shards_of(path)[1].unlink()
    for vector, values in values_of(LAYOUT).items():
        found, held = views(path, vector, LAYOUT), THREE.ranges[1]
        assert np.isnan(found[held.start : held.stop]).all()
        rest = np.r_[: held.start, held.stop : LAYOUT.size]
        np.testing.assert_array_equal(found[rest], values[rest])


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.write_bytes(data)


def in_the_arrays(file: Path) -> int:
    with h5py.File(file) as opened:
        return opened["state/accumulator"].id.get_offset() + 5


def truncate(files: list[Path]) -> None:
    os.truncate(files[1], files[1].stat().st_size - 1)


def exchange(files: list[Path]) -> None:
    files[0].rename(files[0].with_suffix(".x"))
    files[1].rename(files[0])
    files[0].with_suffix(".x").rename(files[1])


def from_another(files: list[Path], fill: float, identity: str, step: int = 123) -> None:
    """Take a file of the same size from another checkpoint."""
    place = files[1].parent / "other"
    other = shards_of(write_sharded(place, THREE, step=step, fill=fill, identity=identity))
    assert other[1].stat().st_size == files[1].stat().st_size
    other[1].replace(files[1])
    shutil.rmtree(place)


def link(files: list[Path]) -> None:
    files[1].rename(files[1].with_suffix(".x"))
    files[1].symlink_to(files[1].with_suffix(".x").name)


def pipe(files: list[Path]) -> None:
    files[1].unlink()
    os.mkfifo(files[1])


DAMAGES = {
    "truncated": (truncate, "bytes, expected"),
    "longer": (lambda files: os.truncate(files[1], files[1].stat().st_size + 1), "bytes, expected"),
    "one bit": (lambda files: flip(files[1], in_the_arrays(files[1])), "are not those that were written"),
    "missing": (lambda files: files[1].unlink(), "is missing"),
    "a folder": (lambda files: (files[1].unlink(), files[1].mkdir()), "is a link, or no file"),
    "a link": (link, "is a link, or no file"),
    "a pipe": (pipe, "is a link, or no file"),
    "exchanged": (exchange, "bytes, expected|are not those that were written"),
    "of another checkpoint": (lambda files: from_another(files, 1, "0123abcd"), "are not those that were written"),
    "of another step": (lambda files: from_another(files, 1, "89abcdef", 456), "are not those that were written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_a_shard_is_named(tmp_path, path, damage):
    earlier = write_sharded(tmp_path, THREE, step=99, identity="fedcba98")
    os.utime(earlier, (1, 1))
    change, message = DAMAGES[damage]
    files = shards_of(path)
    change(files)
    with pytest.raises(Damaged, match=message) as raised:
        read_all(path)
    assert str(path) in str(raised.value)
    assert files[1].name in str(raised.value) or (damage == "exchanged" and files[0].name in str(raised.value))
    read_all(earlier)


def test_any_flipped_bit_of_the_files_is_found_or_changes_nothing(path):
    """In dbmpi; and other programs never see another number than NaN for it, because headers have checksums."""
    file, random = shards_of(path)[1], np.random.default_rng(5)
    whole = file.read_bytes()
    found = 0
    for _ in range(25):
        flip(file, int(random.integers(len(whole))))
        try:
            read_all(path)
        except Damaged:
            found += 1
        else:
            with Checkpoint.open(path) as checkpoint:
                assert checkpoint.parameters().tolist() == list(range(LAYOUT.size))
        file.write_bytes(whole)
    read_all(path)


def replace(path: Path, place: str, data) -> None:
    """Write other numbers, with the checksum that they need, as an attacker would."""
    from dbmpi.checkpoint.checksums import WrittenSums

    with h5py.File(path, "r+") as file:
        data = np.array(data, file[place].dtype if np.asarray(data).dtype.kind != "S" else None)
        for name in (place, f"checksums/{place}"):
            del file[name]
        file.create_dataset(place, data=data)
        sums = WrittenSums(place, file[place].dtype, data.shape)
        sums.wrote(0, memoryview(np.ascontiguousarray(data).tobytes()))
        file.create_dataset(f"checksums/{place}", data=sums.found)


def other_view(source: str, first: int = 0, name: str = "/parameters"):
    """Return what makes the bias a view of something else."""

    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            del file["parameters/dense2/bias"]
            layout = h5py.VirtualLayout((5,), "f4")
            layout[:] = h5py.VirtualSource(source or shards_of(path)[1].name, name, (24,), "f4")[first : first + 5]
            file.create_virtual_dataset("parameters/dense2/bias", layout)

    return change


def names(*given: str):
    return lambda path: replace(path, "shards/files", np.array([name.encode() for name in given]))


MASTERS = {
    "a file above": (names("../a", "b", "c"), "expected the names"),
    "an absolute one": (names("/etc/passwd", "b", "c"), "expected the names"),
    "one file twice": (lambda path: names(*[shards_of(path)[0].name] * 3)(path), "expected the names"),
    "no files": (lambda path: replace(path, "shards/files", np.array([], "S4")), "expected|damaged"),
    "identity": (
        lambda path: replace(path, "shards/id", np.bytes_("../0123abcd")),
        "expected the names|cannot be read",
    ),
    "sizes": (lambda path: replace(path, "shards/sizes", [1, 2, 3]), "bytes, expected 1"),
    "sizes missing": (lambda path: replace(path, "shards/sizes", [1, 2]), "a size for each of 3"),
    "negative": (lambda path: replace(path, "shards/elements", [-1, 2, 3]), "a size for each of 3"),
    "elements": (lambda path: replace(path, "shards/elements", [18, 18, 2**61]), "end at|does not lie|needs"),
    "offsets": (lambda path: replace(path, "shards/offsets", [[0, 2**62]] * 3), "does not lie in its file"),
    "offsets overlap": (lambda path: replace(path, "shards/offsets", [[900, 904]] * 3), "does not lie in its file"),
    "a row less": (lambda path: replace(path, "shards/offsets", [[900, 2000]] * 2), "a row for each file"),
    "boxes": (lambda path: replace(path, "shards/boxes", np.zeros((2**16 + 1, 7), int)), "at most 65536 rows"),
    "vectors": (
        lambda path: replace(path, "shards/vectors", np.array([b"parameters", b"../x"])),
        "expected different names",
    ),
    "vectors twice": (lambda path: replace(path, "shards/vectors", np.array([b"parameters"] * 2)), "different names"),
    "shapes": (
        lambda path: replace(path, "shards/shapes", np.array([[2, 5, 9], [1, 5, 0], [2, 3, 5]])),
        "too few|beyond",
    ),
    "dtype": (lambda path: replace(path, "shards/dtype", np.bytes_("|O8")), "expected float32 or float64"),
}
VIEWS = {
    "of another file": other_view("/etc/passwd"),
    "of a file above": other_view("../x.h5"),
    "of other elements": other_view("", 3),
    "of other data": other_view("", 13, "/state/accumulator"),
    "none": lambda path: h5py.File(path, "r+")["parameters/dense2"].move("bias", "other"),
}


@pytest.mark.parametrize("harm", VIEWS)
def test_views_are_for_other_programs(path, harm):
    """Nothing protects them, and HDF5 may crash where it opens damaged ones; so they are never opened."""
    with Checkpoint.open(path) as checkpoint:
        before = checkpoint.parameters()
    VIEWS[harm](path)
    with Checkpoint.open(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.parameters(), before)


@pytest.mark.parametrize("harm", MASTERS)
def test_a_file_that_leads_elsewhere_is_refused(path, harm):
    change, message = MASTERS[harm]
    change(path)
    with pytest.raises(Damaged, match=message) as raised:
        read_all(path)
    assert str(path) in str(raised.value)


def test_a_file_under_another_name_is_refused_in_a_sentence(path):
    path.rename(path.with_name("step-000000124.h5"))
    with pytest.raises(Damaged, match="give it its name back"):
        read_all(path.with_name("step-000000124.h5"))


def test_a_later_checkpoint_of_the_same_step_replaces_all_files(tmp_path, path):
    old = shards_of(path)
    assert write_sharded(tmp_path, equal(LAYOUT, 2), identity="fedcba98", fill=5) == path
    assert not any(file.exists() for file in old)
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.parameters()[0] == 5
    assert write(tmp_path, fill=7) == path  # by one shard
    assert shards_of(path) == []
    read_all(path)


def test_an_open_checkpoint_stays_readable_where_its_files_are_deleted(path):
    with Checkpoint.open(path) as checkpoint:
        leftovers.remove(path)
        assert checkpoint.parameters().tolist() == list(range(LAYOUT.size))
    assert list(path.parent.iterdir()) == [path.parent / "latest"]


def test_old_checkpoints_are_deleted_with_their_files(tmp_path):
    for step in (1, 2, 3):
        write_sharded(tmp_path, THREE, step=step, identity=f"0000000{step}", keep=2)
    steps = {name.split("-")[1].split(".")[0] for name in os.listdir(tmp_path / "checkpoints") if name != "latest"}
    assert steps == {"000000002", "000000003"}


@pytest.mark.parametrize("read", [Checkpoint.open, summary.describe, summary.open_checkpoint])
def test_the_file_of_a_shard_is_no_checkpoint_and_no_data_file(path, read):
    with pytest.raises(UserError, match=r"part of one shard; give step-000000123\.h5, the checkpoint beside it$"):
        read(shards_of(path)[0])


def noted(path: Path, identity: str) -> Path:
    """Leave a file of a shard as a killed run does."""
    leftovers.note(path, identity)
    file = directory.shard_path(path, 0, 2, identity)
    file.write_bytes(b"x")
    return file


def test_what_killed_runs_have_left_is_cleaned_up(tmp_path, path):
    """Without a checkpoint, and of another attempt at a step that has one; and notes without files."""
    place, own = path.parent, set(path.parent.iterdir())
    lost = [noted(path.with_name("step-000000999.h5"), "00000001"), noted(path, "00000002")]
    leftovers.note(path, "0123abcd")  # whole, and the note was still there
    leftovers.note(path, "00000003")
    mine = path.with_name("step-7-shard-of-mine.h5")
    mine.write_bytes(b"mine")
    assert set(leftovers.clean(place)) == set(lost)
    assert set(place.iterdir()) == {*own, mine}
    read_all(path)
    # One that cannot be read may list them, also when it has been set aside.
    os.truncate(path, 100)
    noted(path, "00000002")
    assert leftovers.clean(place) == []
    directory.set_aside(path)
    assert leftovers.clean(place) == []
    directory.damaged_path(path).unlink()
    assert leftovers.clean(place) == lost[1:]
    assert leftovers.clean(place / "missing") == []


@pytest.mark.parametrize("name", ["good.h5", "../step-000000123.h5", "step-000000123.h5.damaged"])
def test_files_stay_where_their_checkpoint_is_renamed_moved_or_set_aside(tmp_path, path, name):
    files = shards_of(path)
    path.rename(path.parent / name)
    assert leftovers.clean(path.parent) == []
    write_sharded(tmp_path, THREE, identity="fedcba98", keep=1)
    write_sharded(tmp_path, THREE, step=124, identity="00000124", keep=1)
    assert leftovers.clean(path.parent) == []
    assert shards_of(path) == files
    (path.parent / name).rename(path)
    read_all(path)


def test_a_kill_while_a_checkpoint_is_deleted_leaves_nothing_after_the_next_start(path, monkeypatch):
    monkeypatch.setattr(leftovers, "discard", lambda *_: [])
    leftovers.remove(path)
    monkeypatch.undo()
    assert len(leftovers.clean(path.parent)) == 3
    assert list(path.parent.iterdir()) == [path.parent / "latest"]


def test_a_checkpoint_that_has_lost_a_file_counts_no_more(tmp_path, path):
    later = write_sharded(tmp_path, THREE, step=124, identity="00000124")
    assert [each.path for each in retention.whole(path.parent)] == [later, path]
    shards_of(later)[1].unlink()
    assert [each.path for each in retention.whole(path.parent)] == [path]
    os.truncate(shards_of(path)[1], 100)
    assert retention.whole(path.parent) == []


def test_a_checkpoint_keeps_its_files_where_only_its_directory_could_not_be_updated(tmp_path, path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory, "replace_pointer", fail)
    with pytest.raises(DiskFailed, match="is whole, but its directory"):
        write_sharded(tmp_path, THREE, step=124, identity="00000124")
    later = directory.checkpoint_path(tmp_path, 124)
    assert leftovers.discard(later, "00000124") == []
    read_all(later)
    later.unlink()
    assert len(leftovers.discard(later, "00000124")) == 3
    read_all(path)


def test_as_many_files_as_a_large_run_has_shards(tmp_path):
    """Opened in time that grows with their number, and no more."""
    layout = Layout((Tensor("a/weights", (3000, 7)), Tensor("a/bias", (3000,)), Tensor("none", (0, 3))))
    path = write_sharded(tmp_path, equal(layout, 150))
    with Checkpoint.open(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.parameters(), np.arange(layout.size))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_no_change_of_a_file_does_harm(tmp_path, compression):
    """In a process of its own, with little memory: no traceback, crash, hang, or other number."""
    if compression == "zstd":
        pytest.importorskip("hdf5plugin", reason="needs hdf5plugin: the extra dbmpi[compression]")
    count, seed = os.environ.get("DBMPI_TEST_MUTATIONS", "80"), os.environ.get("DBMPI_TEST_SEED", "1")
    ended = run_python(
        "from unit.sharded_mutations import main\nmain(Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4])",
        *(tmp_path, count, seed, compression),
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > int(count) // 2  # else nothing was changed


def test_nothing_is_wrong_without_damage(path):
    with pytest.raises(UserError, match="no such checkpoint"):
        read_all(path.with_name("step-000000999.h5"))
    read_all(path)
