"""Files mapped into memory, of which something is cut off; each in a process of its own where it might end it."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest

from dbmpi.data import in_place
from dbmpi.data.hdf5 import Dataset
from dbmpi.data.in_place import InPlace
from dbmpi.data.numpy_files import mapped
from dbmpi.errors import UserError
from dbmpi.kernels.mapped import MappedFile

PAGE = mmap.PAGESIZE


def written(path: Path, pages: int = 10) -> Path:
    path.write_bytes(b"a" * (pages * PAGE))
    return path


def opened(path: Path) -> MappedFile:
    with path.open("rb") as file:
        return MappedFile(file.fileno())


def test_a_file_is_there_as_it_is(tmp_path):
    content = os.urandom(3 * PAGE + 17)
    (tmp_path / "it").write_bytes(content)
    file = opened(tmp_path / "it")
    file.expect(PAGE + 5, 2 * PAGE)
    file.read_singly()
    assert file.memory.tobytes() == content
    assert file.whole
    with pytest.raises(ValueError, match="read-only"):
        file.memory[0] = 1


def test_pages_that_are_gone_are_zeros_and_are_told(tmp_path):
    path = written(tmp_path / "it")
    file, other = opened(path), opened(written(tmp_path / "other"))
    os.truncate(path, 2 * PAGE)
    assert not file.whole
    assert file.memory[[0, 5 * PAGE + 3, 7 * PAGE]].tolist() == [97, 0, 0]
    assert other.whole


def test_what_was_gone_once_is_not_whole_again(tmp_path):
    path = written(tmp_path / "it")
    file = opened(path)
    os.truncate(path, PAGE)
    assert file.memory[3 * PAGE] == 0
    written(path)
    assert not file.whole


def test_a_place_in_the_table_is_given_back_with_the_last_array(tmp_path):
    file = opened(written(tmp_path / "it"))
    table, entry, part = file._guard.table, file._entry, file.memory[PAGE:]
    assert table[entry, 0] == file.memory.ctypes.data
    assert table[entry, 1] - table[entry, 0] == 10 * PAGE
    del file
    gc.collect()
    os.truncate(tmp_path / "it", PAGE)
    assert part[3 * PAGE] == 0  # still guarded
    del part
    gc.collect()
    assert not table[entry].any()


@contextmanager
def hdf5_rows(path: Path, values: np.ndarray) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    with h5py.File(path, "w") as file:
        file["x"] = values
    with h5py.File(path) as file:
        dataset = Dataset(path, "x", file["x"])
        assert dataset.in_place is not None
        yield lambda indices: dataset.read((indices,))


@contextmanager
def npy_rows(path: Path, values: np.ndarray) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    with path.open("wb") as out:
        np.save(out, values)
    yield mapped(path).__getitem__


@pytest.mark.parametrize("rows_of", [hdf5_rows, npy_rows])
def test_a_file_cut_off_under_the_hands_of_a_reader_is_an_error(tmp_path, rows_of):
    values = np.ones((20_000, 64), "f4")

    def read_on(read: Callable[[np.ndarray], np.ndarray]) -> None:
        while True:
            assert (read(random.integers(0, len(values), 500)) == 1).all()

    for seed in range(5):
        random, path = np.random.default_rng(seed), tmp_path / str(seed)
        with rows_of(path, values) as read:
            cut = threading.Timer(0.02, os.truncate, (path, int(random.integers(5000, values.nbytes))))
            cut.start()
            with pytest.raises(UserError, match="has become shorter while it was read"):
                read_on(read)
            cut.join()


def test_a_file_that_is_closed_can_be_written_to_while_it_is_mapped(tmp_path):
    path = tmp_path / "it.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.ones((50, 64))
    with h5py.File(path, locking=True) as file:
        rows = InPlace.of(file["x"])
    with h5py.File(path, "r+", locking=True) as file:
        file["x"][3] = 7
    assert (rows.rows(np.array([3])) == 7).all()


ANOTHER_FAULT = """
import faulthandler, mmap, os, sys
faulthandler.enable()
from dbmpi.kernels.mapped import MappedFile
with open(sys.argv[1], "r+b") as file:
    guarded = MappedFile(file.fileno())
    own = mmap.mmap(file.fileno(), 0)
    os.truncate(sys.argv[1], 0)
    assert guarded.memory[0] == 0 and not guarded.whole
    own[0]
"""


def test_a_fault_in_other_memory_ends_the_process_as_before(tmp_path):
    argv = [sys.executable, "-c", ANOTHER_FAULT, str(written(tmp_path / "it"))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGBUS, done.stderr
    assert "Fatal Python error: Bus error" in done.stderr


def test_chunks_that_a_damaged_file_places_outside_are_left_to_hdf5(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "it.h5", "w") as file:
        file.create_dataset("x", data=np.ones((100, 16)), chunks=(10, 16))
    chunked = in_place._chunked
    with h5py.File(tmp_path / "it.h5") as file:
        size = file.id.get_filesize()
        for wrong in (-8, size - 10 * 16 * 8 + 1, size, 2**62):
            blocks, *others = chunked(file["x"])
            blocks[3] = wrong
            monkeypatch.setattr(in_place, "_chunked", lambda _, place=(blocks, *others): place)
            assert InPlace.of(file["x"]) is None
