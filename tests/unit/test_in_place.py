"""Rows read where they lie in a file, and compressed chunks unpacked without HDF5, beside what h5py reads."""

from __future__ import annotations

import math
import sys
import threading
import zlib
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbmpi.data import packed
from dbmpi.data import unpacked as unpacked_module
from dbmpi.data.hdf5 import Dataset
from dbmpi.data.in_place import InPlace
from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.data.unpacked import WINDOWS, Slots, Unpacked
from dbmpi.errors import UserError
from dbmpi.kernels.files import unshuffle
from dbmpi.kernels.mapped import MappedFile

TYPES = ("<f4", ">f4", "<f8", "u1", "<i2", ">i8", "?")
FILTERS = [
    {"compression": "gzip"},
    {"compression": "gzip", "shuffle": True},
    {"shuffle": True},
    {"compression": "lzf"},
    {"compression": "gzip", "fletcher32": True},
]


@st.composite
def layouts(draw):
    """A shape of one to four axes, and chunks of it; a user block before it all."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    shape = (draw(st.integers(1, 60)), *shape[1:])
    chunks = draw(st.none() | st.tuples(*(st.integers(1, length) for length in shape)))
    return shape, chunks, draw(st.sampled_from(TYPES)), draw(st.sampled_from([0, 512]))


def indices_of(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, samples, 3 * samples)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_rows_are_those_of_hdf5(tmp_path_factory, layout):
    shape, chunks, kind, user_block = layout
    values = np.random.default_rng(1).integers(0, 100, shape).astype(kind)
    path = tmp_path_factory.mktemp("in-place") / "it.h5"
    with h5py.File(path, "w", userblock_size=user_block) as file:
        file.create_dataset("x", data=values, chunks=chunks)
    with h5py.File(path) as file:
        found = InPlace.of(file["x"])
        if found is None:  # cut into runs that are too short
            assert chunks is not None
            assert any(part < whole for part, whole in zip(chunks[1:], shape[1:], strict=True))
            return
        indices = indices_of(shape[0])
        rows = found.rows(indices)
        assert rows.dtype == values.dtype
        np.testing.assert_array_equal(rows, values[indices])


def test_what_is_not_in_the_file_as_it_is_in_memory_is_left_to_hdf5(tmp_path):
    with h5py.File(tmp_path / "it.h5", "w") as file:
        file.create_dataset("packed", data=np.arange(40.0), chunks=(8,), compression="gzip")
        file["text"] = ["a", "b"]
        file["compound"] = np.zeros(3, [("a", "f4")])
        file["none"] = np.zeros((0, 3))
        layout = h5py.VirtualLayout((3,), "f8")
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("partly", (64, 4), "f4", chunks=(8, 4))[:8] = 1
    with h5py.File(tmp_path / "it.h5") as file:
        for name in file:
            assert InPlace.of(file[name]) is None, name
            if name != "packed":
                assert Unpacked.of(file[name]) is None, name


def test_a_file_that_becomes_shorter_is_an_error(tmp_path):
    path = tmp_path / "it.h5"
    with h5py.File(path, "w") as file:
        file["inputs"], file["targets"] = np.ones((4000, 64), "f4"), np.zeros(4000, "i4")
    with Source.open(path, 64, reading=Reading(keep="file", wanted="classes")) as source:
        source.batch(np.arange(3980, 4000))
        with path.open("r+b") as raw:
            raw.truncate(300_000)
        with pytest.raises(UserError, match="has become shorter while it was read"):
            source.batch(np.arange(3980, 4000))


@pytest.fixture(params=["libdeflate", "zlib"])
def decompressor(request, monkeypatch):
    """Chunks are unpacked by libdeflate, or by zlib as where the package deflate is not there."""
    if request.param == "libdeflate":
        pytest.importorskip("deflate")
    else:
        monkeypatch.setitem(sys.modules, "deflate", None)
    packed._libdeflate.cache_clear()
    yield
    packed._libdeflate.cache_clear()


@pytest.mark.parametrize("kind", [">f4", "<f4", "<f8", "<u2", "u1"])
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("shape", [(301, 6), (50, 3, 4), (77,)])
@pytest.mark.usefixtures("decompressor")
def test_unpacked_rows_are_those_of_hdf5(tmp_path, filters, shape, kind):
    values = np.random.default_rng(2).integers(0, 50, shape).astype(kind)
    with h5py.File(tmp_path / "it.h5", "w", userblock_size=512) as file:
        file.create_dataset("x", data=values, chunks=(16, *shape[1:]), **filters)
    with h5py.File(tmp_path / "it.h5") as file:
        reader = Unpacked.of(file["x"])
        indices = indices_of(shape[0])
        np.testing.assert_array_equal(reader.rows(indices), values[indices])
        reader.share(slots_of(reader))
        for window in range(4):
            reader.prepare(window, 0.5, partial(blocks, reader, samples=shape[0]))
            np.testing.assert_array_equal(reader.rows(indices), values[indices])


def slots_of(reader: Unpacked, memory: np.ndarray | None = None, part: int = 0, parts: int = 1) -> Slots:
    size = Slots.size(reader.slots_needed, reader.nbytes)
    memory = np.zeros(size, np.uint8) if memory is None else memory
    return Slots(memory, reader.slots_needed, reader.nbytes, part, parts)


def blocks(reader: Unpacked, window: int, samples: int) -> np.ndarray:
    """Return the chunks of a window, of all chunks again and again."""
    count = math.ceil(samples / reader.length)
    per_epoch = math.ceil(count / reader.window)
    epoch, inside = divmod(window, per_epoch)
    order = np.random.default_rng(epoch).permutation(count)
    return order[inside * reader.window : (inside + 1) * reader.window]


def test_several_readers_share_slots_at_different_paces_and_none_sees_a_wrong_row(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacked_module, "WINDOW_BYTES", 8 * 16 * 24)
    samples, paces = 4000, (1, 3, 2)
    values = np.arange(samples * 6, dtype="f4").reshape(samples, 6)
    path = tmp_path / "it.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values, chunks=(16, 6), compression="gzip")
    with h5py.File(path) as file:
        first = Unpacked.of(file["x"])
        memory = np.zeros(Slots.size(first.slots_needed, first.nbytes), np.uint8)
    wrong: list[object] = []

    def learn(part: int) -> None:
        random = np.random.default_rng(part)
        with h5py.File(path) as file:
            reader = Unpacked.of(file["x"])
            reader.share(slots_of(reader, memory, part, len(paces)))
            for step in range(150):
                window, passed = divmod(step * paces[part] / 7, 1)
                reader.prepare(int(window), passed, partial(blocks, reader, samples=samples))
                chunks = blocks(reader, int(window), samples)
                wanted = random.choice(chunks, 20) * 16 + random.integers(0, 16, 20)
                wanted = wanted[wanted < samples]
                if not (reader.rows(wanted) == values[wanted]).all():
                    wrong.append((part, step))

    threads = [threading.Thread(target=learn, args=(part,)) for part in range(len(paces))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_each_chunk_is_unpacked_once_where_readers_keep_pace(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacked_module, "WINDOW_BYTES", 8 * 16 * 24)
    samples = 2048
    with h5py.File(tmp_path / "it.h5", "w") as file:
        file.create_dataset("x", data=np.zeros((samples, 6), "f4"), chunks=(16, 6), compression="gzip")
    counts: list[int] = []
    unpack = Unpacked._unpack
    monkeypatch.setattr(Unpacked, "_unpack", lambda self, chunk: counts.append(chunk) or unpack(self, chunk))
    with h5py.File(tmp_path / "it.h5") as file:
        readers = [Unpacked.of(file["x"]) for _ in range(2)]
        memory = np.zeros(Slots.size(readers[0].slots_needed, readers[0].nbytes), np.uint8)
        counts.clear()
        for part, reader in enumerate(readers):
            reader.share(slots_of(reader, memory, part, 2))
        windows = samples // 16 // readers[0].window

        def coming(number: int) -> np.ndarray:
            return blocks(readers[0], number, samples)[: None if number < windows else 0]

        for window in range(windows):
            for passed in (0.0, 0.5, 1.0):
                for reader in readers:
                    reader.prepare(window, passed, coming)
                    reader.rows(blocks(reader, window, samples) * 16)
        # But for the first window, which nobody has unpacked ahead.
        first = blocks(readers[0], 0, samples).tolist()
    assert sorted({*counts}) == list(range(samples // 16))
    assert sorted(chunk for chunk in counts if chunk not in first) == sorted({*range(samples // 16)} - {*first})
    assert WINDOWS * readers[0].window < samples // 16


@pytest.mark.usefixtures("decompressor")
def test_a_chunk_that_unpacks_to_another_size_is_damage(tmp_path):
    path = tmp_path / "it.h5"
    with h5py.File(path, "w") as file:
        x = file.create_dataset("x", (32, 4), "f4", chunks=(16, 4), compression="gzip")
        x[:] = 1
        x.id.write_direct_chunk((0, 0), zlib.compress(bytes(1 << 20)))
    with h5py.File(path) as file:
        with pytest.raises(UserError, match="dataset 'x' cannot be read"):
            Dataset(path, "x", file["x"]).read((np.array([3]),))
        assert (Dataset(path, "x", file["x"]).read((np.array([20]),)) == 1).all()


def test_values_of_a_file_are_checked_when_a_batch_has_them(tmp_path: Path):
    values = np.zeros((50, 3), "f4")
    values[33, 1] = np.inf
    with h5py.File(tmp_path / "it.h5", "w") as file:
        file["inputs"], file["targets"] = values, np.zeros(50, "i4")
    with Source.open(tmp_path / "it.h5", 64, reading=Reading(keep="file", wanted="classes")) as source:
        source.batch(np.arange(30))
        with pytest.raises(UserError, match="sample 33 lacks a value, or holds NaN"):
            source.batch(np.array([3, 33, 4]))


@pytest.mark.parametrize("chunks", [None, (16, 8)])
def test_the_system_may_read_ahead_any_rows(tmp_path, chunks, monkeypatch):
    values = np.arange(100 * 8, dtype="f4").reshape(100, 8)
    with h5py.File(tmp_path / "it.h5", "w") as file:
        file.create_dataset("x", data=values, chunks=chunks)
    content = (tmp_path / "it.h5").read_bytes()
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(MappedFile, "expect", lambda _, begin, end: asked.append((begin, end)))
    with h5py.File(tmp_path / "it.h5") as file:
        InPlace.of(file["x"]).expect(10, 53)
    found = b"".join(content[begin:end] for begin, end in asked)
    assert found == values[10:53].tobytes()


def with_type(path: Path, kind: h5py.h5t.TypeID, **layout) -> None:
    """Write a dataset of integers of another type in the file than NumPy has."""
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((40, 4))
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        if layout:
            properties.set_chunk((8, 4))
            properties.set_deflate(1)
        made = h5py.h5d.create(file.id, b"x", kind, space, dcpl=properties)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.full((40, 4), -5, np.int16))


@pytest.mark.parametrize("layout", [{}, {"packed": True}])
def test_integers_of_few_bits_are_read_by_hdf5(tmp_path, layout):
    kind = h5py.h5t.NATIVE_INT16.copy()
    kind.set_precision(12)
    with_type(tmp_path / "it.h5", kind, **layout)
    with h5py.File(tmp_path / "it.h5") as file:
        assert InPlace.of(file["x"]) is None
        dataset = Dataset(tmp_path / "it.h5", "x", file["x"])
        assert (dataset.read((np.array([3, 1]),) if dataset.scattered else (slice(0, 2),)) == -5).all()


def test_chunks_whose_places_hdf5_tells_wrongly_are_left_to_it(tmp_path):
    values = np.arange(400.0).reshape(100, 4)
    with h5py.File(tmp_path / "it.h5", "w", libver="latest") as file:
        file.create_dataset("x", data=values, chunks=(10, 4), maxshape=(100, None), compression="gzip")
    with h5py.File(tmp_path / "it.h5") as file:
        indices = indices_of(100)
        np.testing.assert_array_equal(Unpacked.of(file["x"]).rows(indices), values[indices])


def test_a_last_chunk_that_is_not_packed_is_read(tmp_path):
    values = np.arange(420.0).reshape(105, 4)
    with h5py.File(tmp_path / "it.h5", "w", libver="latest") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((10, 4))
        properties.set_deflate(1)
        if not hasattr(properties, "set_chunk_opts"):
            pytest.skip("this h5py cannot leave partial chunks unpacked")
        properties.set_chunk_opts(1)
        made = h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((105, 4)), dcpl=properties)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, values)
    with h5py.File(tmp_path / "it.h5") as file:
        np.testing.assert_array_equal(Unpacked.of(file["x"]).rows(np.arange(105)), values)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 5000), st.integers(0, 99))
def test_bytes_are_put_together_as_numpy_does(itemsize, count, seed):
    packed = np.random.default_rng(seed).integers(0, 256, count * itemsize).astype(np.uint8)
    words = np.empty(count, f"u{itemsize}")
    unshuffle(packed, words)
    np.testing.assert_array_equal(words.view(np.uint8), packed.reshape(itemsize, -1).T.reshape(-1))


@pytest.mark.parametrize("filters", [{"compression": "lzf"}, {"fletcher32": True}, {"compression": "gzip"}])
@pytest.mark.usefixtures("decompressor")
def test_a_packed_file_that_becomes_shorter_is_an_error(tmp_path, filters):
    path = tmp_path / "it.h5"
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=random.normal(size=(4000, 16)), chunks=(10, 16), **filters)
    with h5py.File(path) as file:
        dataset = Dataset(path, "x", file["x"])
        dataset.read((np.array([3990]),))
        with path.open("r+b") as raw:
            raw.truncate(path.stat().st_size // 2)
        with pytest.raises(UserError, match=r"it\.h5"):
            dataset.read((np.array([2999]),))


def test_a_file_that_declares_chunks_without_end_takes_no_memory(tmp_path):
    with h5py.File(tmp_path / "it.h5", "w") as file:
        file.create_dataset("x", (10**12, 2), "f4", chunks=(1, 2), compression="gzip")
        file.create_dataset("y", (10**12, 2), "f4", chunks=(1, 2))
    with h5py.File(tmp_path / "it.h5") as file:
        assert Unpacked.of(file["x"]) is None
        assert InPlace.of(file["y"]) is None
