"""Importers: what they write equals what other readers of the same files see, and bad files leave nothing behind."""

import argparse
import gzip
import os
import struct
import subprocess
import sys
import tracemalloc

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dbmpi
from dbmpi.cli import data as command
from dbmpi.data import writer as writing
from dbmpi.data.importers import reading
from dbmpi.data.importers.csv import import_csv
from dbmpi.data.importers.idx import import_idx
from dbmpi.data.importers.libsvm import import_libsvm
from dbmpi.data.importers.npy import import_npy
from dbmpi.data.source import Source
from dbmpi.errors import UserError

FILES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def contents(path):
    """Return the inputs and targets of a data file, samples first, as a run would see them."""
    with Source.open(path, 64) as source:
        source.validate(full=True)
        batch = source.batch(np.arange(source.samples))
        return np.moveaxis(batch.inputs, -1, 0), batch.targets.T


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def refused(message, importer, *arguments, **options):
    """Expect a UserError, and neither a data file nor a temporary one."""
    out = next(argument for argument in reversed(arguments) if argument.suffix == ".h5")
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=message):
        importer(*arguments, **options)
    assert sorted(out.parent.iterdir()) == before


# --- digits ---


def test_digits_are_split_by_class_and_nothing_is_lost(tmp_path, capsys):
    datasets = pytest.importorskip("sklearn.datasets")
    assert run("import", "digits", "--out", tmp_path / "new" / "directory") == 0
    assert "digits-train.h5: 1438 samples of 8 x 8 (float32), 10 classes" in capsys.readouterr().out
    halves = [contents(tmp_path / "new" / "directory" / f"digits-{half}.h5") for half in ("train", "test")]
    inputs, targets = (np.concatenate(parts) for parts in zip(*halves, strict=True))
    original = datasets.load_digits()
    rows = [(*pixels, label) for pixels, label in zip(inputs.reshape(-1, 64) * 16, targets, strict=True)]
    expected = [(*pixels, label) for pixels, label in zip(original.data, original.target, strict=True)]
    assert sorted(rows) == sorted(expected)
    for label in range(10):
        members = np.sum(original.target == label)
        assert np.sum(halves[1][1] == label) == round(0.2 * members)
    with pytest.raises(UserError, match="exists already"):
        run("import", "digits", "--out", tmp_path / "new" / "directory")


def test_digits_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        run("import", "digits", "--out", tmp_path)


# --- IDX ---


def idx(path, array, magic=None, compress=False):
    codes = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}
    header = magic or bytes([0, 0, codes[array.dtype.name], array.ndim])
    content = (
        header + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


@FILES
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)),
    kind=st.sampled_from(["uint8", "int16", "int32", "float32", "float64"]),
    label_kind=st.sampled_from(["uint8", "int32"]),
    compress=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_idx_equals_the_arrays(tmp_path, monkeypatch, *, shape, kind, label_kind, compress, seed):
    monkeypatch.setattr("dbmpi.data.hdf5.BLOCK_BYTES", 300)  # several blocks
    monkeypatch.setattr(writing, "CHUNK_BYTES", 100)
    random = np.random.default_rng(seed)
    images = (random.random(shape) * 200).astype(kind)
    labels = random.integers(0, 5, shape[0]).astype(label_kind)
    names = idx(tmp_path / "images", images, None, compress), idx(tmp_path / "labels", labels, None, compress)
    written = import_idx(*names, tmp_path / "out.h5", classes=6, scale=0.5, force=True)
    inputs, targets = contents(tmp_path / "out.h5")
    np.testing.assert_array_equal(inputs, images.astype(np.float32) * np.float32(0.5 if kind == "uint8" else 1))
    np.testing.assert_array_equal(targets, labels)
    assert (written.samples, written.shape.classes) == (shape[0], 6)


