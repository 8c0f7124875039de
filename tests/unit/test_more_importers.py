"""Importers of folders of images, of text, of Parquet and Arrow, and of tables with categories and gaps."""

from __future__ import annotations

import gzip
import io
import wave

import h5py
import numpy as np
import pytest

from dbmpi.data import hdf5 as of_hdf5
from dbmpi.data.importers import images as of_images
from dbmpi.data.importers import text as of_text
from dbmpi.data.importers.csv import import_csv
from dbmpi.data.importers.images import import_images
from dbmpi.data.importers.libsvm import import_libsvm
from dbmpi.data.importers.parquet import import_parquet
from dbmpi.data.importers.text import import_text
from dbmpi.data.importers.wav import import_wav
from dbmpi.data.source import Source
from dbmpi.errors import UserError

RANDOM = np.random.default_rng(11)


def contents(path):
    """Return inputs, targets and labels of a data file, samples first, as a run would see them."""
    with Source.open(path, 64) as source:
        source.validate(full=True)
        every = np.arange(source.samples)
        return np.moveaxis(source.inputs(every), -1, 0), source.targets(every).T, source.labels


def stored(path, name="inputs"):
    with h5py.File(path) as file:
        return file[name][()], dict(file[name].attrs)


def refused(message, importer, *arguments, **options):
    """Expect a UserError of one line, and neither a data file nor a temporary one."""
    out = next(argument for argument in reversed(arguments) if str(argument).endswith(".h5"))
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        importer(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(out.parent.iterdir()) == before


# --- images ---


@pytest.fixture
def pictures(tmp_path):
    """Return a function that makes a folder of random images, and returns their pixels by class."""
    pillow = pytest.importorskip("PIL.Image")

    def make(name, mode, size=(5, 7), kind="png", counts=(3, 2)):
        found = {}
        for label, count in zip(("cats", "dogs"), counts, strict=True):
            inner = tmp_path / name / label / "more"
            inner.mkdir(parents=True)
            for number in range(count):
                shape = (*size, 3) if mode == "RGB" else size
                pixels = RANDOM.integers(0, 65536 if mode == "I;16" else 256, shape)
                pixels = pixels.astype(np.uint16 if mode == "I;16" else np.uint8)
                pillow.fromarray(pixels).save(inner / f"{number}.{kind}")
                found.setdefault(label, []).append(pixels)
        (tmp_path / name / "cats" / "notes.txt").write_text("no image")
        return tmp_path / name, found

    return make


@pytest.mark.parametrize(("mode", "kind"), [("L", "png"), ("RGB", "png"), ("RGB", "bmp"), ("I;16", "png")])
def test_images_are_those_of_pillow(tmp_path, monkeypatch, pictures, mode, kind):
    monkeypatch.setattr(of_images, "_AT_ONCE", 2)
    folder, pixels = pictures("train", mode, kind=kind)
    (written,) = import_images(folder, tmp_path / "out.h5")
    values, attributes = stored(tmp_path / "out.h5")
    expected = np.stack([*pixels["cats"], *pixels["dogs"]])
    expected = np.moveaxis(expected, -1, 1) if mode == "RGB" else expected
    np.testing.assert_array_equal(values, expected)
    assert values.dtype == (np.uint16 if mode == "I;16" else np.uint8)
    assert attributes["scale"] == pytest.approx(1 / (65535 if mode == "I;16" else 255))
    _, targets, labels = contents(tmp_path / "out.h5")
    assert (targets.tolist(), labels) == ([0, 0, 0, 1, 1], ("cats", "dogs"))
    assert "5 samples" in str(written)


def test_images_of_a_test_set_are_as_those_of_the_training(tmp_path, pictures):
    train, _ = pictures("train", "RGB", (6, 6))
    test, pixels = pictures("test", "L", (6, 6), counts=(0, 2))
    import_images(train, tmp_path / "train.h5")
    import_images(test, tmp_path / "test.h5", like=tmp_path / "train.h5")
    values, _ = stored(tmp_path / "test.h5")
    np.testing.assert_array_equal(values, np.stack([[each] * 3 for each in pixels["dogs"]]))
    assert contents(tmp_path / "test.h5")[1].tolist() == [1, 1]
    (test / "birds").mkdir()
    (test / "birds" / "x.png").write_bytes((test / "dogs" / "more" / "0.png").read_bytes())
    refused("knows no class 'birds'", import_images, test, tmp_path / "t.h5", like=tmp_path / "train.h5")


def test_images_of_other_sizes_and_turned_ones(tmp_path, pictures):
    pillow = pytest.importorskip("PIL.Image")
    folder, pixels = pictures("train", "RGB", (8, 4))
    turned = pillow.fromarray(pixels["cats"][0])
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    turned.rotate(90, expand=True).save(folder / "cats" / "more" / "0.png", exif=exif)
    import_images(folder, tmp_path / "out.h5")
    values, _ = stored(tmp_path / "out.h5")
    np.testing.assert_array_equal(values[0], np.moveaxis(pixels["cats"][0], -1, 0))
    pillow.fromarray(pixels["dogs"][0][:5]).save(folder / "dogs" / "z.png")
    refused(
        r"z\.png: has 5 x 4 pixels, but the first image 8 x 4; say --size 8x4", import_images, folder, tmp_path / "o.h5"
    )
    import_images(folder, tmp_path / "sized.h5", size=(4, 4), color="grey")
    assert stored(tmp_path / "sized.h5")[0].shape == (6, 4, 4)


def test_images_that_are_none(tmp_path, pictures):
    folder, _ = pictures("train", "L")
    whole = (folder / "cats" / "more" / "1.png").read_bytes()
    (folder / "cats" / "more" / "1.png").write_bytes(whole[: len(whole) // 2])
    refused(r"1\.png: (is torn or damaged|cannot be read)", import_images, folder, tmp_path / "out.h5")
    (folder / "cats" / "more" / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n")
    refused(r"1\.png: cannot be read as an image", import_images, folder, tmp_path / "out.h5")
    (tmp_path / "empty").mkdir()
    refused("holds no images in folders of its own", import_images, tmp_path / "empty", tmp_path / "out.h5")
    refused("is no folder", import_images, tmp_path / "none", tmp_path / "out.h5")
    refused(r"expected a name with \{\}", import_images, folder, tmp_path / "out.h5", per_file=2)


def test_an_import_in_several_files_goes_on_where_it_was(tmp_path, monkeypatch, pictures):
    folder, pixels = pictures("train", "L", counts=(5, 4))
    out = tmp_path / "part-{}.h5"
    read = of_images._pixels

    def torn(pillow, path, look, scaled):
        if path.parent.parent.name == "dogs":
            raise UserError("the disk is gone")
        return read(pillow, path, look, scaled)

    monkeypatch.setattr(of_images, "_pixels", torn)
    with pytest.raises(UserError, match="the disk is gone"):
        import_images(folder, out, per_file=3)
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == ["part-0.h5"]
    monkeypatch.setattr(of_images, "_pixels", read)
    before = (tmp_path / "part-0.h5").stat().st_mtime_ns
    written = import_images(folder, out, per_file=3)
    assert [each.path.name for each in written] == ["part-1.h5", "part-2.h5"]
    assert (tmp_path / "part-0.h5").stat().st_mtime_ns == before
    with Source.open(tmp_path / "part-*.h5", 64) as source:
        found = np.moveaxis(source.inputs(np.arange(9)), -1, 0)
        assert source.targets(np.arange(9)).tolist() == [0] * 5 + [1] * 4
    expected = np.stack([*pixels["cats"], *pixels["dogs"]]).astype(np.float32) * np.float32(1 / 255)
    np.testing.assert_array_equal(found, expected)
    (folder / "cats" / "more" / "0.png").write_bytes((folder / "cats" / "more" / "1.png").read_bytes() + b" ")
    with pytest.raises(UserError, match="exists already"):  # another image: not what is there
        import_images(folder, out, per_file=3)


# --- text ---

TEXT = "Ein Hähnchen, 鸡, ran\nover the road. " * 9


def naive_windows(codes, window, stride):
    starts = range(0, len(codes) - window, stride)
    return np.array([codes[s : s + window] for s in starts]), np.array([codes[s + window] for s in starts])


@pytest.mark.parametrize(("window", "stride", "block"), [(16, 1, 7), (3, 1, 64), (5, 4, 11), (4, 9, 13)])
@pytest.mark.parametrize("tokens", ["characters", "bytes"])
def test_windows_of_a_text(tmp_path, monkeypatch, window, stride, block, tokens):
    monkeypatch.setattr(of_text, "_BLOCK_BYTES", block)
    (tmp_path / "text.gz").write_bytes(gzip.compress(TEXT.encode()))
    import_text(tmp_path / "text.gz", tmp_path / "t.h5", tokens=tokens, window=window, stride=stride)
    letters = sorted(set(TEXT))
    codes = [letters.index(letter) for letter in TEXT] if tokens == "characters" else list(TEXT.encode())
    inputs, targets = naive_windows(codes, window, stride)
    values, attributes = stored(tmp_path / "t.h5")
    np.testing.assert_array_equal(values, inputs)
    size = len(letters) if tokens == "characters" else 256
    assert (values.dtype, attributes["one_hot"], attributes["scale"]) == (np.uint8, size, 1.0)
    np.testing.assert_array_equal(stored(tmp_path / "t.h5", "targets")[0], targets)
    found, _, labels = contents(tmp_path / "t.h5")
    np.testing.assert_array_equal(found, np.eye(size)[inputs])
    assert labels == (tuple(letters) if tokens == "characters" else None)


def test_the_end_of_a_text_is_the_test(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    import_text(tmp_path / "text", tmp_path / "a.h5", window=4, test_out=tmp_path / "b.h5", test_fraction=0.25)
    letters = sorted(set(TEXT))
    codes = [letters.index(letter) for letter in TEXT]
    cut = len(codes) - round(len(codes) * 0.25)
    np.testing.assert_array_equal(stored(tmp_path / "a.h5")[0], naive_windows(codes[:cut], 4, 1)[0])
    np.testing.assert_array_equal(stored(tmp_path / "b.h5")[0], naive_windows(codes[cut:], 4, 1)[0])
    (tmp_path / "more").write_text("the hen ran")
    import_text(tmp_path / "more", tmp_path / "c.h5", like=tmp_path / "a.h5")
    more = [letters.index(letter) for letter in "the hen ran"]
    np.testing.assert_array_equal(stored(tmp_path / "c.h5")[0], naive_windows(more, 4, 1)[0])
    (tmp_path / "odd").write_text("the hen ran!")
    refused(
        "the character '!' does not occur in", import_text, tmp_path / "odd", tmp_path / "d.h5", like=tmp_path / "a.h5"
    )
    refused("the test file needs both", import_text, tmp_path / "odd", tmp_path / "d.h5", test_out=tmp_path / "e.h5")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 au lait", "is not UTF-8 text near byte 3.*--tokens bytes"),
        (b"abc", "is too short for d.h5: 3 tokens; expected more than the 16"),
        (b"aaaaaaaaaaaaaaaaaaaaaa", "holds 1 different characters"),
        (b"ab\0cd" * 20, "holds zero bytes, so that it is no text"),
    ],
)
def test_texts_that_are_none(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    refused(message, import_text, tmp_path / "text", tmp_path / "d.h5")


# --- tables with categories and gaps ---

TABLE = """name,size,color,weight,who,kind
a,1.5,red,,ann,cat
b,NA,blue,4,bob,dog
c,2.5,"light, red",6,ann,dog
d,3.5,red,8,eve,cow
"""


def test_categories_and_gaps_of_a_csv(tmp_path):
    (tmp_path / "t.csv").write_text(TABLE)
    options = {"drop": ["name"], "one_hot": ["color"], "group": "who"}
    import_csv(tmp_path / "t.csv", tmp_path / "t.h5", gaps="mean", **options)
    found, targets, labels = contents(tmp_path / "t.h5")
    expected = [[1.5, 0, 0, 1, 6], [2.5, 1, 0, 0, 4], [2.5, 0, 1, 0, 6], [3.5, 0, 0, 1, 8]]
    np.testing.assert_allclose(found, expected)
    assert (targets.tolist(), labels) == ([0, 2, 2, 1], ("cat", "cow", "dog"))
    names = [name.decode() for name in stored(tmp_path / "t.h5", "input_names")[0]]
    assert names == ["size", "color=blue", "color=light, red", "color=red", "weight"]
    owners, attributes = stored(tmp_path / "t.h5", "groups")
    assert attributes["labels"][owners].tolist() == [b"ann", b"bob", b"ann", b"eve"]
    (tmp_path / "new.csv").write_text("name,size,color,weight,who,kind\nx,,red,1,joe,cow\n")
    import_csv(tmp_path / "new.csv", tmp_path / "new.h5", like=tmp_path / "t.h5", **options)
    found, targets, _ = contents(tmp_path / "new.h5")
    np.testing.assert_allclose(found, [[2.5, 0, 0, 1, 1]])
    assert targets.tolist() == [1]
    (tmp_path / "bad.csv").write_text("name,size,color,weight,who,kind\nx,1,green,1,joe,cow\n")
    message = "line 2: 'green' in column 'color' does not occur in the training file; expected one of 'blue'"
    refused(message, import_csv, tmp_path / "bad.csv", tmp_path / "b.h5", like=tmp_path / "t.h5", **options)
    import_csv(tmp_path / "t.csv", tmp_path / "d.h5", gaps="drop", **options)
    np.testing.assert_allclose(contents(tmp_path / "d.h5")[0], expected[2:])
    import_csv(tmp_path / "t.csv", tmp_path / "n.h5", gaps=-1.0, **(options | {"one_hot": ["*"]}))
    np.testing.assert_allclose(contents(tmp_path / "n.h5")[0][:, [0, 4]], [[1.5, -1], [-1, 4], [2.5, 6], [3.5, 8]])
    refused(
        "line 3: a value is missing in column 'size'; say --gaps mean",
        import_csv,
        tmp_path / "t.csv",
        tmp_path / "x.h5",
        **options,
    )
    refused(
        "--one-hot column 5 is no input",
        import_csv,
        tmp_path / "t.csv",
        tmp_path / "x.h5",
        one_hot=["kind"],
        drop=["name", "who", "color"],
    )


def test_gaps_of_a_test_file_are_filled_as_those_of_the_training(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,y\n1,2,0\n3,,1\n")
    import_csv(tmp_path / "t.csv", tmp_path / "t.h5", gaps="mean")
    (tmp_path / "n.csv").write_text("a,b,y\n,,1\n10,20,0\n")
    import_csv(tmp_path / "n.csv", tmp_path / "n.h5", like=tmp_path / "t.h5")
    np.testing.assert_allclose(contents(tmp_path / "n.h5")[0], [[2, 2], [10, 20]])


def test_too_many_categories_are_names(tmp_path):
    rows = "\n".join(f"t{number},{number % 2}" for number in range(1200))
    (tmp_path / "t.csv").write_text(f"id,y\n{rows}\n")
    refused(
        "column 'id' holds more than 1000 different texts",
        import_csv,
        tmp_path / "t.csv",
        tmp_path / "x.h5",
        one_hot=["*"],
    )


@pytest.fixture
def arrow():
    pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    words = np.array(["red", "blue", "red", "green", "blue"])
    columns = {
        "size": pa.array([1.5, None, 2.5, 3.5, 4.5]),
        "flag": pa.array([True, False, True, True, False]),
        "count": pa.array([1, 2, 3, 4, 5], pa.int16()),
        "color": pa.array(words),
        "kind": pa.array(words).dictionary_encode(),
        "embedding": pa.array([[0.5, 1], [1, 2], [3, 4], [5, 6], [7, 8]], pa.list_(pa.float32(), 2)),
        "who": pa.array(["ann", "bob", "ann", "eve", "eve"]),
        "y": pa.array(["cat", "dog", "dog", "cat", "cow"]),
    }
    return pa.table(columns)


@pytest.mark.parametrize("kind", ["parquet", "feather"])
def test_parquet_and_arrow_equal_the_columns(tmp_path, arrow, kind):
    import pyarrow.feather
    import pyarrow.parquet

    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(arrow, path, row_group_size=2)
    else:
        pyarrow.feather.write_feather(arrow, path, chunksize=2)
    import_parquet(path, tmp_path / "t.h5", gaps="mean", group="who")
    found, targets, labels = contents(tmp_path / "t.h5")
    colors = np.eye(3)[[2, 0, 2, 1, 0]]
    numbers = np.array([[1.5, 1, 1], [3, 0, 2], [2.5, 1, 3], [3.5, 1, 4], [4.5, 0, 5]])
    embedding = np.array(arrow["embedding"].to_pylist())
    np.testing.assert_allclose(found, np.concatenate([numbers, colors, colors, embedding], axis=1))
    assert [labels[code] for code in targets] == arrow["y"].to_pylist()
    names = [name.decode() for name in stored(tmp_path / "t.h5", "input_names")[0]]
    assert names[:4] == ["size", "flag", "count", "color=blue"]
    assert names[-2:] == ["embedding.0", "embedding.1"]
    import_parquet(path, tmp_path / "like.h5", like=tmp_path / "t.h5", group="who")
    np.testing.assert_array_equal(contents(tmp_path / "like.h5")[0], found)
    import_parquet(
        path, tmp_path / "v.h5", targets=["count", "flag"], kind="values", drop=["y", "who", "kind"], gaps="drop"
    )
    found, targets, _ = contents(tmp_path / "v.h5")
    np.testing.assert_allclose(targets, [[1, 1], [3, 1], [4, 1], [5, 0]])
    refused("row 1: a value is missing in column 'size'; say --gaps", import_parquet, path, tmp_path / "x.h5")
    refused("has no column 'z'; expected one of size, flag", import_parquet, path, tmp_path / "x.h5", targets=["z"])
    whole = path.read_bytes()
    for length in (5, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        refused("torn or damaged|neither Parquet nor Arrow", import_parquet, path, tmp_path / "x.h5", gaps="mean")


def test_parquet_of_pandas(tmp_path, arrow):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, 2.0, 4.0], "b": pandas.Series([1, None, 3], dtype="Int64"), "y": [0, 1, 0]})
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    import_parquet(tmp_path / "t.parquet", tmp_path / "t.h5", gaps=0.0)
    np.testing.assert_allclose(contents(tmp_path / "t.h5")[0], [[1, 1], [2, 0], [4, 3]])
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pa.table({"when": pa.array([1, 2], pa.timestamp("s")), "y": [0, 1]}), tmp_path / "d.parquet"
    )
    refused(
        "column 'when' is timestamp.*leave it out with --drop when",
        import_parquet,
        tmp_path / "d.parquet",
        tmp_path / "x.h5",
    )


# --- sparse inputs ---


@pytest.mark.parametrize("seed", range(3))
def test_libsvm_may_stay_sparse(tmp_path, monkeypatch, seed):
    sparse = pytest.importorskip("scipy.sparse")
    datasets = pytest.importorskip("sklearn.datasets")
    monkeypatch.setattr(of_hdf5, "BLOCK_BYTES", 4096)
    samples, features = 300, 700
    matrix = sparse.random(samples, features, 0.01, "csr", np.float32, random_state=seed)
    labels = np.random.default_rng(seed).integers(0, 2, samples) * 2 - 1
    labels[:2] = -1, 1
    datasets.dump_svmlight_file(matrix, labels, str(tmp_path / "t.svm"), zero_based=False)
    import_libsvm(tmp_path / "t.svm", tmp_path / "s.h5", features=features, sparse=True)
    import_libsvm(tmp_path / "t.svm", tmp_path / "d.h5", features=features)
    dense, targets, known = contents(tmp_path / "d.h5")
    found, of_sparse, of_known = contents(tmp_path / "s.h5")
    np.testing.assert_array_equal(found, dense)
    np.testing.assert_array_equal(of_sparse, targets)
    assert known == of_known == (-1, 1)
    with h5py.File(tmp_path / "s.h5") as file:
        parts = (file["inputs"][name][()] for name in ("data", "indices", "indptr"))
        back = sparse.csr_matrix(tuple(parts), tuple(file["inputs"].attrs["shape"]))
    assert (back != matrix).nnz == 0
    assert (tmp_path / "s.h5").stat().st_size < (tmp_path / "d.h5").stat().st_size
    import_libsvm(tmp_path / "t.svm", tmp_path / "like.h5", like=tmp_path / "s.h5", sparse=True)
    np.testing.assert_array_equal(contents(tmp_path / "like.h5")[0], dense)


# --- recordings in folders, and tables with words ---


def recording(seed):
    noise = np.random.default_rng(seed).normal(0, 3000, 3000).astype("<i2")
    found = io.BytesIO()
    with wave.open(found, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(noise.tobytes())
    return found.getvalue()


def test_labels_of_folders_and_tables_of_words(tmp_path):
    source = tmp_path / "speech"
    table = ["file,label,speaker"]
    for label in ("no", "yes"):
        (source / label).mkdir(parents=True)
        for number in range(2):
            name = f"{label}/0a7c2a8{number}_nohash_0.wav"
            (source / name).write_bytes(recording(number))
            table.append(f"{name},{label},0a7c2a8{number}")
    (source / "_background_noise_").mkdir()
    (source / "_background_noise_" / "hum.wav").write_bytes(recording(9))
    import_wav(source, tmp_path / "f.h5", labels="folders")
    (tmp_path / "t.csv").write_text("\n".join(table))
    import_wav(source, tmp_path / "t.h5", table=tmp_path / "t.csv")
    for name in ("f.h5", "t.h5"):
        found, targets, labels = contents(tmp_path / name)
        assert labels == ("no", "yes")
        attributes = stored(tmp_path / name, "groups")[1]
        assert attributes["labels"].tolist() == [b"0a7c2a80", b"0a7c2a81"]
        assert np.unique(targets, return_counts=True)[1].tolist() == [len(found) // 2] * 2
    np.testing.assert_array_equal(stored(tmp_path / "f.h5")[0], stored(tmp_path / "t.h5")[0])
    import_wav(source, tmp_path / "s.h5", labels="folders", states=2)
    assert contents(tmp_path / "s.h5")[2] == ("no 0", "no 1", "yes 0", "yes 1")
    new = tmp_path / "new"
    (new / "yes").mkdir(parents=True)
    (new / "yes" / "one.wav").write_bytes(recording(3))
    for like, expected in (("f.h5", {1}), ("s.h5", {2, 3})):
        import_wav(new, tmp_path / f"new-{like}", labels="folders", like=tmp_path / like)
        _, targets, labels = contents(tmp_path / f"new-{like}")
        assert set(targets.tolist()) == expected
    (new / "go").mkdir()
    (new / "go" / "one.wav").write_bytes(recording(3))
    refused(
        "the label 'go' does not occur in the training file",
        import_wav,
        new,
        tmp_path / "x.h5",
        labels="folders",
        like=tmp_path / "f.h5",
    )
    refused("holds no folders whose names are labels", import_wav, new / "yes", tmp_path / "x.h5", labels="folders")
