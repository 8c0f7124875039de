"""Compressed checkpoints: what is read equals what was written, and no chunk takes more memory than it should."""

import importlib
import math

import h5py
import numpy as np
import pytest
from unit.checkpoint_files import make_info

from dbmpi.checkpoint import compressed
from dbmpi.checkpoint.directory import checkpoint_path, shard_path
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.shard_boxes import of_arrangement
from dbmpi.checkpoint.sharded_writer import write_shard, write_whole
from dbmpi.checkpoint.snapshot import Snapshot
from dbmpi.errors import Damaged, UserError
from dbmpi.index.layout import Layout, Tensor
from dbmpi.replica.arrangement import equal

pytest.importorskip("hdf5plugin", reason="needs hdf5plugin: the extra dbmpi[compression]")

LAYOUT = Layout((Tensor("a/weights", (700, 1000)), Tensor("a/bias", (0,)), Tensor("b/weights", (3,))))
IDENTITY = "0badcafe"


def write(run, vectors, shards):
    """Write a checkpoint in as many files as there are shards."""
    path, arrangement, facts = checkpoint_path(run, 5), equal(LAYOUT, shards), []
    path.parent.mkdir()
    for shard, held in enumerate(arrangement.ranges):
        parts = {name: vector[held.start : held.stop] for name, vector in vectors.items()}
        place = shard_path(path, shard, shards, IDENTITY)
        facts.append(write_shard(place, parts, Snapshot(parts), lambda *_: None, compression=compressed.NAME))
    info = make_info(step=5, shards=shards, shard_versions=(5,) * shards, replicas=1, done=(5,))
    dtype = vectors["parameters"].dtype
    boxes = of_arrangement(arrangement)
    write_whole(path, LAYOUT, boxes, facts, IDENTITY, info, dtype=dtype, compression=compressed.NAME)
    return path


@pytest.mark.parametrize(("shards", "dtype"), [(1, "f4"), (3, "f8")])
def test_any_range_is_read_back(tmp_path, shards, dtype):
    random = np.random.default_rng(shards)
    vectors = {name: random.normal(size=LAYOUT.size).astype(dtype) for name in ("parameters", "momentum")}
    vectors["momentum"][1000:] = 0
    path = write(tmp_path, vectors, shards)
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.nbytes < 0.75 * 2 * vectors["momentum"].nbytes
        checkpoint.verify()
        for name, vector in vectors.items():
            for start, stop in ((0, LAYOUT.size), (5, 6), (262_140, 262_150), (300_000, 700_003)):
                out = np.empty(stop - start, dtype)
                checkpoint.read(name, start, out)
                np.testing.assert_array_equal(out, vector[start:stop])
    with h5py.File(path) as file:  # and any program that has the filter
        np.testing.assert_array_equal(
            file["parameters/a/weights"][17:19], vectors["parameters"][17_000:19_000].reshape(2, -1)
        )


def test_damage_is_named(tmp_path):
    path = write(tmp_path, {"parameters": np.ones(LAYOUT.size, np.float32)}, 2)
    file = shard_path(path, 1, 2, IDENTITY)
    with h5py.File(file) as opened:
        offset = opened["parameters"].id.get_chunk_info(0).byte_offset
    data = bytearray(file.read_bytes())
    data[offset + 12] ^= 4
    file.write_bytes(data)
    with Checkpoint.open(path) as checkpoint, pytest.raises(Damaged, match="parameters"):
        checkpoint.verify()


def test_a_chunk_that_declares_another_size_is_not_unpacked(tmp_path):
    """Of zeros, and one quarter of what it should have: harmless, but not what was to be read."""
    elements = compressed.CHUNK
    with h5py.File(tmp_path / "small.h5", "w") as file:
        compressed.require()
        compressed.create(file, "small", elements // 4, np.dtype(np.float32))
        file["small"][:] = 0
        chunk = file["small"].id.read_direct_chunk((0,))[1]
        compressed.create(file, "parameters", elements, np.dtype(np.float32))
        file["parameters"].id.write_direct_chunk((0,), chunk)
    with (tmp_path / "small.h5").open("rb") as raw:
        blocks = math.ceil(4 * elements / 2**18)
        array = compressed.CompressedArray(
            raw.fileno, "parameters", np.dtype(np.float32), elements, 0, np.zeros(blocks, np.uint32), "small.h5"
        )
        with pytest.raises(OSError, match=f"declares {elements:,} bytes"):
            array.verify()


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install 'dbmpi"):
        compressed.require()