def test_idx_that_is_torn_or_wrong(tmp_path):
    images, labels = np.zeros((20, 3, 3), np.uint8), np.arange(20, dtype=np.uint8)
    good = idx(tmp_path / "images", images), idx(tmp_path / "labels", labels)
    out = tmp_path / "out.h5"
    packed = idx(
        tmp_path / "packed", np.random.default_rng(0).integers(0, 255, (20, 3, 3)).astype(np.uint8), None, True
    )
    torn = tmp_path / "torn"
    torn.write_bytes(packed.read_bytes()[:-40])
    refused(r"torn: gzip data are torn or damaged after byte 16", import_idx, torn, good[1], out)
    torn.write_bytes(packed.read_bytes()[:-6] + b"\0\0" + packed.read_bytes()[-4:])
    refused(r"torn: gzip data are torn or damaged.*CRC", import_idx, torn, good[1], out)
    torn.write_bytes(good[0].read_bytes()[:-1])
    refused(
        r"torn: its header declares elements of shape \(20, 3, 3\), which end at byte 196",
        import_idx,
        torn,
        good[1],
        out,
    )
    torn.write_bytes(good[0].read_bytes() + b"x")
    refused(r"torn: its header declares .* the file has 197 bytes", import_idx, torn, good[1], out)
    torn.write_bytes(gzip.compress(good[0].read_bytes() + b"x"))
    refused(r"torn: has more bytes than the 196", import_idx, torn, good[1], out)
    torn.write_bytes(b"\0\0")
    refused(r"torn: ends at byte 2, within the IDX header", import_idx, torn, good[1], out)
    refused("starts with the bytes 89 50 4e 47", import_idx, idx(torn, images, b"\x89PNG"), good[1], out)
    refused("did you mix up the two files", import_idx, good[1], good[0], out)
    refused(
        r"images: holds 20 images, but .*short 19 labels", import_idx, good[0], idx(tmp_path / "short", labels[1:]), out
    )
    refused("labels: sample 7: the label 7 is not a class; expected .* 0 to 6", import_idx, *good, out, classes=7)
    refused("missing: no such file", import_idx, tmp_path / "missing", good[1], out)
    nan = idx(tmp_path / "nan", np.where(np.arange(180).reshape(20, 3, 3) == 100, np.nan, 0).astype(np.float32))
    refused("nan: sample 11: the inputs hold NaN", import_idx, nan, good[1], out)


def test_idx_headers_are_compared_with_the_file_before_anything_is_allocated(tmp_path):
    labels = idx(tmp_path / "labels", np.zeros(4, np.uint8))
    huge = struct.pack(">4BIII", 0, 0, 8, 3, 4, 2**31, 2**31)
    (tmp_path / "plain").write_bytes(huge + bytes(1000))
    (tmp_path / "packed").write_bytes(gzip.compress(huge + bytes(1000)))
    # A claim that the file's ratio of compression just allows, but no sane sample has.
    (tmp_path / "wide").write_bytes(gzip.compress(struct.pack(">4BII", 0, 0, 8, 2, 4, 10**8) + os.urandom(500_000)))
    tracemalloc.start()
    for name, message in {
        "plain": "has 1016 bytes",
        "packed": "cannot hold more than",
        "wide": "one sample of shape",
    }.items():
        refused(message, import_idx, tmp_path / name, labels, tmp_path / "out.h5")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


# --- CSV ---


@FILES
@given(
    rows=st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 3, st.integers(0, 4)), min_size=1, max_size=60),
    target=st.sampled_from(["-1", "3", "kind"]),
    delimiter=st.sampled_from([",", ";", "\t", " "]),
    style=st.sampled_from(["plain", "crlf", "bom", "quoted", "blank lines", "gzip", "no last newline"]),
)
def test_csv_equals_the_numbers(tmp_path, monkeypatch, *, rows, target, delimiter, style):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 64)
    table = [["a", "b", "c", "kind"], *([repr(value) for value in row] for row in rows)]
    if style == "quoted":
        table = [[f'"{field}"' for field in line] for line in table]
    end = "\r\n" if style == "crlf" else "\n\n" if style == "blank lines" else "\n"
    text = end.join(delimiter.join(line) for line in table) + ("" if style == "no last newline" else end)
    content = text.encode("utf-8-sig" if style == "bom" else "utf-8")
    path = tmp_path / "table.csv"
    path.write_bytes(gzip.compress(content) if style == "gzip" else content)
    import_csv(path, tmp_path / "out.h5", targets=[target], delimiter=delimiter, scale=0.5, force=True)
    inputs, targets = contents(tmp_path / "out.h5")
    np.testing.assert_array_equal(inputs, (np.array([row[:3] for row in rows]) * 0.5).astype(np.float32))
    labels = [row[3] for row in rows]
    distinct = sorted(set(labels))
    expected = labels if distinct[0] == 0 else [distinct.index(label) for label in labels]
    np.testing.assert_array_equal(targets, expected)


