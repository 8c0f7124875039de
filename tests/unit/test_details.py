"""``dbmpi evaluate --details``: the same numbers as scikit-learn's, and bounded with any number of classes."""

import json
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from unit.test_evaluate import SAMPLES, make_data, naive, refused, run, train

from dbmpi.cli import evaluate_text
from dbmpi.runs import class_measures, confusion_picture, details
from dbmpi.runs.class_measures import ClassMeasures, ConfusionCounts, Ranking
from dbmpi.runs.value_measures import ValueMeasures, ValueSums

metrics = pytest.importorskip("sklearn.metrics", reason="the judge is scikit-learn")


def measure(outputs, targets, classes, parts=1, labels=()):
    """Return the measures of outputs (outputs, samples), counted in several parts by several counters."""
    counters = [ConfusionCounts(len(outputs)) for _ in range(2)]
    scores = outputs[targets, np.arange(len(targets))]
    rankings = [Ranking(scores, targets, classes) for _ in range(2)]
    for number, part in enumerate(np.array_split(np.arange(len(targets)), parts)):
        counters[number % 2].add(outputs[:, part], targets[part])
        rankings[number % 2].add(outputs[:classes, part], targets[part])
    counters[0].merge(np.concatenate([counter.flat() for counter in counters]))
    area = rankings[0].areas(sum(ranking.halves for ranking in rankings))
    return ClassMeasures(classes, labels, *counters[0].entries(), area)


def judged_area(targets, outputs, number):
    own = targets == number
    if own.all() or not own.any():
        return np.nan
    return metrics.roc_auc_score(own, outputs[number])


