"""Any HDF5 as it occurs: several files as one, tables, frames, sparse matrices, categories, texts, virtual datasets."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.sparse

import dbmpi
from dbmpi.config.data import DataParts
from dbmpi.data.location import files_of, split
from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.errors import UserError

RANDOM = np.random.default_rng(17)
X = np.round(RANDOM.normal(size=(9, 4)), 3).astype(np.float32)
LABELS = np.array([0, 1, 2] * 3)
ORDER = np.array([8, 0, 3, 3, 7, 1])


def write(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name.replace("__", "/")] = values
    return path


def read(place, memory_mib=64, *, required=True, **reading):
    """Return inputs (samples first) and targets: from memory and by rows, after the scan of all values."""
    found = []
    for keep in ("memory", "file"):
        needed = "required" if required else "optional"
        with Source.open(place, memory_mib, needed, Reading(keep=keep, **reading)) as source:
            assert source.storage.resident == (keep == "memory")
            source.validate(full=True)
            every = np.arange(source.samples)
            inputs = np.moveaxis(source.inputs(every), -1, 0)
            order = ORDER[source.samples > ORDER]
            np.testing.assert_array_equal(np.moveaxis(source.inputs(order), -1, 0), inputs[order])
            answers = source.targets(every) if source.has_targets else None
            if answers is not None:
                np.testing.assert_array_equal(source.targets(order), answers[..., order])
                np.testing.assert_array_equal(np.concatenate([block for _, block in blocks(source)]), answers.T)
            found.append((inputs, answers, source.labels))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    return found[0]


def blocks(source):
    start = 0
    for targets, _ in source.answers():
        yield start, targets
        start += len(targets)


def refused(message, place, **reading):
    with pytest.raises(UserError, match=message):
        read(place, **reading)


# --- Where data are ---


def test_a_list_a_pattern_and_a_group_of_files(tmp_path):
    cuts = [0, 2, 3, 9]
    names = ["part-1.h5", "part-9.h5", "part-10.h5"]
    for name, first, last in zip(names, cuts[:-1], cuts[1:], strict=True):
        write(tmp_path / name, inputs=X[first:last], targets=LABELS[first:last])
    paths = tuple(tmp_path / name for name in names)
    for place in (paths, tmp_path / "part-*.h5", tmp_path / "part-[0-9]*.h5"):
        inputs, targets, _ = read(place)
        np.testing.assert_array_equal(inputs, X)
        np.testing.assert_array_equal(targets, LABELS)
    inputs, _, _ = read(paths[::-1])
    np.testing.assert_array_equal(inputs, np.concatenate([X[3:], X[2:3], X[:2]]))
    both = write(
        tmp_path / "all.h5", train__inputs=X, train__targets=LABELS, test__inputs=X[:2], test__targets=LABELS[:2]
    )
    np.testing.assert_array_equal(read(Path(f"{both}:/train"))[0], X)
    np.testing.assert_array_equal(read(Path(f"{both}:/test"))[0], X[:2])
    refused(r"part-x\*\.h5: no file has such a name; expected a pattern", tmp_path / "part-x*.h5")
    refused(r"all\.h5: has no dataset '/nowhere/inputs'", Path(f"{both}:/nowhere"))
    odd = write(tmp_path / "odd:name.h5", inputs=X, targets=LABELS)
    np.testing.assert_array_equal(read(odd)[0], X)
    assert split(odd) == (odd, "")
    assert [within.file.name for within in files_of(tmp_path / "part-*.h5")] == names


def test_inputs_and_targets_in_files_of_their_own(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", LABELS)
    images = write(tmp_path / "images.h5", entry__x=X, w=np.arange(9.0))
    for inputs in (tmp_path / "x.npy", Path(f"{images}:/entry/x")):
        place = DataParts(inputs=inputs, targets=tmp_path / "y.npy", weights=Path(f"{images}:/w"))
        found, targets, _ = read(place)
        np.testing.assert_array_equal(found, X)
        np.testing.assert_array_equal(targets, LABELS)
    with Source.open(place, 1, reading=Reading(weights="w")) as source:
        np.testing.assert_allclose(source.batch(np.arange(9)).weights, np.arange(9) / 4)
    twice = DataParts(inputs=(tmp_path / "x.npy",) * 2, targets=(tmp_path / "y.npy",) * 2)
    np.testing.assert_array_equal(read(twice)[0], np.concatenate([X, X]))
    refused(
        "2 files of inputs, 1 files of targets; expected as many",
        twice.model_copy(update={"targets": Path(tmp_path / "y.npy")}),
    )
    refused("has no targets; expected", DataParts(inputs=tmp_path / "x.npy"))
    refused(r"is one array, without targets; expected two", tmp_path / "x.npy")
    assert read(tmp_path / "x.npy", required=False)[1] is None


def test_files_of_other_kinds_are_not_joined(tmp_path):
    one = write(tmp_path / "1.h5", inputs=X, targets=LABELS)
    for name, message, datasets in (
        ("2.h5", r"2\.h5.*has samples of shape \(3,\), but that of .*1\.h5 has \(4,\)", {"inputs": X[:, :3]}),
        ("3.h5", r"'inputs' has 9 samples, but 'targets' has 8", {"targets": LABELS[:8]}),
        ("4.h5", r"has \|S1, but that of .*1\.h5 has int64", {"targets": np.array([b"a"] * 9)}),
    ):
        other = write(tmp_path / name, **{"inputs": X, "targets": LABELS, **datasets})
        refused(message, (one, other))
    named = [write(tmp_path / f"n{number}.h5", inputs=X, targets=LABELS) for number in range(2)]
    for path, labels in zip(named, ([b"cat", b"dog", b"cow"], [b"dog", b"cat", b"cow"]), strict=True):
        with h5py.File(path, "a") as file:
            file["targets"].attrs["labels"] = labels
    refused(r"has the labels .*dog.*, but that of .*n0\.h5", tuple(named))
    with h5py.File(one, "a") as file:
        file.attrs["mean"], file.attrs["deviation"] = 1.0, 2.0
    refused(r"another 'mean' than that of", (one, write(tmp_path / "5.h5", inputs=X, targets=LABELS)))


def test_each_file_by_its_own_scale_offset_and_gaps(tmp_path):
    """Packed by netCDF, a file has its own scale and offset: values join, not stored numbers."""
    values = np.round(X, 2)
    paths = []
    for number, (scale, offset) in enumerate([(0.001, 0.0), (0.002, 1.0)]):
        path = tmp_path / f"{number}.nc"
        packed = np.round((values - offset) / scale).astype(np.int16)
        packed[3, number] = -32000
        with h5py.File(path, "w") as file:
            file["inputs"], file["targets"] = packed, LABELS
            file["inputs"].attrs.update(scale_factor=scale, add_offset=offset, _FillValue=np.int16(-32000))
        paths.append(path)
    expected = np.concatenate([values, values])
    expected[[3, 12], [0, 1]] = 7
    np.testing.assert_allclose(read(tuple(paths), missing=7.0)[0], expected, atol=1e-6)
    refused(r"value \[0\] of sample 3 is missing", tuple(paths))


def test_bytes_stay_bytes_over_several_files(tmp_path):
    pixels = RANDOM.integers(0, 256, (9, 2, 3), np.uint8)
    paths = tuple(write(tmp_path / f"{n}.h5", inputs=pixels, targets=LABELS) for n in range(2))
    with Source.open(paths, 1) as source:
        source.load()
        assert source._inputs[0].dtype == np.uint8
        np.testing.assert_allclose(
            np.moveaxis(source.inputs(np.arange(9, 18)), -1, 0), pixels / np.float32(255), rtol=1e-6
        )


def test_what_is_done_to_inputs_must_be_the_same_in_all_files(tmp_path):
    paths = tuple(write(tmp_path / f"{n}.h5", inputs=X, targets=LABELS, other=X) for n in range(2))
    for path in paths:
        if path != paths[0]:
            refused(r"has the attribute 'subtract' none, but that of .* has 1\.0", paths)
        with h5py.File(path, "a") as file:
            file["inputs"].attrs["subtract"], file["inputs"].attrs["divide"] = [1.0], [2.0]
    np.testing.assert_allclose(read(paths)[0], (np.concatenate([X, X]) - 1) / 2, rtol=1e-5, atol=1e-6)
    refused(
        "has the attribute 'subtract', which cannot be kept beside other datasets", paths[0], inputs=("inputs", "other")
    )


def test_configurations_name_places(tmp_path):
    np.save(tmp_path / "x.npy", X)
    text = '[data]\ntrain = {inputs = "x.npy", targets = "y.h5:/y"}\ntest = ["a.h5", "b-*.h5"]\n'
    (tmp_path / "run.toml").write_text(text + "[[network.layers]]\ntype = 'dense'\nunits = 3\n")
    run = dbmpi.load(tmp_path / "run.toml")
    assert run.data.train == DataParts(inputs=tmp_path / "x.npy", targets=Path(f"{tmp_path}/y.h5:/y"))
    assert run.data.test == (tmp_path / "a.h5", tmp_path / "b-*.h5")
    assert dbmpi.config.Run.from_json(run.to_json()) == run
    assert run.data.called == str(tmp_path / "x.npy")


# --- Tables ---

TABLE = np.zeros(
    9, [("id", "S4"), ("a", "f4"), ("b", "<i2"), ("v", ">f8", (2,)), ("y", "i1"), ("in", [("p", "f4"), ("q", "i4")])]
)
TABLE["a"], TABLE["b"], TABLE["v"], TABLE["y"] = X[:, 0], np.arange(9), X[:, 1:3], LABELS
TABLE["in"]["p"] = X[:, 3]


def test_columns_of_a_table(tmp_path):
    path = write(tmp_path / "t.h5", table=TABLE, other=LABELS)
    inputs, targets, _ = read(path, inputs="table", targets="table/y")
    np.testing.assert_array_equal(inputs, np.column_stack([X[:, 0], np.arange(9), X[:, 1:3]]))
    np.testing.assert_array_equal(targets, LABELS)
    np.testing.assert_array_equal(read(path, inputs="table/v", targets="other")[0], X[:, 1:3])
    columns = ("table/b", "table/v", "table/in/p", "other")
    inputs, _, _ = read(path, inputs=columns, targets="table/y")
    np.testing.assert_array_equal(inputs, np.column_stack([np.arange(9), X[:, 1:3], X[:, 3], LABELS]))
    with Source.open(path, 1, reading=Reading(inputs="table", targets="table/y")) as source:
        assert "'id', 'in' hold no numbers and are left out" in source.notes[0]
    with Source.open(path, 1, reading=Reading(inputs=("table/b", "table/a"), targets="other")) as source:
        assert source.meaning.input_names == ("b", "a")
    refused(r"the table 'table' has no column 'z'; expected one of 'id', 'a'", path, inputs="table/z", targets="other")
    refused(r"'table/in' is a table|column 'in' is a table", path, inputs="table/in", targets="other")
    refused(r"is a table of columns; name one of them", path, inputs="table/v", targets="table")
    refused(
        r"'table/b' has 9 samples, but 's' has 8",
        write(tmp_path / "u.h5", table=TABLE, s=X[:8, 0], y=LABELS),
        inputs=("table/b", "s"),
        targets="y",
    )
    array = write(tmp_path / "a.h5", targets=LABELS)
    with h5py.File(array, "a") as file:
        file.create_dataset("inputs", (9,), np.dtype(("f4", (2, 2))))[...] = X.reshape(9, 2, 2)
    np.testing.assert_array_equal(read(array)[0], X.reshape(9, 2, 2))


def test_tables_of_pytables(tmp_path):
    tables = pytest.importorskip("tables")
    with tables.open_file(tmp_path / "t.h5", "w") as file:
        plain = np.zeros(9, [("a", "f4"), ("y", "i4"), ("b", "f8")])
        plain["a"], plain["y"], plain["b"] = X[:, 0], LABELS, X[:, 1]
        file.create_table("/group", "samples", plain, createparents=True)
    inputs, targets, _ = read(tmp_path / "t.h5", inputs="group/samples", targets="group/samples/y")
    np.testing.assert_array_equal(inputs, X[:, :2])
    np.testing.assert_array_equal(targets, LABELS)


@pytest.mark.filterwarnings("ignore")
def test_frames_of_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("tables")
    words = np.array(["cat", "dog", "cow"])[LABELS]
    frame = pandas.DataFrame(
        {"a": X[:, 0], "label": LABELS, "b": X[:, 1].astype("f8"), "word": words, "t": X[:, 2] > 0}
    )
    frame.loc[4, "b"] = np.nan
    expected = np.column_stack([X[:, 0], X[:, 1], X[:, 2] > 0]).astype(np.float32)
    expected[4, 1] = 9
    options = {"fixed": {}, "columns": {"format": "table", "data_columns": True}, "table": {"format": "table"}}
    for name, given in options.items():
        frame.to_hdf(tmp_path / f"{name}.h5", key="df", **given)
    for name in ("fixed", "columns"):
        inputs, targets, _ = read(tmp_path / f"{name}.h5", inputs="df", targets="df/label", missing=9.0)
        assert sorted(inputs.T.tolist()) == sorted(expected.T.tolist())
        np.testing.assert_array_equal(targets, LABELS)
        given = ("df/t", "df/a", "df/b")
        inputs, _, _ = read(tmp_path / f"{name}.h5", inputs=given, targets="df/label", missing=9.0)
        np.testing.assert_array_equal(inputs, expected[:, [2, 0, 1]])
    _, targets, labels = read(tmp_path / "columns.h5", inputs=("df/a",), targets="df/word")
    assert labels == ("cat", "cow", "dog")
    assert [labels[code] for code in targets] == words.tolist()
    refused(
        "'word' of the frame 'df' is pickled by pandas, which is never read; store it with to_hdf",
        tmp_path / "fixed.h5",
        inputs="df",
        targets="df/word",
    )
    refused("the frame 'df' has no column 'z'", tmp_path / "fixed.h5", inputs="df/z", targets="df/label")
    found, _, _ = read(tmp_path / "table.h5", inputs=("df/values_block_0",), targets="df/values_block_1")
    np.testing.assert_array_equal(found[:, 0], X[:, 0])


# --- Sparse matrices ---


def sparse(file, name, matrix, **attributes):
    group = file.create_group(name)
    group.attrs.update(attributes)
    for part in ("data", "indices", "indptr"):
        group[part] = getattr(matrix, part)


@pytest.mark.parametrize("seed", range(4))
def test_sparse_matrices_by_rows_and_columns(tmp_path, seed):
    random = np.random.default_rng(seed)
    samples, features = int(random.integers(1, 30)), int(random.integers(1, 20))
    kind = ["f4", "f8", "i2", "?"][seed]
    matrix = scipy.sparse.random(samples, features, 0.3, "csr", random_state=seed)
    matrix = (matrix * 100).astype(kind)
    matrix.sort_indices()
    labels = random.integers(0, 3, samples)
    labels[0] = 0
    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        sparse(file, "ann", matrix, **{"encoding-type": "csr_matrix", "shape": matrix.shape})
        sparse(file, "columns", matrix.tocsc(), **{"encoding-type": "csc_matrix", "shape": matrix.shape})
        sparse(file, "h5sparse", matrix, h5sparse_format="csr", h5sparse_shape=matrix.shape)
        sparse(file, "tenx", matrix)
        file["tenx/shape"], file["tenx/barcodes"] = matrix.shape[::-1], np.zeros(samples)
        turned = matrix.tocsc()
        matlab = file.create_group("matlab")
        matlab["data"], matlab["ir"], matlab["jc"] = (
            turned.data,
            turned.indices.astype("u8"),
            turned.indptr.astype("u8"),
        )
        matlab.attrs["MATLAB_sparse"], matlab.attrs["MATLAB_class"] = np.uint64(samples), np.bytes_("double")
        file["targets"] = labels
    for name in ("ann", "columns", "h5sparse", "tenx", "matlab"):
        np.testing.assert_array_equal(read(path, inputs=name)[0], matrix.toarray().astype(np.float32), err_msg=name)
    scipy.sparse.save_npz(tmp_path / "s.npz", matrix, compressed=bool(seed % 2))
    np.save(tmp_path / "y.npy", labels)
    found = read(DataParts(inputs=tmp_path / "s.npz", targets=tmp_path / "y.npy"))[0]
    np.testing.assert_array_equal(found, matrix.toarray().astype(np.float32))
    with Source.open(path, 1, reading=Reading(inputs="ann")) as source:
        rows = source._stored_inputs[0].dataset.values
        assert isinstance(rows._data, np.ndarray)  # small: in memory
    # Rows that stay in the file.
    from dbmpi.data.hdf5 import open_file
    from dbmpi.data.links import find

    with open_file(path) as file:
        stored = find(path, file, "ann", memory_bytes=max(matrix.nnz * 4 - 1, 0))
        order = random.permutation(samples)[: samples // 2 + 1]
        np.testing.assert_array_equal(stored.read((np.sort(order),)), matrix.toarray()[np.sort(order)])


def test_sparse_matrices_that_are_damaged(tmp_path):
    matrix = scipy.sparse.csr_matrix(np.eye(9, 4, dtype=np.float32))

    def damaged(name, attributes=(("shape", (9, 4)),), **parts):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            sparse(file, "inputs", matrix, **dict(attributes))
            for part, values in parts.items():
                del file[f"inputs/{part}"]
                file[f"inputs/{part}"] = values
            file["targets"] = LABELS
        return tmp_path / f"{name}.h5"

    refused("does not say its shape", damaged("1", ()))
    refused("declares 8 rows, but 'indptr' has shape", damaged("2", [("shape", (8, 4))]))
    refused("'indptr' does not fit its 4 entries", damaged("3", indptr=np.arange(10)[::-1]))
    refused("'indptr' does not fit its 4 entries", damaged("4", indptr=np.arange(10)))
    refused("names the column 77 in samples 0", damaged("5", indices=np.array([0, 1, 77, 3])))
    refused("whose 'data' is no array of numbers", damaged("6", data=np.array([b"a"] * 4)))


def test_anndata(tmp_path):
    anndata = pytest.importorskip("anndata")
    pandas = pytest.importorskip("pandas")
    words = np.array(["cat", "dog", "cow"])[LABELS]
    matrix = scipy.sparse.csr_matrix(X * (X > 0))
    observed = pandas.DataFrame({"kind": pandas.Categorical(words), "n": LABELS}, index=[f"s{n}" for n in range(9)])
    table = anndata.AnnData(X=matrix, obs=observed)
    table.layers["dense"] = X
    table.write_h5ad(tmp_path / "cells.h5ad")
    inputs, targets, labels = read(tmp_path / "cells.h5ad", inputs="X", targets="obs/kind")
    np.testing.assert_array_equal(inputs, X * (X > 0))
    assert labels == ("cat", "cow", "dog")
    assert [labels[code] for code in targets] == words.tolist()
    np.testing.assert_array_equal(read(tmp_path / "cells.h5ad", inputs="layers/dense", targets="obs/n")[1], LABELS)
    refused("'obs' is a table of anndata with the columns", tmp_path / "cells.h5ad", inputs="X", targets="obs")


def test_categories_without_anndata(tmp_path):
    path = write(
        tmp_path / "c.h5", inputs=X, kind__codes=LABELS.astype(np.int8), kind__categories=np.array([b"x", b"z", b"y"])
    )
    _, targets, labels = read(path, targets="kind")
    assert labels == ("x", "z", "y")
    np.testing.assert_array_equal(targets, LABELS)
    gaps = np.where(LABELS == 1, -1, LABELS)
    path = write(tmp_path / "g.h5", inputs=X, kind__codes=gaps, kind__categories=np.array([b"x", b"z", b"y"]))
    refused("label -1 of sample 1 is not a class; 3 of 9", path, targets="kind")


# --- MATLAB's texts ---


def test_labels_of_matlab(tmp_path):
    words = ["cat", "horse", "cow"] * 3
    path = tmp_path / "m.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["inputs"] = X.T.astype("f8")
        file["inputs"].attrs["MATLAB_class"] = np.bytes_("double")
        units = np.array([[ord(letter) for letter in word.ljust(5)] for word in words], "<u2")
        file["chars"] = units.T
        file["chars"].attrs["MATLAB_class"] = np.bytes_("char")
        cells = file.create_dataset("cells", (1, 9), h5py.ref_dtype)
        cells.attrs["MATLAB_class"] = np.bytes_("cell")
        for number, word in enumerate(words):
            cell = file.create_dataset(f"#refs#/{number}", data=np.array([[ord(x)] for x in word], "<u2"))
            cell.attrs["MATLAB_class"] = np.bytes_("char")
            cells[0, number] = cell.ref
        numbers = file.create_dataset("numbers", (1, 9), h5py.ref_dtype)
        numbers.attrs["MATLAB_class"] = np.bytes_("cell")
        for number in range(9):
            numbers[0, number] = file["inputs"].ref
    for name in ("chars", "cells"):
        inputs, targets, labels = read(path, targets=name)
        np.testing.assert_array_equal(inputs, X)
        assert [labels[code] for code in targets] == words
    refused("cell 0 is no text of up to 4096 letters", path, targets="numbers")


def test_what_hdf5storage_and_scipy_write(tmp_path):
    storage = pytest.importorskip("hdf5storage")
    words = np.array(["cat", "horse", "cow"], object)[LABELS]
    values = {"inputs": X.astype("f8"), "label": LABELS[:, None] + 1.0, "cells": words[:, None]}
    storage.savemat(str(tmp_path / "m.mat"), values, format="7.3", store_python_metadata=False)
    inputs, targets, labels = read(tmp_path / "m.mat", targets="cells")
    np.testing.assert_array_equal(inputs, X)
    assert [labels[code] for code in targets] == words.tolist()
    np.testing.assert_array_equal(read(tmp_path / "m.mat", targets="label", wanted="classes")[1], LABELS)


# --- Virtual datasets ---


def virtual(path, pieces, shape=(9, 4)):
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout(shape, np.float32)
        for rows, name, dataset, extent in pieces:
            layout[rows] = h5py.VirtualSource(name, dataset, shape=extent)
        file.create_virtual_dataset("inputs", layout, fillvalue=0)
        file["targets"] = LABELS[: shape[0]]
    return path


def test_virtual_datasets_over_files_beside(tmp_path):
    write(tmp_path / "a.h5", x=X[:5])
    (tmp_path / "below").mkdir()
    write(tmp_path / "below" / "b.h5", x=X[5:])
    pieces = [(slice(0, 5), "a.h5", "x", (5, 4)), (slice(5, 9), "below/b.h5", "x", (4, 4))]
    path = virtual(tmp_path / "all.h5", pieces)
    np.testing.assert_array_equal(read(path)[0], X)
    twice = virtual(tmp_path / "twice.h5", [(slice(0, 9), "all.h5", "inputs", (9, 4))])
    np.testing.assert_array_equal(read(twice)[0], X)
    open_at = virtual(tmp_path / "1.h5", [pieces[0], (slice(6, 9), "c.h5", "x", (3, 4))])
    write(tmp_path / "c.h5", x=X[:3])
    refused("4 of its 36 values lie in no file", open_at)
    refused(
        "is virtual over 'gone.h5', which is not there",
        virtual(tmp_path / "2.h5", [pieces[0], (slice(5, 9), "gone.h5", "x", (4, 4))]),
    )
    refused(
        r"where 'x' has shape \(5, 4\); expected \(4, 4\)",
        virtual(tmp_path / "3.h5", [pieces[0], (slice(5, 9), "a.h5", "x", (4, 4))]),
    )
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("../a.h5", str(tmp_path / "a.h5")):
        refused(
            "not beside 4.h5; files elsewhere are not followed",
            virtual(inside / "4.h5", [(slice(0, 5), name, "x", (5, 4))], (5, 4)),
        )
    (inside / "link.h5").symlink_to(tmp_path / "a.h5")
    refused(
        "files elsewhere are not followed", virtual(inside / "5.h5", [(slice(0, 5), "link.h5", "x", (5, 4))], (5, 4))
    )
    refused("has no dataset 'z'", virtual(tmp_path / "6.h5", [(slice(0, 5), "a.h5", "z", (5, 4))], (5, 4)))
    write(tmp_path / "turned.h5", x=X.T)  # as many values: HDF5 would read other rows
    turned = virtual(tmp_path / "8.h5", [(slice(0, 9), "turned.h5", "x", (9, 4))])
    refused(r"where 'x' has shape \(4, 9\); expected \(9, 4\)", turned)
    rows = [(number, "one.h5", "x", (4,)) for number in range(9)]
    write(tmp_path / "one.h5", x=X[0])
    np.testing.assert_array_equal(read(virtual(tmp_path / "9.h5", rows))[0], np.tile(X[0], (9, 1)))
    write(tmp_path / "even.h5", x=X[0::2])
    write(tmp_path / "odd.h5", x=X[1::2])
    strided = [(slice(n, 9, 2), name, "x", X[n::2].shape) for n, name in enumerate(("even.h5", "odd.h5"))]
    np.testing.assert_array_equal(read(virtual(tmp_path / "10.h5", strided))[0], X)
    circle = virtual(tmp_path / "7.h5", [(slice(0, 9), "7.h5", "inputs", (9, 4))])
    refused("is virtual, in 1 pieces and 4 levels", circle)


# --- NumPy's files ---


@pytest.mark.parametrize("compress", [False, True])
def test_arrays_of_npz(tmp_path, compress):
    path = tmp_path / "mnist.npz"
    pixels = RANDOM.integers(0, 256, (9, 2, 3), np.uint8)
    words = np.array(["cat", "dog", "cow"])[LABELS]
    save = np.savez_compressed if compress else np.savez
    save(path, x_train=pixels, y_train=LABELS, x_test=np.asfortranarray(X), words=words)
    inputs, targets, _ = read(path, inputs="x_train", targets="y_train")
    np.testing.assert_allclose(inputs, pixels / np.float32(255), rtol=1e-6)
    np.testing.assert_array_equal(targets, LABELS)
    place = DataParts(inputs=Path(f"{path}:x_test"), targets=Path(f"{path}:words"))
    inputs, targets, labels = read(place)
    np.testing.assert_array_equal(inputs, X)
    assert [labels[code] for code in targets] == words.tolist()
    refused(r"has no array 'inputs'; found 'x_train', .*name the array by data\.inputs", path)
    if compress:
        with pytest.raises(UserError, match=r"is compressed and takes .* MiB, but data\.memory_mib allows 0; raise it"):
            Source.open(path, 0, reading=Reading(inputs="x_test", targets="y_train"))


def test_python_objects_are_never_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "trapped").touch, ())

    trap = np.array([Trap()] * 9, object)
    np.save(tmp_path / "trap.npy", trap)
    np.savez(tmp_path / "trap.npz", inputs=trap, targets=LABELS)
    np.save(tmp_path / "y.npy", LABELS)
    refused("holds object; expected numbers", DataParts(inputs=tmp_path / "trap.npy", targets=tmp_path / "y.npy"))
    refused("holds object; expected numbers", tmp_path / "trap.npz")
    assert not (tmp_path / "trapped").exists()


def test_torn_files_of_numpy(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", LABELS)
    place = DataParts(inputs=tmp_path / "x.npy", targets=tmp_path / "y.npy")
    whole = (tmp_path / "x.npy").read_bytes()
    with Source.open(place, 1) as source:
        source.storage._memory_bytes = 1
        (tmp_path / "x.npy").write_bytes(whole[:-8])
        with pytest.raises(UserError, match="has become shorter while it was read"):
            source.inputs(np.array([0]))
    refused("torn or damaged", place)
    for compress in (False, True):
        path = tmp_path / f"{compress}.npz"
        (np.savez_compressed if compress else np.savez)(path, inputs=X, targets=LABELS)
        good = path.read_bytes()
        for length in range(0, len(good), 97):
            path.write_bytes(good[:length])
            with pytest.raises(UserError):
                read(path)
        for position in range(0, len(good), 13):
            path.write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
            try:
                read(path)
            except UserError:
                continue


# --- What is no data ---


def test_a_model_of_keras_is_called_that(tmp_path):
    path = write(tmp_path / "weights.h5", model_weights__dense__kernel=X)
    refused("is a model that Keras has stored, whose weights are no samples; expected 'inputs'", path)
