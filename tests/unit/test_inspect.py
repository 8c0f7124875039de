"""``dbmpi inspect``: the numbers are those of the arrays, and files from strangers do no harm."""

import argparse
import json
import math
import tracemalloc

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from unit.checkpoint_files import LAYOUT, as_version_1, write

from dbmpi.checkpoint import statistics, summary
from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.statistics import Statistics
from dbmpi.cli import inspect
from dbmpi.errors import UserError
from dbmpi.monitor.records import Recorder
from dbmpi.monitor.reports import BatchReport, WorkerReport

floats = st.floats(-100, 100, width=32) | st.sampled_from([math.nan, math.inf])


def show(capsys, path, as_json=False, other=None, everything=False, plot=None, input_shape=None) -> str:
    words = {"path": path, "other": other, "json": as_json, "everything": everything, "plot": plot}
    assert inspect.run(argparse.Namespace(placement=False, input_shape=input_shape, **words)) == 0
    return capsys.readouterr().out


@settings(max_examples=50)
@given(
    parts=st.lists(
        arrays.arrays(np.float32, st.integers(0, 40), elements=floats),
        max_size=5,
    ),
    offset=st.sampled_from([0, 10_000]),
)
def test_statistics_in_pieces_are_those_of_the_whole(parts, offset):
    found = Statistics()
    for part in parts:
        found.add(part + np.float32(offset))
    whole = np.concatenate([np.empty(0, np.float32), *parts]) + np.float32(offset)
    finite = whole[np.isfinite(whole)].astype(np.float64)
    assert (found.count, found.non_finite) == (len(whole), len(whole) - len(finite))
    if len(finite) == 0:
        assert math.isnan(found.minimum)
        assert math.isnan(found.deviation)
    else:
        assert found.minimum == finite.min()
        assert found.maximum == finite.max()
        assert found.mean == pytest.approx(finite.mean(), rel=1e-12, abs=1e-12)
        assert found.deviation == pytest.approx(finite.std(), rel=1e-6, abs=1e-6)


@given(shape=st.lists(st.integers(0, 7), max_size=4).map(tuple), elements=st.integers(1, 50))
def test_boxes_cover_an_array_once(shape, elements):
    count = np.zeros(shape, int)
    for box in statistics.boxes_of(shape, (1,) * len(shape), elements):
        assert count[box].size <= elements
        count[box] += 1
    assert (count == 1).all()


@given(
    sides=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=4),
    elements=st.integers(1, 60),
)
def test_boxes_of_whole_chunks_cover_an_array_once(sides, elements):
    shape, chunks = zip(*sides, strict=True)
    count = np.zeros(shape, int)
    for box in statistics.boxes_of(shape, chunks, elements):
        assert count[box].size <= max(elements, math.prod(chunks))
        for part, chunk, length in zip(box, chunks, shape, strict=True):
            assert part.start % chunk == 0
            assert part.stop % chunk == 0 or part.stop == length, "a chunk that is cut is read twice"
        count[box] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("chunks", [None, (3, 5, 2), (1, 1, 1), (17, 9, 4), True])
@pytest.mark.parametrize("dtype", ["f4", ">f4", "f8", "f2", "i2", "u1", "?"])
def test_a_file_has_the_statistics_of_its_array(tmp_path, monkeypatch, chunks, dtype):
    monkeypatch.setattr(statistics, "PIECE", 50)
    values = (100 * np.random.default_rng(1).random((17, 9, 4))).astype(dtype)
    if values.dtype.kind == "f":
        values[3, 2, 1] = np.nan
    with h5py.File(tmp_path / "data.h5", "w") as file:
        found = statistics.of_dataset(file.create_dataset("x", data=values, chunks=chunks))
    finite = values[np.isfinite(values)].astype(np.float64)
    assert (found.count, found.non_finite) == (values.size, values.size - finite.size)
    assert (found.minimum, found.maximum) == (finite.min(), finite.max())
    assert found.mean == pytest.approx(finite.mean(), rel=1e-12)
    assert found.deviation == pytest.approx(finite.std(), rel=1e-12)