def test_csv_values_headers_and_columns(tmp_path):
    path, out = tmp_path / "table.csv", tmp_path / "out.h5"
    path.write_text("y0,x,y1\n0.5,1,2.5\n1.5,2,3.5\n")
    assert run("import", "csv", path, "--out", out, "--target", "y1", "--target", "y0", "--values") == 0
    inputs, targets = contents(out)
    assert inputs.tolist() == [[1], [2]]
    assert targets.tolist() == [[2.5, 0.5], [3.5, 1.5]]
    path.write_text("1,2,0\n3,4,1\n")
    assert run("import", "csv", path, "--out", out, "--target", "-1", "--classes", "5", "--force") == 0
    with Source.open(out, 1) as source:
        assert (source.samples, source.classes) == (2, 5)
    run("import", "csv", path, "--out", out, "--header", "yes", "--target", "0", "--force")
    assert contents(out)[0].tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, r"table\.csv: is empty"),
        ("a,b\n", {}, r"table\.csv: holds no samples"),
        ("a,b\n1,2\n3\n", {}, r"line 3 has 1 columns; expected 2"),
        ("a,b\n1,2\n\n3,4,5\n", {}, r"line 4 has 3 columns; expected 2"),
        ("a,b\n1,2\nx,4\n", {}, r"line 3, column 1 \(a\): 'x' is not a number; .* --drop a to leave"),
        ("1,2\n1,\n", {}, r"line 2, column 2: a value is missing; fill it in, or leave the line out"),
        ("1,2\nnan,3\n", {}, r"line 2, column 1: a value is missing \('nan'\); .* the column \(--drop 0\) out"),
        ("a,b,c\n1,2,0\n3,N/A,1\n", {}, r"line 3, column 2 \(b\): a value is missing \('N/A'\); .*--drop b"),
        ("a,b,c\n1,2,x\n3,?,y\n", {}, r"line 3, column 2 \(b\): a value is missing \('\?'\); .*--drop b"),
        ("a,b,c\n1,2,x\n3,4,\n", {}, r"line 3, column 3 \(c\): the label is missing; leave the line out"),
        ("a,b,c\n1,2,x\n3,4\n", {}, r"line 3 has 2 columns; expected 3"),
        ("a,b,c\n1,2,0\n3,4,1,5\n", {"drop": ["b"]}, r"line 3 has 4 columns; expected 3"),
        ("1,2\n1e39,3\n", {}, r"line 2, column 1: 1e39 is infinite or too large for float32"),
        ("1,0\n1,0.5\n", {}, r"line 2: the label 0.5 is not a class; .* --values"),
        ("1,0\n1,nan\n", {}, r"line 2, column 2: a value is missing \('nan'\)"),
        ("1,0\n1,dog\n", {}, r"line 2, column 2: 'dog' is not a number"),
        ("1,0\n1,-1\n", {}, r"line 2: the label -1 is not a class; .* if it marks samples without a label"),
        ("1,0\n1,-2\n", {}, r"line 2: the label -2 is not a class"),
        ("1,0\n1,1e30\n", {}, r"line 2: the label 1e\+30 is not a class"),
        ("1,0\n1,inf\n", {"kind": "values"}, r"line 2, column 2: inf is infinite or too large"),
        ("1,abc\n2,3\n", {}, r"line 1 holds numbers and text \('abc'\): say --header"),
        ("1,2,abc\n3,4,xyz\n", {}, r"line 1 holds numbers and text \('abc'\): say --header"),
        ("abc,1\n2,3\n", {"header": "no"}, r"line 1, column 1: 'abc' is not a number"),
        ("5,a\n6,b\n7,c\n", {"classes": 2}, r"line 3: the label 'c' is one more than 2 classes; the others are a, b"),
        ("5,a\n6,b\n", {"classes": 3}, r"--classes 3 was given, but there are 2 labels: a, b"),
        ("a,b\n1,2\n", {"drop": ["c"]}, r"has no column 'c'"),
        ("a,b\n1,2\n", {"drop": ["b"]}, r"column 1 is a target and to be dropped"),
        ("a,b\n1,2\n", {"drop": ["a"]}, r"all are targets or dropped"),
        ("a,b\n1,2\n", {"targets": ["c"]}, r"has no column 'c'; its columns are a, b"),
        ("1,2\n", {"targets": ["c"]}, r"has no column 'c'; it has no header"),
        ("1,2\n", {"targets": ["2"]}, r"has no column 2; expected 0 to 1"),
        ("a,a\n1,2\n", {"targets": ["a"]}, r"2 columns are called 'a'"),
        ("a,b\n1,2\n", {"targets": ["b", "-1"], "kind": "values"}, r"given twice"),
        ("a,b\n1,2\n", {"targets": ["a", "b"]}, r"2 target columns were given, but a class is one column"),
        ("1;2\n", {}, r"has 1 columns and all are targets.*is ',' the delimiter"),
        ("1,2\n", {"delimiter": "ab"}, r"delimiter 'ab' is impossible"),
        ('1,2\n"3,4\n5,6\n', {}, r"line 2 has 1 columns"),
        ("1,2\n3,\xe9\n", {}, r"line 2 is not UTF-8 text \(byte 3 of the line\)"),
        ("1,2\n3,\0\n", {}, r"line 2"),
    ],
)
def test_csv_faults_name_the_line(tmp_path, text, options, message):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode("latin-1"))
    refused(message, import_csv, path, tmp_path / "out.h5", **options)


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("labels", [["setosa", "virginica", "versicolor"], ["1", "2", "3"], ["-1", "1"], ["7", "5"]])
def test_csv_numbers_labels_and_drops_columns(tmp_path, monkeypatch, capsys, header, labels):
    """Text, and numbers that do not begin at 0, in the order of the labels; a test file has those of the training."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 30)
    random = np.random.default_rng(2)
    inputs, chosen = random.normal(size=(40, 2)).round(3), random.integers(0, len(labels), 40)
    chosen[: len(labels)] = range(len(labels))
    rows = [
        f"{x},id {number},{y},{labels[place]}"
        for number, ((x, y), place) in enumerate(zip(inputs, chosen, strict=True))
    ]
    text = "\n".join((["length,name,width,species"] if header else []) + rows) + "\n"
    path, out = tmp_path / "flowers.csv", tmp_path / "flowers.h5"
    path.write_text(text)
    run("import", "csv", path, "--drop", "name" if header else "1", "--out", out)
    ordered = sorted(labels) if not labels[0].lstrip("-").isdigit() else sorted(map(int, labels))
    assert f"{len(labels)} classes (labels {', '.join(map(str, ordered))})" in capsys.readouterr().out
    with Source.open(out, 1) as source:
        assert (source.classes, source.labels) == (len(labels), tuple(ordered))
    found, classes = contents(out)
    np.testing.assert_array_equal(found, inputs.astype(np.float32))
    np.testing.assert_array_equal([str(ordered[code]) for code in classes], [labels[place] for place in chosen])
    # A test file that lacks a label
    path.write_text("\n".join(["length,name,width,species", *(row for row in rows if row.endswith(f",{labels[0]}"))]))
    run("import", "csv", path, "--drop", "1", "--like", out, "--out", tmp_path / "test.h5")
    with Source.open(tmp_path / "test.h5", 1) as test, Source.open(out, 1) as train:
        test.expect_like(train)
        assert set(test.targets(np.arange(test.samples)).tolist()) == {ordered.index(type(ordered[0])(labels[0]))}
    path.write_text("length,name,width,species\n1,a,2,77\n")
    refused("label", import_csv, path, tmp_path / "no.h5", drop=["name"], like=out)


def test_csv_labels_from_0_are_classes_as_they_are(tmp_path):
    path, out = tmp_path / "table.csv", tmp_path / "out.h5"
    path.write_text("5,0\n6,3\n")
    import_csv(path, out)
    with Source.open(out, 1) as source:
        assert (source.classes, source.labels) == (4, None)
    path.write_text("5,1\n6,3\n")
    import_csv(path, out, classes=4, force=True)
    assert contents(out)[1].tolist() == [1, 3]
    import_csv(path, tmp_path / "like.h5", like=out)
    assert contents(tmp_path / "like.h5")[1].tolist() == [1, 3]


def test_a_first_line_of_numbers_and_a_label_is_a_sample(tmp_path):
    path, out = tmp_path / "iris.data", tmp_path / "out.h5"
    path.write_text("5.1,3.5,Iris-setosa\n7.0,3.2,Iris-versicolor\n")
    import_csv(path, out)
    assert contents(out)[0].tolist() == np.float32([[5.1, 3.5], [7.0, 3.2]]).tolist()


def test_a_line_without_an_end_is_not_swallowed(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_LINE", 1000)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 100)
    (tmp_path / "binary").write_bytes(b"1,2\n" + bytes(5000))
    refused("binary: line 2 is longer than", import_csv, tmp_path / "binary", tmp_path / "out.h5")


# --- NPY ---


@FILES
@given(
    samples=st.integers(1, 60),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    kind=st.sampled_from(["u1", "f4", "f8", ">f8", "f2", "i2", "?"]),
    order=st.sampled_from("CF"),
    target=st.sampled_from(["classes", "one value", "values"]),
    seed=st.integers(0, 1000),
)
def test_npy_equals_the_arrays(tmp_path, monkeypatch, *, samples, shape, kind, order, target, seed):
    monkeypatch.setattr("dbmpi.data.hdf5.BLOCK_BYTES", 300)
    monkeypatch.setattr(writing, "CHUNK_BYTES", 100)
    random = np.random.default_rng(seed)
    inputs = np.asarray((random.random((samples, *shape)) * 200).astype(kind), order=order)
    values = random.random((samples, 3)) if target == "values" else random.random(samples)
    targets = random.integers(0, 5, samples) if target == "classes" else values
    targets[0] = 0  # so that integers are numbers of classes
    np.save(tmp_path / "inputs.npy", inputs)
    np.save(tmp_path / "targets.npy", targets)
    import_npy(tmp_path / "inputs.npy", tmp_path / "targets.npy", tmp_path / "out.h5", scale=0.5, force=True)
    found, answers = contents(tmp_path / "out.h5")
    np.testing.assert_array_equal(found, inputs.astype(np.float32) * np.float32(0.5 if kind == "u1" else 1))
    np.testing.assert_array_equal(answers.reshape(targets.shape), targets.astype(answers.dtype))


def test_npy_that_is_torn_or_wrong(tmp_path):
    def saved(name, array):
        np.save(tmp_path / name, array)
        return tmp_path / f"{name}.npy"

    inputs, targets, out = saved("inputs", np.zeros((6, 2))), saved("targets", np.arange(6)), tmp_path / "out.h5"
    torn = tmp_path / "torn.npy"
    torn.write_bytes(inputs.read_bytes()[:-1])
    refused(
        r"torn.npy: its header declares float64 of shape \(6, 2\), which end at byte 224",
        import_npy,
        torn,
        targets,
        out,
    )
    torn.write_bytes(
        inputs.read_bytes().replace(b"(6, 2), ", b"(9999999999999999999999, 2), ").replace(b" " * 21, b"", 1)
    )
    refused(r"torn\.npy: its header declares float64 of shape \(9{22}, 2\)", import_npy, torn, targets, out)
    torn.write_bytes(b"hello, world")
    refused(r"torn\.npy: is not an NPY file", import_npy, torn, targets, out)
    np.savez(tmp_path / "both.npz", inputs=np.zeros(3))
    refused("is an NPZ archive", import_npy, tmp_path / "both.npz", targets, out)
    objects = saved("objects", np.array([{"a": 1}] * 6, object))
    refused(r"objects\.npy: holds object; expected numbers", import_npy, objects, targets, out)
    refused(r"text\.npy: holds <U1", import_npy, saved("text", np.array([["a"]] * 6)), targets, out)
    refused(r"flat\.npy: has shape \(6,\); expected", import_npy, saved("flat", np.zeros(6)), targets, out)
    refused(r"scalar\.npy: holds an array of shape \(\)", import_npy, saved("scalar", np.zeros(())), targets, out)
    refused(r"has 6 samples, but .*short\.npy 5", import_npy, inputs, saved("short", np.arange(5)), out)
    refused(
        r"cube\.npy: is int64 of shape \(6, 1, 1\)", import_npy, inputs, saved("cube", np.zeros((6, 1, 1), int)), out
    )
    refused("sample 4: the label 4 is not", import_npy, inputs, targets, out, classes=4)
    refused("goes with whole numbers only", import_npy, inputs, saved("values", np.zeros(6)), out, classes=4)
    nan = saved("nan", np.array([[0, 0], [0, np.inf]] * 3))
    refused(r"nan\.npy: sample 1: the inputs hold NaN", import_npy, nan, targets, out)


def test_npy_targets_of_any_clear_shape(tmp_path):
    np.save(tmp_path / "inputs.npy", np.zeros((6, 2)))
    labels = np.array([3, 1, 2, 1, 3, 2])
    for targets, expected, named in [
        (labels[:, None], labels - 1, (1, 2, 3)),
        (labels > 1, labels > 1, None),
        (np.eye(4, dtype=int)[labels], np.eye(4)[labels], None),
    ]:
        np.save(tmp_path / "targets.npy", targets)
        import_npy(tmp_path / "inputs.npy", tmp_path / "targets.npy", tmp_path / "out.h5", force=True)
        np.testing.assert_array_equal(contents(tmp_path / "out.h5")[1], expected)
        with Source.open(tmp_path / "out.h5", 1) as source:
            assert source.labels == named


# --- LIBSVM ---


@FILES
@given(seed=st.integers(0, 10_000), samples=st.integers(1, 50), features=st.integers(1, 30), compress=st.booleans())
def test_libsvm_equals_the_reader_of_scikit_learn(tmp_path, monkeypatch, *, seed, samples, features, compress):
    datasets = pytest.importorskip("sklearn.datasets")
    monkeypatch.setattr(reading, "BLOCK_BYTES", 64)
    monkeypatch.setattr("dbmpi.data.hdf5.BLOCK_BYTES", 300)
    monkeypatch.setattr(writing, "CHUNK_BYTES", 100)
    random = np.random.default_rng(seed)
    dense = random.standard_normal((samples, features)) * (random.random((samples, features)) < 0.4)
    dense[0, -1] = 1  # so that the largest index occurs
    labels = random.choice([-7, 1, 3, 40], samples)
    path = tmp_path / "samples"
    datasets.dump_svmlight_file(dense, labels, str(path), zero_based=False, comment="two\nlines")
    expected, expected_labels = datasets.load_svmlight_file(str(path))
    if compress:
        path.write_bytes(gzip.compress(path.read_bytes()))
    import_libsvm(path, tmp_path / "out.h5", force=True)
    inputs, targets = contents(tmp_path / "out.h5")
    np.testing.assert_array_equal(inputs, expected.toarray().astype(np.float32))
    with Source.open(tmp_path / "out.h5", 1) as source:
        assert source.labels == tuple(sorted(set(labels.tolist())))
        np.testing.assert_array_equal(np.array(source.labels)[targets], expected_labels)


def test_libsvm_test_file_takes_features_and_labels_from_the_training_file(tmp_path):
    (tmp_path / "train").write_text("+1 1:1 5:2\n-1 2:0.5 # a comment\n\n3 1:1\n")
    (tmp_path / "test").write_text("3.0 2:1\n1 4:1\n")
    (tmp_path / "strange").write_text("3 2:1\n2 4:1\n")
    train, test = tmp_path / "train.h5", tmp_path / "test.h5"
    assert run("import", "libsvm", tmp_path / "train", "--out", train) == 0
    assert run("import", "libsvm", tmp_path / "test", "--like", train, "--out", test) == 0
    inputs, targets = contents(train)
    assert inputs.tolist() == [[1, 0, 0, 0, 2], [0, 0.5, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert targets.tolist() == [1, 0, 2]
    inputs, targets = contents(test)
    assert inputs.tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
    assert targets.tolist() == [2, 1]
    # Without --like, the labels 1 and 3 would silently have been the classes 0 and 1.
    alone = tmp_path / "alone.h5"
    import_libsvm(tmp_path / "test", alone, features=5)
    with Source.open(train, 1) as first, Source.open(test, 1) as second, Source.open(alone, 1) as third:
        second.expect_like(first)
        assert third.expect_like(first) == ()
        np.testing.assert_array_equal(third.targets(np.arange(2)), second.targets(np.arange(2)))
    refused("line 2: the label 2 does not occur", import_libsvm, tmp_path / "strange", tmp_path / "no.h5", like=train)
    refused("have 5", import_libsvm, tmp_path / "test", tmp_path / "no.h5", like=train, features=4)


def test_libsvm_values_and_counting_from_zero(tmp_path):
    (tmp_path / "samples").write_text("0.5 0:1\n-2.25 1:3\n")
    run("import", "libsvm", tmp_path / "samples", "--out", tmp_path / "out.h5", "--values", "--first-index", "0")
    inputs, targets = contents(tmp_path / "out.h5")
    assert inputs.tolist() == [[1, 0], [0, 3]]
    assert targets.tolist() == [[0.5], [-2.25]]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "has no inputs"),
        ("1\n2\n", {}, "has no inputs"),
        ("# nothing\n", {"features": 3}, "holds no samples"),
        ("1 1:1\n1 2\n", {}, "line 2: '2' is not an input; expected index:value"),
        ("1 1:1\n1 a:2\n", {}, "line 2: 'a:2' is not an input"),
        ("1 1:1\n1 1:b 2:1\n", {}, "line 2: '1:b' is not an input"),
        ("1 1:1\n1 qid:3 2:1\n", {}, "line 2: 'qid:3' is not an input"),
        ("1 2:1 1:1\n", {"features": 2}, "line 1: the index 1 follows 2; expected increasing"),
        ("1 0:1 1:1\n", {}, "line 1: the index 0 is below 1; .* --first-index 0"),
        ("1 1:1\n1 4:1\n", {"features": 3}, "line 2: the index 4 is too large; expected at most 3"),
        ("1 1:1\n1 99999999999:1\n", {}, "line 2: the index 99999999999 is too large; expected at most"),
        ("1 1:1\n1 1:nan\n", {}, "line 2: the inputs hold NaN"),
        ("1 1:1\n1 1:1e39\n", {}, "line 2: the inputs hold NaN, infinity or a number too large"),
        ("1 1:1\nx 1:1\n", {}, "line 2: the label 'x' is not a number"),
        ("1 1:1\n1.5 1:1\n", {}, "line 2: the label 1.5 is not a class"),
        ("1 1:1\nnan 1:1\n", {}, "line 2: the label 'nan' is not finite"),
        ("1 1:1\n1,2 1:1\n", {}, "line 2: the label '1,2' is not a number"),
    ],
)
def test_libsvm_faults_name_the_line(tmp_path, text, options, message):
    (tmp_path / "samples").write_text(text)
    refused(message, import_libsvm, tmp_path / "samples", tmp_path / "out.h5", **options)


def test_libsvm_of_a_regression_asks_for_values(tmp_path, monkeypatch):
    monkeypatch.setattr("dbmpi.data.importers.classes.MOST_LABELS", 10)
    (tmp_path / "samples").write_text("".join(f"{number} 1:1\n" for number in range(11)))
    refused(
        "line 11: the label 10 is one more than 10 classes; .* --values",
        import_libsvm,
        tmp_path / "samples",
        tmp_path / "out.h5",
    )


# --- the written file ---


@pytest.fixture
def table(tmp_path):
    (tmp_path / "table.csv").write_text("1,2,0\n3,4,1\n")
    return tmp_path / "table.csv"


def test_the_file_says_where_it_comes_from_but_not_on_which_machine(table, tmp_path):
    import_csv(table, tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        assert file.attrs["digest"].startswith("sha256:")
        others = {name: value for name, value in file.attrs.items() if name != "digest"}
        assert others | {"sources": list(file.attrs["sources"])} == {
            "format": "dbmpi-data",
            "format_version": 1,
            "importer": "csv",
            "importer_version": dbmpi.__version__,
            "sources": ["table.csv"],
        }
        assert file["targets"].attrs["classes"] == 2
        assert file["inputs"].chunks is not None
    assert str(tmp_path).encode() not in (tmp_path / "out.h5").read_bytes()


def test_nothing_is_overwritten_without_force_nor_by_a_failed_import(table, tmp_path):
    out = tmp_path / "out.h5"
    out.write_text("precious")
    refused("exists already.*--force", import_csv, table, out)
    table.write_text("1,2,0\n3,4\n")
    refused("line 2 has 2 columns", import_csv, table, out, force=True)
    assert out.read_text() == "precious"
    refused("is the file to be imported", import_csv, out, out, force=True)
    table.write_text("1,2,0\n")
    import_csv(table, out, force=True)
    assert contents(out)[1].tolist() == [0]


def test_places_that_cannot_be_written(table, tmp_path):
    with pytest.raises(UserError, match=r"there is no directory .*nowhere; make it first"):
        import_csv(table, tmp_path / "nowhere" / "out.h5")
    with pytest.raises(UserError, match="is a directory"):
        import_csv(table, tmp_path, force=True)
    with pytest.raises(UserError, match="cannot be made a directory"):
        run("import", "digits", "--out", table / "below")


def test_another_writer_wins_the_name(table, tmp_path):
    """A file that appears while we import is not overwritten either."""
    out = tmp_path / "out.h5"
    with pytest.raises(UserError, match="exists already"):
        import_csv(table, out, progress=lambda done, total: out.write_text("theirs"))
    assert out.read_text() == "theirs"
    assert sorted(tmp_path.iterdir()) == [out, table]


@pytest.mark.parametrize("limit", [0, 1_000_000, 8_000_000])
def test_a_full_disk_is_a_message_and_leaves_nothing(tmp_path, limit):
    """The limit of the size of a file stands for the full disk: both make a write fail, at its beginning or its end."""
    np.save(tmp_path / "inputs.npy", np.zeros((20_000, 100), np.float32))
    np.save(tmp_path / "targets.npy", np.zeros(20_000, int))
    script = """
