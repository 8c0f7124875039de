"""``dbmpi inspect``: percentiles, two checkpoints beside one another, the user's settings, and pictures of weights."""

import argparse
import json
import math
import sys
import tracemalloc

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from unit.checkpoint_files import make_info, write

import dbmpi
from dbmpi.checkpoint import array_blocks, comparison, receptive_fields, statistics, summary
from dbmpi.checkpoint.comparison import Comparison
from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.distribution import KEPT, Distribution
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.statistics import Statistics
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.cli import inspect
from dbmpi.config.defaults import chosen
from dbmpi.errors import UserError
from dbmpi.index.layout import Layout, Tensor

PERCENTS = (0.5, 1, 25, 50, 99, 99.5)
floats = st.floats(-100, 100, width=32) | st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf])


def show(capsys, *words) -> str:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    assert inspect.run(parser.parse_args(list(map(str, words)))) == 0
    return capsys.readouterr().out


def write_arrays(run, named, step=123, **fields):
    layout = Layout(tuple(Tensor(name, values.shape) for name, values in named.items()))
    with CheckpointWriter(checkpoint_path(run, step), layout, ("parameters",)) as writer:
        whole = [np.asarray(values, np.float32).ravel() for values in named.values()]
        writer.write("parameters", 0, np.concatenate(whole))
        return writer.commit(make_info(step=step, **fields))