def test_a_run_directory(tmp_path, capsys):
    for step in (1, 20, 300):
        write(tmp_path, step)
    checkpoint_path(tmp_path, 1).write_bytes(b"torn")
    text = show(capsys, tmp_path)
    assert "step-000000001.h5  cannot be read" in text
    assert "step-000000020.h5" in text
    for line in (
        "step         300",
        "samples      38,400",
        "stream       300 of 1,000 batches learned; missing before batch 302: 7, 118",
        "checksums    compared with all that was read",
        "topology     2 shards, 3 replicas of 1 partition",
        "inputs       28 x 28",
        "run.seed = 1",
        "mpi MPICH Version: 4.3",
    ):
        assert line in text
    found = json.loads(show(capsys, tmp_path, as_json=True))
    assert found["kind"] == "run"
    assert [brief["name"][-6:-3] for brief in found["checkpoints"]] == ["001", "020", "300"]
    assert found["newest"]["step"] == 300
    assert found["newest"]["configuration"]["run"] == {"seed": 1}


def test_lost_replicas_of_a_run_are_named(tmp_path, capsys):
    write(tmp_path, 3)
    fields = {"loss": 1.0, "accuracy": None, "samples": 7, "portions": {}, "revoked": 0, "seconds": 1.0}
    with Recorder(tmp_path, "shard", 0) as recorder:
        for iteration, lost in enumerate(((), (1,), (1, 3))):
            recorder.write(BatchReport(iteration=iteration, epoch=1.0, lost=lost, **fields))
    named = "lost: replica 1 since iteration 1 of session 1; replica 3 since iteration 2 of session 1"
    assert [line.strip() for line in show(capsys, tmp_path).splitlines() if "lost:" in line] == [named]
    lost = json.loads(show(capsys, tmp_path, as_json=True))["lost"]
    assert [(one["replica"], one["session"], one["iteration"]) for one in lost] == [(1, 1, 1), (3, 1, 2)]


def test_pushes_that_were_withheld_are_counted_over_all_sessions(tmp_path, capsys):
    write(tmp_path, 3)
    times = dict.fromkeys(("compute", "fetch", "push", "wait", "data"), 1.0)
    fields = {"epoch": 1.0, "samples": 7, "loss": 1.0, "accuracy": None, "samples_per_second": 7.0, "seconds": times}
    fields |= {"pushed_bytes": 1, "fetched_bytes": 1}
    for session, worker, replica, partition, counts in (
        (1, 0, 0, 0, (1, 2)),
        (1, 1, 0, 1, (1, 2)),
        (1, 2, 1, 0, (0, 3)),
        (2, 0, 0, 0, (0, 40)),
    ):
        with Recorder(tmp_path, "worker", worker, session=session) as recorder:
            for step, withheld in enumerate(counts, 10):
                report = WorkerReport(step=step, withheld=withheld, replica=replica, partition=partition, **fields)
                recorder.write(report)
    named = "withheld: 45 (pushes of gradients that were not finite)"
    assert [line.strip() for line in show(capsys, tmp_path).splitlines() if "withheld:" in line] == [named]
    assert json.loads(show(capsys, tmp_path, as_json=True))["withheld"] == 45