import resource, signal, sys
from pathlib import Path
from dbmpi.data.importers.npy import import_npy
from dbmpi.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
try:
    import_npy(Path("inputs.npy"), Path("targets.npy"), Path("out.h5"))
except UserError as error:
    sys.exit("told: " + str(error))
"""
    words = [sys.executable, "-c", script, str(limit)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == ["told: out.h5: could not be written: File too large"]
    assert done.returncode == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs.npy", "targets.npy"]


def test_an_interrupted_import_leaves_nothing(table, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_csv(table, tmp_path / "out.h5", progress=interrupt)
    assert sorted(tmp_path.iterdir()) == [table]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on private memory is Linux's")
@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
    """A file much larger than a block is imported, opened and validated under a hard limit of a few blocks."""
    inputs = np.lib.format.open_memmap(tmp_path / "inputs.npy", "w+", np.float32, (100_000, 400))  # 153 MiB
    inputs[:, 0] = 1
    del inputs
    np.save(tmp_path / "targets.npy", np.zeros(100_000, np.int64))
    script = """
import re, resource
from pathlib import Path
import numpy as np
from dbmpi.data.importers.npy import import_npy
from dbmpi.data.source import Source
used = int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20), resource.RLIM_INFINITY))
import_npy(Path("inputs.npy"), Path("targets.npy"), Path("out.h5"))
with Source.open(Path("out.h5"), 64) as source:
    source.validate(full=True)
    assert not source.storage.resident
    assert source.batch(np.arange(0, 100_000, 999)).inputs[0].sum() == 101
try:
    np.ones(20 << 20)
except MemoryError:
    print("the limit holds")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "the limit holds\n"), done.stderr


def test_help_and_a_plain_run_say_little(table, tmp_path, capsys):
    for words in (["-h"], ["import", "-h"], ["import", "libsvm", "-h"]):
        with pytest.raises(SystemExit) as ended:
            run(*words)
        assert ended.value.code == 0
    capsys.readouterr()
    run("import", "csv", table, "--out", tmp_path / "out.h5")
    output = capsys.readouterr()
    assert output.out.startswith(f"{tmp_path}/out.h5: 2 samples of 2 (float32), 2 classes, ")
    assert output.out.count("\n") == 1
    assert output.err == ""


def test_arguments_do_not_import_numpy():
    script = (
        "import argparse, sys; from dbmpi.cli import data; data.add_arguments(argparse.ArgumentParser());"
        "sys.exit(any(name in sys.modules for name in ('numpy', 'h5py', 'mpi4py', 'rich', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