@given(
    st.integers(1, 8), st.integers(0, 3), st.integers(1, 60), st.integers(1, 6), st.sampled_from([0, 1, 4]), st.data()
)
def test_measures_of_classes_are_those_of_scikit_learn(classes, more, samples, parts, decimals, data):
    """With classes that do not occur, of few and of many samples, outputs that are no classes, and equal scores."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    outputs = random.normal(size=(classes + more, samples)).round(decimals).astype(np.float32)
    targets = random.integers(0, classes, samples).astype(np.int32)
    few, compared = data.draw(st.tuples(st.sampled_from([0, 5, 32]), st.sampled_from([1, 100, 1 << 21])))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(class_measures, "_FEW", few)
        patched.setattr(class_measures, "_COMPARED", compared)
        found = measure(outputs, targets, classes, parts)
    predicted = outputs.argmax(axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judged = metrics.confusion_matrix(targets, predicted, labels=np.arange(classes + more))
    np.testing.assert_array_equal(found.matrix(), judged[:classes, :classes])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision, recall, f1, support = metrics.precision_recall_fscore_support(
            targets, predicted, labels=np.arange(classes), zero_division=np.nan
        )
    np.testing.assert_array_equal(found.support, support)
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, recall)
    there = (support > 0) | (judged.sum(axis=0)[:classes] > 0)
    np.testing.assert_allclose(found.f1[there], f1[there])
    assert np.isnan(found.f1[~there]).all()
    np.testing.assert_allclose(found.area, [judged_area(targets, outputs, number) for number in range(classes)])
    assert sum(count for *_, count in found.confusions(10**6)) == (targets != predicted).sum()


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_means_are_those_of_scikit_learn(classes, seed):
    random = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(classes), random.integers(0, classes, 40)])
    scores = special.softmax(random.normal(size=(len(targets), classes)), axis=1)
    found = measure(scores.T, targets, classes, 3)
    predicted = scores.argmax(axis=1)
    for average, weighted in (("macro", False), ("weighted", True)):
        judged = metrics.precision_recall_fscore_support(targets, predicted, average=average, zero_division=0)
        means = found.averages(weighted=weighted)
        np.testing.assert_allclose([means["precision"], means["recall"], means["f1"]], judged[:3])
        if classes > 2:
            judged_auc = metrics.roc_auc_score(targets, scores, multi_class="ovr", average=average)
            assert means["auc"] == pytest.approx(judged_auc)


@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.sampled_from([0.0, 1e6]),
    st.integers(0, 2**32 - 1),
)
def test_measures_of_values_are_those_of_scikit_learn(outputs, sizes, far, seed):
    """In batches of any size, and where the targets are far from 0."""
    random = np.random.default_rng(seed)
    targets = random.normal(far, 3, size=(outputs, sum(sizes)))
    found = targets + random.normal(size=targets.shape)
    total, first = None, 0
    for size in sizes:
        one = ValueSums.of(found[:, first : first + size], targets[:, first : first + size])
        total = one if total is None else total.plus(one)
        first += size
    measures = ValueMeasures((), total)
    absolute = metrics.mean_absolute_error(targets.T, found.T, multioutput="raw_values")
    squared = metrics.mean_squared_error(targets.T, found.T, multioutput="raw_values")
    np.testing.assert_allclose(measures.mean_absolute_error, absolute)
    np.testing.assert_allclose(measures.root_mean_squared_error, np.sqrt(squared))
    if sum(sizes) > 1:
        judged = metrics.r2_score(targets.T, found.T, multioutput="raw_values")
        np.testing.assert_allclose(measures.r2, judged, rtol=1e-6)
    else:
        assert np.isnan(measures.r2).all()


def test_values_that_are_all_the_same_have_no_r2():
    same = np.full((1, 4), 3.0)
    measures = ValueMeasures(("depth",), ValueSums.of(same + 1, same).plus(ValueSums.of(same, same)))
    assert np.isnan(measures.r2).all()
    assert evaluate_text.value_json(measures)["outputs"][0]["r2"] is None
    assert list(evaluate_text.lines(measures))[1].split() == ["depth", "-", "0.5", "0.7071"]


@pytest.mark.parametrize("keep", [True, False])
def test_the_command_gives_what_scikit_learn_gives(tmp_path, capsys, monkeypatch, keep):
    if not keep:
        monkeypatch.setattr(details, "_KEPT_BYTES", 0)
    tensors = train(tmp_path / "run")
    inputs, targets = make_data(tmp_path / "data.h5")
    scores = special.softmax(naive(tensors, inputs), axis=1).astype(np.float32)
    words = ("evaluate", tmp_path / "run", "--data", tmp_path / "data.h5", "--batch-size", 7, "--details")
    found = json.loads(run(capsys, *words, "--json"))
    by_class = found["details"]["classes"]
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        targets, scores.argmax(axis=1), zero_division=np.nan
    )
    for name, judged in (("samples", support), ("precision", precision), ("recall", recall), ("f1", f1)):
        np.testing.assert_allclose([np.nan if one[name] is None else one[name] for one in by_class], judged)
    areas = [judged_area(targets, scores.T, number) for number in range(5)]
    np.testing.assert_allclose([one["auc"] for one in by_class], areas)
    np.testing.assert_array_equal(
        found["details"]["confusion_matrix"], metrics.confusion_matrix(targets, scores.argmax(axis=1))
    )
    text = run(capsys, *words)
    assert ["4", str(support[4])] in [line.split()[:2] for line in text.splitlines()]
    assert f"{recall[2]:.3f}" in text
    assert "weighted by samples" in text


def test_the_command_measures_values(tmp_path, capsys):
    tensors = train(tmp_path / "run", loss="squared", classes=0)
    inputs, values = make_data(tmp_path / "data.h5", targets="values")
    outputs = naive(tensors, inputs)
    words = ("evaluate", tmp_path / "run", "--data", tmp_path / "data.h5", "--batch-size", 9, "--details")
    found = json.loads(run(capsys, *words, "--json"))["details"]
    judged = metrics.r2_score(values, outputs, multioutput="raw_values")
    np.testing.assert_allclose([one["r2"] for one in found["outputs"]], judged, rtol=1e-4)
    assert found["mean"]["r2"] == pytest.approx(judged.mean(), rel=1e-4)
    errors = np.abs(values - outputs).mean(axis=0)
    np.testing.assert_allclose([one["mean_absolute_error"] for one in found["outputs"]], errors, rtol=1e-4)
    assert "mean over outputs" in run(capsys, *words)


def test_outputs_that_are_no_numbers_are_counted_and_have_no_area():
    outputs = np.random.default_rng(1).normal(size=(3, 20)).astype(np.float32)
    outputs[1, 4], outputs[:, 7] = np.nan, np.inf
    targets = np.arange(20) % 3
    counts = ConfusionCounts(3)
    counts.add(outputs, targets)
    measures = ClassMeasures(3, (), *counts.entries(), np.full(3, np.nan))
    assert measures.support.sum() == 20
    assert measures.matrix().sum() == 18
    text = "\n".join(evaluate_text.lines(measures))
    assert "2 samples have no number as output" in text
    found = evaluate_text.as_json(measures)
    assert sum(one["samples"] for one in found["mistakes"] if one["taken_for"] is None) == 2
    assert found["classes"][0]["auc"] is None


def test_a_network_that_gives_no_numbers_is_still_measured(tmp_path, capsys):
    from dbmpi.cli.main import main

    train(tmp_path / "run")
    inputs, _ = make_data(tmp_path / "data.h5")
    import h5py

    with h5py.File(tmp_path / "data.h5", "r+") as file:
        file["inputs"][3] = np.full(inputs[3].shape, 1e38).reshape(file["inputs"].shape[1:])
    code = main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "data.h5"), "--details", "--json"])
    found = json.loads(capsys.readouterr().out)["details"]
    lost = [one for one in found["mistakes"] if one["taken_for"] is None]
    assert code == (1 if lost else 0)
    assert sum(one["samples"] for one in found["classes"]) == SAMPLES


def test_21000_classes_stay_bounded(tmp_path):
    """In memory, in print, in JSON and in the picture; a dense matrix alone would be 3.5 GB."""
    random = np.random.default_rng(2)
    classes, counts = 21_000, ConfusionCounts(21_000)
    tracemalloc.start()
    for _ in range(3):
        outputs = random.random(size=(classes, 64), dtype=np.float32)
        counts.add(outputs, random.integers(0, classes, 64).astype(np.int32))
    labels = tuple(f"class <{number}> " + "x" * 100 for number in range(classes))
    measures = ClassMeasures(classes, labels, *counts.entries(), np.full(classes, np.nan))
    lines = list(evaluate_text.lines(measures))
    found = json.dumps(evaluate_text.as_json(measures))
    matrix = measures.matrix(500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert len(lines) < 40
    assert max(map(len, lines)) < 100
    assert len(found) < 8e6
    assert "confusion_matrix" not in found
    assert matrix.shape == (500, 500)
    assert matrix.sum() == 3 * 64


@settings(max_examples=10)
@given(st.integers(1, 70), st.integers(1, 50))
def test_a_coarser_matrix_has_the_same_samples(classes, size):
    random = np.random.default_rng(classes)
    outputs = random.normal(size=(classes, 30)).astype(np.float32)
    targets = random.integers(0, classes, 30)
    found = measure(outputs, targets, classes)
    whole, coarse = found.matrix(), found.matrix(size)
    size = min(size, classes)
    groups = np.arange(classes) * size // classes
    twin = np.zeros((size, size), np.int64)
    for row in range(classes):
        for column in range(classes):
            twin[groups[row], groups[column]] += whole[row, column]
    np.testing.assert_array_equal(coarse, twin)


@pytest.mark.parametrize("classes", [3, 40, 70, 1000])
def test_the_picture_is_drawn_for_any_number_of_classes(tmp_path, classes):
    pytest.importorskip("matplotlib", reason="drawing needs the extra [plot]")
    from matplotlib.image import imread

    random = np.random.default_rng(classes)
    targets = random.integers(0, classes, 300)
    outputs = random.normal(size=(classes, 300)).astype(np.float32)
    outputs[targets, np.arange(300)] += 3
    labels = tuple(f"$\\frac{number}" for number in range(classes))
    path = confusion_picture.draw(measure(outputs, targets, classes, labels=labels), "$x", tmp_path / "out.png")
    assert imread(path)[..., :3].std() > 0.02
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.png"]


def test_what_cannot_be_measured_or_drawn_is_refused(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="drawing needs the extra [plot]")
    train(tmp_path / "run")
    make_data(tmp_path / "data.h5")
    words = ("evaluate", tmp_path / "run", "--data", tmp_path / "data.h5", "--plot")
    assert "expected a name that ends in .png, .pdf or .svg" in refused(capsys, *words, tmp_path / "out.txt")
    assert "there is no directory" in refused(capsys, *words, tmp_path / "no" / "out.png")
    text = run(capsys, *words, tmp_path / "out.png")
    assert text.rstrip().endswith("out.png")
    assert "confusion matrix" in text
    train(tmp_path / "values", loss="squared", classes=0)
    make_data(tmp_path / "values.h5", targets="values")
    values = ("evaluate", tmp_path / "values", "--data", tmp_path / "values.h5", "--plot", tmp_path / "v.png")
    assert "draws a confusion matrix, and the targets are no classes" in refused(capsys, *values)
    assert not (tmp_path / "v.png").exists()