def test_a_damaged_array_is_named_and_the_others_are_shown(tmp_path, capsys):
    path = write(tmp_path)
    with h5py.File(path, "r+") as file:
        file["parameters/dense2/bias"][1] = 7.5
    with pytest.raises(UserError, match="damaged: dense2/bias: some bytes are not those that were written"):
        show(capsys, path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["dense2/bias", "5", "float32", "damaged"] in lines
    assert [line[-1] for line in lines if line[:1] == ["dense1/weights"]] == ["none"]


def test_a_checkpoint(tmp_path, capsys):
    path = write(tmp_path)
    with h5py.File(path, "r+") as file:
        as_version_1(file)
        file["parameters/dense2/bias"][1:3] = (np.nan, np.inf)
    found = json.loads(show(capsys, path, as_json=True))
    assert found["kind"] == "checkpoint"
    by_name = {array["name"]: array for array in found["arrays"]}
    assert len(by_name) == 2 * len(LAYOUT.tensors)
    assert by_name["dense2/bias"]["non_finite"] == 2
    assert by_name["dense2/bias"]["mean"] == np.mean([35, 38, 39])
    expected = np.arange(1040, 1055)
    weights = by_name["accumulator: dense1/weights"]
    assert weights["shape"] == [3, 5]
    assert (weights["min"], weights["max"], weights["mean"]) == (1040, 1054, expected.mean())
    assert weights["std"] == pytest.approx(expected.std())
    (line,) = (line for line in show(capsys, path).splitlines() if line.startswith("  dense2/bias"))
    assert line.split() == [
        "dense2/bias",
        "5",
        "float32",
        "35",
        "35.06",
        "38",
        "38.98",
        "39",
        "37.33",
        "1.7",
        "none",
        "2",
    ]


def test_a_fallback_is_said(tmp_path, capsys):
    write(tmp_path, 1)
    write(tmp_path, 2).unlink()
    assert "note: " in show(capsys, tmp_path)


def make_data(path):
    with h5py.File(path, "w") as file:
        file.attrs["format"] = "dbmpi-data"
        file.attrs["ratio"] = np.nan
        file["inputs"] = np.arange(5 * 28 * 28, dtype=np.float32).reshape(5, 28, 28)
        targets = file.create_dataset("targets", data=np.arange(5, dtype=np.int32), chunks=(2,), compression="gzip")
        targets.attrs["classes"] = 5
        file["more/bytes"] = np.array([0, 255], np.uint8)


def test_a_data_file(tmp_path, capsys):
    make_data(tmp_path / "data.h5")
    found = json.loads(show(capsys, tmp_path / "data.h5", as_json=True))
    assert found["kind"] == "data"
    assert found["attributes"]["format"] == "dbmpi-data"
    by_name = {array["name"]: array for array in found["arrays"]}
    assert by_name["inputs"]["max"] == 5 * 28 * 28 - 1
    assert by_name["targets"]["mean"] == 2
    assert by_name["targets"]["attributes"] == {"classes": 5}
    assert by_name["more/bytes"]["std"] == 127.5
    text = show(capsys, tmp_path / "data.h5")
    assert "5 x 28 x 28" in text
    assert "classes = 5" in text


def test_what_cannot_be_read_is_said(tmp_path, capsys):
    path = tmp_path / "data.h5"
    with h5py.File(path, "w") as file:
        file["control \x1b[31m"] = "text"
        file.create_dataset("unstored", (10**9, 10**6), "f4")
        file.create_dataset("sparse", (10**9,), "f4", chunks=(1000,), compression="gzip")[5] = 1
        file.create_dataset("elsewhere", (5,), "f4", external=[("/etc/passwd", 0, 20)])
        file["linked"] = h5py.ExternalLink("/etc/passwd", "/x")
        file["empty"] = np.zeros((0, 3))
        file["round/trip"] = file["/"]
    text = show(capsys, path)
    assert "\x1b" not in text
    assert text.count("not all of it was written") == 2
    assert "lie in other files" in text
    found = json.loads(show(capsys, path, as_json=True))
    assert {array["name"] for array in found["arrays"]} == {
        "control \x1b[31m",
        "unstored",
        "sparse",
        "elsewhere",
        "empty",
    }


@pytest.mark.parametrize("text", ["no JSON", '{"a": NaN}', '{"a": ' + "9" * 5000 + "}", "[" * 100_000, '"\\u001b[2J"'])
def test_any_configuration_is_shown(tmp_path, capsys, text):
    path = write(tmp_path, configuration=text)
    assert "\x1b" not in show(capsys, path)
    json.loads(show(capsys, path, as_json=True))


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    path = tmp_path / "data.h5"
    with h5py.File(path, "w") as file:
        file["wide"] = np.ones((2, 16 * 2**20), np.float32)
        file["flat"] = np.ones(32 * 2**20, np.float32)
    tracemalloc.start()
    try:
        assert [array["mean"] for array in summary.describe(path)["arrays"]] == [1, 1]
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()


def test_neither_one_nor_the_other(tmp_path):
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(UserError, match="not an HDF5 file"):
        summary.describe(tmp_path / "text.h5")
    with pytest.raises(UserError, match="no such file"):
        summary.describe(tmp_path / "missing.h5")
    with pytest.raises(UserError, match="no checkpoint that can be read"):
        summary.describe(tmp_path)