def large(kind: str) -> np.ndarray:
    random = np.random.default_rng(3)
    size = KEPT + 12_345
    values = {
        "normal": lambda: random.standard_normal(size, np.float32) * np.float32(0.05),
        "mostly zero": lambda: np.where(random.random(size) < 0.9, 0.0, random.standard_normal(size)),
        "wide": lambda: np.exp(20 * random.standard_normal(size)) * random.choice([-1, 1], size),
        "negative": lambda: -1 - random.random(size),
        "constant": lambda: np.full(size, 0.1, np.float32),
        "bytes": lambda: random.integers(0, 256, size, np.uint8),
        "half": lambda: random.random(size).astype(np.float16),
        "big-endian": lambda: random.standard_normal(size).astype(">f4"),
    }[kind]()
    if values.dtype.kind == "f":
        values[:: size // 50] = np.nan
        values[7] = np.inf
    return values


@pytest.mark.parametrize(
    "kind", ["normal", "mostly zero", "wide", "negative", "constant", "bytes", "half", "big-endian"]
)
def test_percentiles_of_a_large_array_are_within_their_bound(kind):
    values = large(kind)
    found = Distribution()
    for part in np.array_split(values, 7):  # the first parts are kept, and counted when there are too many
        found.add(part)
    assert not found.exact
    finite = values[np.isfinite(values)].astype(np.float64)
    assert found.zeros == np.count_nonzero(finite == 0)
    expected = np.percentile(finite, PERCENTS, method="nearest")
    np.testing.assert_allclose(found.percentiles(PERCENTS), expected, rtol=1 / 128)
    edges = np.linspace(finite.min() - 1, finite.max() + 1, 30)
    counts = found.histogram(edges)
    assert counts.sum() == pytest.approx(len(finite))
    if kind == "normal":
        assert np.abs(counts - np.histogram(finite, edges)[0]).max() < 0.01 * len(finite)


@settings(max_examples=50)
@given(values=arrays.arrays(np.float32, st.integers(0, 40), elements=floats))
def test_percentiles_of_a_small_array_are_exact(values):
    found = Distribution()
    found.add(values[:7])
    found.add(values[7:])
    finite = values[np.isfinite(values)].astype(np.float64)
    assert found.exact
    assert found.zeros == np.count_nonzero(finite == 0)
    expected = np.percentile(finite, PERCENTS) if len(finite) else [math.nan] * len(PERCENTS)
    np.testing.assert_array_equal(found.percentiles(PERCENTS), expected)


def test_statistics_do_not_cancel_far_from_zero():
    values = np.random.default_rng(1).standard_normal(3 * KEPT) + 1e6
    found = Statistics()
    found.add(values)
    assert found.deviation == pytest.approx(values.std(), rel=1e-9)
    assert found.mean == pytest.approx(values.mean(), rel=1e-14)


@settings(max_examples=100)
@given(
    pair=st.integers(0, 40).flatmap(
        lambda size: st.tuples(*[arrays.arrays(np.float32, (size,), elements=floats) for _ in range(2)])
    ),
    scale=st.sampled_from([1.0, 1e-300, 1e250]),
    cut=st.integers(0, 40),
)
def test_a_comparison_is_that_of_numpy(pair, scale, cut):
    first, second = (values.astype(np.float64) * scale for values in pair)
    found = Comparison()
    found.add(first[:cut], second[:cut])
    found.add(first[cut:], second[cut:], min(cut, len(first)))
    with np.errstate(invalid="ignore"):
        change = second - first
    usable = np.isfinite(change)
    assert found.count == len(first)
    assert found.non_finite == np.count_nonzero(~usable)
    assert found.zeros == (np.count_nonzero(first == 0), np.count_nonzero(second == 0))
    assert found.changed == sum(
        a != b and not (math.isnan(a) and math.isnan(b)) for a, b in zip(first, second, strict=True)
    )
    assert found.change_norm == pytest.approx(math.hypot(*change[usable]), rel=1e-12)
    assert found.norm == pytest.approx(math.hypot(*first[usable]), rel=1e-12)
    kept = np.where(usable, change, 0.0)
    if kept.any():
        assert found.position == np.argmax(np.abs(kept))
        assert found.largest == kept[found.position]
        norm = found.norm
        assert found.ratio == pytest.approx(found.change_norm / norm if norm else math.inf)
    else:
        assert (found.position, found.ratio) == (-1, 0.0)


def test_two_checkpoints(tmp_path, capsys):
    random = np.random.default_rng(2)
    then = {"a/weights": random.random((3, 4)), "a/bias": np.zeros(3), "b": np.ones(2), "gone": np.ones(1)}
    then |= {"0.weight": np.ones((2, 2)), "0.bias": np.ones(2)}  # as in PyTorch
    now = {name: values.copy() for name, values in then.items() if name != "gone"}
    now |= {"new": np.ones(1), "b": np.ones(3)}
    now["a/weights"][1, 2] -= 0.5
    now["a/bias"][0] = 2.0
    runs = [dbmpi.Run(optimizer={"learning_rate": rate}).to_json() for rate in (0.1, 0.2)]
    write_arrays(tmp_path / "then", then, 10, configuration=runs[0], loss=0.5)
    write_arrays(tmp_path / "now", now, 20, configuration=runs[1], loss=0.25, test_step=20, test_accuracy=0.75)
    found = json.loads(show(capsys, tmp_path / "then", tmp_path / "now", "--json"))
    assert (found["then"]["step"], found["now"]["step"], found["now"]["test_accuracy"]) == (10, 20, 0.75)
    assert found["settings"] == [{"key": "optimizer.learning_rate", "then": 0.1, "now": 0.2}]
    assert (found["only_then"], found["only_now"]) == (["gone"], ["new"])
    assert found["shapes"] == [{"name": "b", "then": [2], "now": [3]}]
    layer, other = found["layers"]
    assert (other["name"], other["update_to_weight"], other["changed"]) == ("0", 0.0, 0)
    weights, bias = layer["arrays"]
    norm = np.linalg.norm(then["a/weights"])
    assert weights["update_to_weight"] == pytest.approx(0.5 / norm, rel=1e-6)
    assert weights["largest_change"] == pytest.approx(-0.5, rel=1e-6)
    assert (weights["largest_change_at"], weights["changed"], weights["size"]) == ([1, 2], 1, 12)
    assert (bias["update_to_weight"], bias["zeros"]) == (None, [3, 2])  # its first norm is 0
    assert layer["update_to_weight"] == pytest.approx(np.hypot(0.5, 2) / norm, rel=1e-6)
    lines = [line.split() for line in show(capsys, tmp_path / "then", tmp_path / "now").splitlines()]
    assert ["optimizer.learning_rate", "0.1", "0.2"] in lines
    assert ["loss", "0.5", "0.25"] in lines
    assert ["only", "now:", "new"] in lines
    assert [line[:2] for line in lines if line[:1] in (["a"], ["weights"], ["weight"])] == [
        ["a", "15"],
        ["weights", "12"],
        ["weight", "4"],
    ]


def test_state_of_the_rule_is_compared_on_demand(tmp_path, capsys):
    one, other = write(tmp_path, 1), write(tmp_path, 2, fill=1)
    assert "the settings are the same" in show(capsys, one, other)
    assert "accumulator" not in show(capsys, one, other)
    assert "accumulator: dense1" in show(capsys, one, other, "--all")
    with h5py.File(other, "r+") as file:
        file["parameters/dense2/bias"][1] = 7.5
    with pytest.raises(UserError, match=r"step-000000002.h5: /parameters/dense2/bias is damaged"):
        show(capsys, one, other)
    assert "damaged" in capsys.readouterr().out
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"] = [1.0]
    with pytest.raises(UserError, match="is a data file, expected a checkpoint"):
        show(capsys, one, tmp_path / "data.h5")


def test_a_comparison_needs_little_memory(tmp_path):
    size = 2**23
    paths = [
        write_arrays(tmp_path / name, {"w": np.full(size, fill, np.float32)}) for name, fill in (("a", 1), ("b", 3))
    ]
    with Checkpoint.open(paths[0]) as one, Checkpoint.open(paths[1]) as other:
        tracemalloc.start()
        try:
            (layer,) = comparison.compare(array_blocks.parameters(one), array_blocks.parameters(other))["layers"]
            assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        finally:
            tracemalloc.stop()
    assert layer["update_to_weight"] == pytest.approx(2.0)
    assert layer["changed"] == size


def test_checkpoints_of_a_run_in_a_table(tmp_path, capsys):
    write(tmp_path, 1, loss=2.5, accuracy=0.5)
    write(tmp_path, 2, loss=1.5, accuracy=0.6, test_step=1, test_loss=2.0, test_accuracy=0.55, seconds=3.5)
    (tmp_path / "checkpoints" / "best").symlink_to("step-000000001.h5")
    first, second = (line.split() for line in show(capsys, tmp_path).splitlines() if line.startswith("  step-"))
    assert first[-7:] == ["2.5", "50.00", "%", "-", "-", "-", "best"]
    assert second[-7:] == ["60.00", "%", "2", "55.00", "%", "1", "latest"]
    found = json.loads(show(capsys, tmp_path, "--json"))
    assert (found["latest"], found["best"]) == ("step-000000002.h5", "step-000000001.h5")
    assert [brief["test_loss"] for brief in found["checkpoints"]] == [None, 2.0]
    text = show(capsys, tmp_path)
    assert "  learned      loss 1.5, accuracy 60.00 %\n" in text
    assert "  held-out     loss 2, accuracy 55.00 %, at step 1\n" in text
    (tmp_path / "checkpoints" / "best").unlink()
    (tmp_path / "checkpoints" / "best").write_text("../../secret\n")
    assert summary.describe(tmp_path)["best"] is None


def test_the_settings_of_the_user_come_first(tmp_path, capsys):
    run = dbmpi.Run(
        network={"layers": [{"type": "dense", "units": 5, "activation": "tanh"}, {"units": 2, "type": "dense"}]},
        optimizer={"rule": "adam", "beta2": 0.5, "learning_rate": 0.3},
    )
    layers = {f"network.layers.{key}" for key in ("0.type", "0.units", "0.activation", "1.type", "1.units")}
    # The rule fills in the settings of its own that were not given: these are no choices.
    assert chosen(run.to_json()) == layers | {"optimizer.rule", "optimizer.beta2", "optimizer.learning_rate"}
    assert chosen("{") is None
    path = write(tmp_path, configuration=run.to_json())
    text = show(capsys, path)
    assert "optimizer.beta2 = 0.5" in text
    assert "server.push" not in text
    more = show(capsys, path, "--all")
    assert more.index("optimizer.beta2 = 0.5") < more.index("  defaults") < more.index("server.push = shared")


def sheet(values, input_shape):
    flat = values.ravel()
    return receptive_fields.sheet("w", values.shape, lambda start, stop: flat[start:stop], input_shape)


def test_receptive_fields_are_those_of_the_weights():
    random = np.random.default_rng(1)
    dense = random.random((3, 24))
    for shape in ((4, 6), (1, 4, 6)):
        np.testing.assert_array_equal(sheet(dense, shape).tiles, dense.reshape(3, 4, 6))
    colours = sheet(dense, (2, 3, 4)).tiles[1]
    np.testing.assert_array_equal(colours, np.hstack(list(dense[1].reshape(2, 3, 4))))
    last = sheet(random.random((2, 75)), (5, 5, 3)).tiles[1]
    assert last.shape == (5, 15)
    filters = random.random((7, 2, 3, 3))
    np.testing.assert_array_equal(sheet(filters, (2, 9, 9)).tiles[6], np.hstack(list(filters[6])))
    local = random.random((5, 5, 2, 3, 3, 1))
    found = sheet(local, (1, 7, 7))
    assert (len(found.tiles), found.each) == (50, (5, 5))
    np.testing.assert_array_equal(found.tiles[25 + 5 * 3 + 4], local[3, 4, 1, :, :, 0])
    flat = sheet(random.random((1200, 16)), (16,))  # a square number, but nothing says that it is an image
    assert not flat.image
    assert flat.tiles[0].shape == (400, 16)


def test_pictures_of_weights(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="drawing needs the extra [plot]")
    weights = np.random.default_rng(1).standard_normal((5, 16))
    named = {"dense1/weights": weights, "dense1/bias": np.full(5, np.nan), "empty": np.zeros((0, 3)), "b": np.ones(1)}
    named["no formula $\\frac$"] = weights
    one = write_arrays(tmp_path / "one", named, input_shape=(4, 4))
    named["dense1/weights"] = np.where(weights > 1.5, np.inf, weights + 1)
    write_arrays(tmp_path / "two", named, input_shape=(16,))
    for words in ((one,), (one, tmp_path / "two"), (tmp_path / "two", "--input-shape", "4,4")):
        picture = tmp_path / "picture.png"
        assert show(capsys, *words, "--plot", picture).endswith("picture.png\n")
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    # Read once, from one file.
    read, opened = statistics.of_array, []
    monkeypatch.setattr(statistics, "of_array", lambda array: (opened.append(array.name), read(array))[1])
    show(capsys, tmp_path / "one", "--plot", tmp_path / "picture.pdf", "--json")
    assert sorted(opened) == sorted(named)
    assert (tmp_path / "picture.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match=r"ends in \.png, \.pdf or \.svg"):
        show(capsys, one, "--plot", tmp_path / "picture.jpg")
    assert not list(tmp_path.glob(".picture*"))


def test_without_matplotlib_the_user_is_told_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'dbmpi\[plot\]'"):
        show(capsys, write(tmp_path), "--plot", tmp_path / "picture.png")
