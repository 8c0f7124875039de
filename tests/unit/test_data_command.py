"""``dbmpi data check, describe, split, normalize``; what they note is done to inputs wherever they are used."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

import dbmpi
from dbmpi.cli.main import main
from dbmpi.data.division import at_random, by_class, by_group
from dbmpi.data.moments import Moments
from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.errors import UserError

RANDOM = np.random.default_rng(3)
LABELS = RANDOM.integers(0, 3, 90)
X = (RANDOM.normal(size=(90, 4)) * [1, 10, 100, 0] + [0, 5, -50, 3] + 9 * np.eye(3, 4)[LABELS]).astype(np.float32)
X[:, 3] = 3


def write(path, inputs=X, targets=LABELS, attributes=(), **others):
    with h5py.File(path, "w") as file:
        file["inputs"] = inputs
        file["inputs"].attrs.update(dict(attributes))
        file["targets"] = targets
        for name, values in others.items():
            file[name] = values
    return path


def run(*words):
    assert main(["data", *map(str, words)]) == 0


def refused(capsys, message, *words):
    assert main(["data", *map(str, words)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert message in said


CONFIG = """
[data]
train = "x.h5"
[[network.layers]]
type = "dense"
units = {units}
[optimizer]
epochs = 2
batch_size = 30
[monitor]
progress = "none"
[run]
directory = "{directory}"
"""


def test_moments_are_those_of_numpy():
    for seed in range(5):
        random = np.random.default_rng(seed)
        rows = random.normal(size=(random.integers(2, 60), 6)) * 10.0 ** random.integers(-3, 3, 6) + 1e4
        rows[random.random(rows.shape) < 0.2] = np.nan
        rows[0] = 1e4
        found = Moments(6)
        for block in np.array_split(rows, random.integers(1, 5)):
            found.add(block)
        np.testing.assert_allclose(found.mean, np.nanmean(rows, axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.deviation, np.nanstd(rows, axis=0), rtol=1e-7, atol=1e-9)
        pairs = rows.reshape(len(rows), 3, 2).transpose(1, 0, 2).reshape(3, -1)
        np.testing.assert_allclose(found.together(3).mean, np.nanmean(pairs, axis=1), rtol=1e-12)
        np.testing.assert_allclose(found.together(3).deviation, np.nanstd(pairs, axis=1), rtol=1e-7, atol=1e-9)


# --- check ---


def test_check_says_what_train_would_say(tmp_path, capsys):
    path = write(tmp_path / "x.h5")
    run("check", path)
    assert "a run would take it: 90 samples of 4, 3 classes" in capsys.readouterr().out
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(units=3, directory=tmp_path / "run"))
    run("check", path, "--config", config)
    assert "the run would take it" in capsys.readouterr().out
    config.write_text(CONFIG.format(units=2, directory=tmp_path / "run"))
    refused(
        capsys,
        "the targets are 3 classes, but the network's last layer has 2 outputs",
        "check",
        path,
        "--config",
        config,
    )
    gaps = write(tmp_path / "gaps.h5", np.where(X > 0, np.nan, X))
    refused(capsys, "holds NaN", "check", gaps)
    run("check", gaps, "--missing", "0")
    refused(capsys, "has no dataset 'z'", "check", path, "--inputs", "z")
    refused(capsys, "no such data file", "check", tmp_path / "none.h5")


# --- describe ---


def test_describe_counts_everything(tmp_path, capsys):
    holes = X.copy()
    holes[[4, 4, 7], [0, 1, 2]] = np.nan
    path = write(tmp_path / "x.h5", holes, np.array([b"cat", b"dog", b"cow"])[LABELS], groups=LABELS % 2)
    run("describe", path, "--json")
    found = json.loads(capsys.readouterr().out)
    inputs = found["inputs"]
    assert (found["samples"], inputs["missing"], inputs["incomplete_samples"], inputs["constant"]) == (90, 3, 2, 1)
    np.testing.assert_allclose(inputs["lowest"], np.nanmin(holes), rtol=1e-6)
    np.testing.assert_allclose(inputs["mean"], np.nanmean(holes), rtol=1e-5)
    np.testing.assert_allclose(inputs["deviation"], np.nanstd(holes), rtol=1e-5)
    counts = np.bincount(LABELS)
    assert found["classes"] == {"cat": counts[0], "cow": counts[2], "dog": counts[1]}
    assert found["groups"] == {"0": int((LABELS % 2 == 0).sum()), "1": int((LABELS % 2).sum())}
    run("describe", path)
    said = capsys.readouterr().out
    assert "3 of 360 (0.83 %), in 2 samples" in said
    assert "1 of 4 inputs never vary" in said
    values = write(tmp_path / "v.h5", X, X[:, :2])
    run("describe", values, "--json")
    np.testing.assert_allclose(json.loads(capsys.readouterr().out)["values"]["mean"], X[:, :2].mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "kind", "attributes"),
    [
        ((4,), "f4", {}),
        ((6, 7), "u1", {}),
        ((3, 5, 5), "u1", {}),
        ((8,), "u1", {"one_hot": 5, "scale": 1.0}),
        ((2, 2, 2, 2), "f4", {}),
    ],
)
@pytest.mark.parametrize("classes", [True, False])
def test_sample_sheets_are_drawn(tmp_path, shape, kind, attributes, classes):
    pytest.importorskip("matplotlib")
    inputs = RANDOM.integers(0, 5, (20, *shape)).astype(kind)
    path = write(tmp_path / "x.h5", inputs, LABELS[:20] if classes else RANDOM.random((20, 2)), attributes)
    run("describe", path, "--plot", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"


def test_sheets_of_unknown_kinds_are_refused(tmp_path, capsys):
    refused(
        capsys, "expected a name that ends in .png", "describe", write(tmp_path / "x.h5"), "--plot", tmp_path / "x.jpg"
    )


# --- split ---


@pytest.mark.parametrize("seed", range(6))
def test_each_sample_goes_into_one_part(seed):
    random = np.random.default_rng(seed)
    samples, fraction = int(random.integers(10, 400)), float(random.uniform(0.05, 0.95))
    classes = random.integers(0, random.integers(2, 6), samples)
    test = at_random(samples, fraction, seed)
    assert test.sum() == pytest.approx(fraction * samples, abs=1)
    np.testing.assert_array_equal(test, at_random(samples, fraction, seed))
    assert (test != at_random(samples, fraction, seed + 1)).any()
    test = by_class(classes, fraction, seed)
    for label in np.unique(classes):
        assert test[classes == label].sum() == pytest.approx(fraction * (classes == label).sum(), abs=1)
    assert test.sum() == pytest.approx(fraction * samples, abs=1)
    test = by_group(classes, fraction, seed)
    for label in np.unique(classes):
        assert len(set(test[classes == label].tolist())) == 1
    assert 0 < test.sum() < samples


def contents(path):
    with h5py.File(path) as file:
        return {name: (file[name][()], dict(file[name].attrs)) for name in file}, dict(file.attrs)


def test_split_keeps_types_labels_groups_and_the_rest(tmp_path, capsys):
    pixels = RANDOM.integers(0, 60_000, (90, 2, 3)).astype(np.uint16)
    speakers = np.array([b"ann", b"bob", b"eve"])[RANDOM.integers(0, 3, 90)]
    path = write(tmp_path / "x.h5", pixels, np.array([b"cat", b"dog", b"cow"])[LABELS], {"scale": 0.5}, who=speakers)
    outs = tmp_path / "a.h5", tmp_path / "b.h5"
    run("split", path, "--out", outs[0], "--test-out", outs[1], "--hold-out", "bob", "--group", "who")
    assert "a.h5: " in capsys.readouterr().out
    (one, _), (other, _) = contents(outs[0]), contents(outs[1])
    held = speakers == b"bob"
    for found, rows in ((one, ~held), (other, held)):
        np.testing.assert_array_equal(found["inputs"][0], pixels[rows])
        assert found["inputs"][0].dtype == np.uint16
        assert found["inputs"][1]["scale"] == 0.5
        assert found["targets"][1]["labels"].tolist() == [b"cat", b"cow", b"dog"]
        names = found["groups"][1]["labels"]
        assert names[found["groups"][0]].tolist() == speakers[rows].tolist()
    refused(
        capsys,
        "has no group 'joe'; expected some of ann, bob, eve",
        "split",
        path,
        "--out",
        outs[0],
        "--test-out",
        outs[1],
        "--hold-out",
        "joe",
        "--group",
        "who",
    )
    refused(capsys, "exists already", "split", path, "--out", outs[0], "--test-out", outs[1], "--fraction", "0.2")
    refused(capsys, "expected either --fraction", "split", path, "--out", outs[0], "--test-out", outs[1])
    refused(
        capsys,
        "does not say whose each sample is",
        "split",
        path,
        "--out",
        outs[0],
        "--test-out",
        outs[1],
        "--fraction",
        "0.2",
        "--by",
        "group",
        "--force",
    )
    refused(
        capsys,
        "0 would be in the test file",
        "split",
        path,
        "--out",
        outs[0],
        "--test-out",
        outs[1],
        "--fraction",
        "0.001",
        "--force",
    )
    run(
        "split",
        path,
        "--out",
        outs[0],
        "--test-out",
        outs[1],
        "--fraction",
        "0.2",
        "--by",
        "class",
        "--seed",
        "7",
        "--force",
    )
    (one, _), (other, _) = contents(outs[0]), contents(outs[1])
    together = np.concatenate([one["inputs"][0], other["inputs"][0]])
    assert sorted(map(bytes, together)) == sorted(map(bytes, pixels))


def test_split_of_what_is_no_plain_file(tmp_path):
    """Values as they are meant: packed by netCDF, of several files."""
    packed = np.round(X * 10).clip(-30_000, 30_000).astype(np.int16)
    for number in range(2):
        write(tmp_path / f"{number}.nc", packed, X[:, :2], {"scale_factor": 0.1, "add_offset": 4.0})
    run("split", tmp_path / "*.nc", "--out", tmp_path / "a.h5", "--test-out", tmp_path / "b.h5", "--fraction", "0.3")
    one, other = contents(tmp_path / "a.h5")[0], contents(tmp_path / "b.h5")[0]
    expected = np.concatenate([packed * 0.1 + 4.0] * 2)
    test = at_random(180, 0.3, 0)
    np.testing.assert_allclose(other["inputs"][0], expected[test], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one["inputs"][0], expected[~test], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(other["targets"][0], np.concatenate([X[:, :2]] * 2)[test])


# --- normalize ---


@pytest.mark.parametrize(("by", "groups"), [("input", (0,)), ("channel", (0, 2, 3)), ("all", (0, 1, 2, 3))])
def test_normalize_notes_means_and_deviations(tmp_path, by, groups):
    images = (RANDOM.normal(size=(50, 3, 4, 2)) * [[[1]], [[7]], [[0]]] + [[[0]], [[100]], [[5]]]).astype(np.float32)
    path = write(tmp_path / "x.h5", images, LABELS[:50])
    before = path.read_bytes()
    run("normalize", path, "--by", by, "--out", tmp_path / "n.h5")
    assert path.read_bytes() == before
    mean, deviation = images.mean(axis=groups, keepdims=True), images.std(axis=groups, keepdims=True)
    expected = (images - mean) / np.where(deviation > 1e-6, deviation, 1)
    for memory_bytes in (1 << 20, 100):
        with Source.open(tmp_path / "n.h5", 1) as source:
            source.storage._memory_bytes = memory_bytes
            np.testing.assert_allclose(np.moveaxis(source.inputs(np.arange(50)), -1, 0), expected, atol=2e-4)
    with Source.open(tmp_path / "n.h5", 1, reading=Reading(own=True)) as source:
        np.testing.assert_allclose(source.inputs(np.arange(50)), expected, atol=2e-4)
    run("normalize", path, "--by", by)  # in place
    assert contents(path)[0]["inputs"][1]["normalised_by"] == by


def test_what_cannot_be_normalised(tmp_path, capsys):
    refused(capsys, "1 inputs are missing", "normalize", write(tmp_path / "n.h5", np.where(X[5, 1] == X, np.nan, X)))
    refused(
        capsys,
        "stand for one-hot vectors",
        "normalize",
        write(tmp_path / "o.h5", np.uint8([[1, 2]] * 90), LABELS, {"one_hot": 3}),
    )
    np.savez(tmp_path / "x.npz", inputs=X, targets=LABELS)
    refused(capsys, "are not one dataset of one HDF5 file", "normalize", tmp_path / "x.npz")
    bad = write(tmp_path / "b.h5", X, LABELS, {"subtract": [1.0, 2.0, 3.0], "divide": [1.0, 2.0, 3.0]})
    refused(capsys, "is normalised by 3 numbers, but its samples have shape (4,); expected 1 or 4", "check", bad)
    bad = write(tmp_path / "c.h5", X, LABELS, {"subtract": [1.0], "divide": [0.0]})
    refused(capsys, "none to divide by that is 0", "check", bad)


def test_a_network_does_to_raw_inputs_what_was_done_in_training(tmp_path):
    """Raw files and raw arrays, whatever they say themselves, give the same as the training file."""
    raw = write(tmp_path / "x.h5")
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(units=3, directory=tmp_path / "run").replace('"x.h5"', '"n.h5"\ntest = "x.h5"'))
    run("normalize", raw, "--out", tmp_path / "n.h5")
    result = dbmpi.train(dbmpi.load(config))
    with Source.open(tmp_path / "n.h5", 1) as source:
        assert abs(source.inputs(np.arange(90))).max() < 10
    outcome = dbmpi.evaluate(result, tmp_path / "n.h5")
    assert dbmpi.evaluate(result, raw) == outcome
    assert result.test.mean_loss == pytest.approx(outcome.mean_loss)
    expected = dbmpi.predict(result, tmp_path / "n.h5")
    np.testing.assert_array_equal(dbmpi.predict(result, raw), expected)
    np.testing.assert_array_equal(dbmpi.predict(result, X), expected)
    other = write(tmp_path / "o.h5", X, LABELS, {"subtract": [7.0], "divide": [9.0]})
    np.testing.assert_array_equal(dbmpi.predict(result, other), expected)
    config.write_text(CONFIG.format(units=3, directory=tmp_path / "plain"))
    plain = dbmpi.train(dbmpi.load(config))
    np.testing.assert_array_equal(dbmpi.predict(plain, tmp_path / "n.h5"), dbmpi.predict(plain, raw))


@pytest.mark.parametrize("kind", ["f4", "u1"])
def test_an_exported_graph_normalises_too(tmp_path, kind):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    inputs = X if kind == "f4" else RANDOM.integers(0, 256, (90, 4)).astype(np.uint8)
    run("normalize", write(tmp_path / "x.h5", inputs))
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(units=3, directory=tmp_path / "run"))
    result = dbmpi.train(dbmpi.load(config))
    dbmpi.export(result, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (found,) = session.run(["outputs"], {"inputs": inputs})
    np.testing.assert_allclose(found, dbmpi.predict(result, tmp_path / "x.h5"), atol=2e-6)


# --- one-hot ---


def test_whole_numbers_become_one_hot_vectors(tmp_path):
    for kind in ("u1", "u2", "i2", "i4"):
        tokens = RANDOM.integers(0, 7, (90, 5)).astype(kind)
        path = write(tmp_path / f"{kind}.h5", tokens, LABELS, {"one_hot": 7, "scale": 1.0})
        expected = np.eye(7, dtype=np.float32)[tokens]
        for memory_bytes in (1 << 20, 100):
            with Source.open(path, 1) as source:
                source.storage._memory_bytes = memory_bytes
                assert source.input_shape == (5, 7)
                np.testing.assert_array_equal(np.moveaxis(source.inputs(np.arange(90)), -1, 0), expected)
        with Source.open(path, 1, reading=Reading(own=True)) as source:
            found = source.inputs(np.arange(90))
            assert found.dtype == tokens.dtype
            np.testing.assert_array_equal(found, tokens)
    bad = write(tmp_path / "bad.h5", tokens, LABELS, {"one_hot": 3, "scale": 1.0})
    with Source.open(bad, 1) as source, pytest.raises(UserError, match="expected whole numbers from 0 to 2"):
        source.inputs(np.arange(90))
    with pytest.raises(UserError, match=r"'one_hot'.*expected a whole number from 2"):
        Source.open(write(tmp_path / "half.h5", tokens, LABELS, {"one_hot": 1.5}), 1)


def test_data_that_are_no_file_are_named(tmp_path, capsys):
    refused(capsys, "no file has such a name", "describe", Path(tmp_path / "none-*.h5"))
