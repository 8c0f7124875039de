"""Labels of any kind, weights of samples and classes, and the loss of guessing, from a file to a batch."""

import h5py
import numpy as np
import pytest

from dbmpi import config
from dbmpi.config import DataSection, NetworkSection
from dbmpi.data.guess import loss_of_guessing
from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.errors import UserError
from dbmpi.objective import Batch
from dbmpi.replica.whole import WholeNetwork

RANDOM = np.random.default_rng(8)
COUNT = 30
INPUTS = RANDOM.normal(size=(COUNT, 4)).astype(np.float32)
CODES = RANDOM.permutation(np.arange(COUNT) % 5 // 2)  # 12, 12, 6
NAMES = np.array(["cow", "dog", "sheep"])
ALL = np.arange(COUNT)


def write(path, targets, *, weights=None, inputs=INPUTS, **options):
    with h5py.File(path, "w") as file:
        file["inputs"] = inputs
        file.create_dataset("targets", data=targets, **options)
        if weights is not None:
            file["w"] = weights
    return path


def opened(path, resident=True, **reading):
    source = Source.open(path, 64, reading=Reading(**reading))
    if not resident:
        source.storage._memory_bytes = 100
    return source


KINDS = {
    "int64": (CODES, {}, None),
    "bool": (CODES == 0, {}, None),
    "uint64, (n, 1)": (CODES[:, None].astype("u8"), {}, None),
    "big endian, (1, n)": (CODES[None].astype(">i4"), {}, None),
    "from 1": (CODES.astype("i2") + 1, {}, (1, 2, 3)),
    "any": (CODES * 7 + 5, {}, (5, 12, 19)),
    "signs": (np.where(CODES == 0, -1, 1), {}, (-1, 1)),
    "text": (NAMES.astype("S")[CODES], {}, tuple(NAMES)),
    "padded text": (np.char.ljust(NAMES, 9).astype("S")[CODES], {}, tuple(NAMES)),
    "text of any length": (NAMES.astype(object)[CODES], {"dtype": h5py.string_dtype()}, tuple(NAMES)),
    "enumeration": (
        CODES.astype("i1") * 3,
        {"dtype": h5py.enum_dtype({"sheep": 6, "cow": 0, "dog": 3}, basetype="i1")},
        tuple(NAMES),
    ),
    "whole floats": (CODES.astype(float), {}, None),
    "whole floats from 1": (CODES[:, None] + np.float32(1), {}, (1, 2, 3)),
    "one-hot": (np.eye(3, dtype=np.float32)[CODES], {}, None),
    "one-hot bytes": (np.eye(3, dtype=np.uint8)[CODES], {}, None),
}


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_any_kind_are_classes(tmp_path, kind, resident):
    targets, options, labels = KINDS[kind]
    binary = kind in ("bool", "signs")
    expected = {"bool": CODES == 0, "signs": CODES != 0}.get(kind, CODES)
    path = write(tmp_path / "data.h5", targets, **options)
    some = RANDOM.integers(0, COUNT, 50)
    with opened(path, resident, wanted="classes") as source:
        source.validate(full=True)
        assert (source.classes, source.target_size, source.labels) == (2 if binary else 3, None, labels)
        assert bool(source.notes) == (labels is not None or "one-hot" in kind)
        np.testing.assert_array_equal(source.targets(some), expected[some])
        assert source.targets(some).dtype == np.int32
        train = source.classes, source.labels
    # A test file without the first class: the same label is the same class.
    few = np.flatnonzero(expected > 0)
    rows = targets.reshape(-1)[few] if targets.size == COUNT else targets[few]
    test = write(tmp_path / "test.h5", rows, inputs=INPUTS[few], **options)
    reading = Reading(wanted="classes").held_out(*train)
    with Source.open(test, 64, reading=reading) as source, opened(path, wanted="classes") as trained:
        source.validate(full=True)
        source.expect_like(trained)
        np.testing.assert_array_equal(source.targets(np.arange(len(few))), expected[few])


def test_labels_that_were_not_learned_are_named(tmp_path):
    path = write(tmp_path / "more.h5", CODES + 2)
    reading = Reading().held_out(3, (1, 2, 3))
    with (
        Source.open(path, 64, reading=reading) as source,
        pytest.raises(UserError, match=r"label 4 of sample .* 1, 2, 3"),
    ):
        source.validate(full=True)
    with opened(write(tmp_path / "two.h5", np.eye(3, dtype="u1")[CODES].repeat(2, 1)), wanted="classes") as source:
        assert (source.classes, source.target_size) == (None, 6)  # not one-hot, so values
    late = np.eye(3)[CODES]
    late[-1] = 1
    with opened(write(tmp_path / "late.h5", late), wanted="classes") as source:
        assert source.target_size == 3
    with pytest.raises(UserError, match=r"label 0\.5 of sample 3 is not a class; .* 'squared', or 'logistic'"):
        opened(write(tmp_path / "half.h5", np.where(ALL == 3, 0.5, CODES)), wanted="classes")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([7, 5, -3], (7, 5, -3)),
        (np.array(["x", "y", "z"], object), ("x", "y", "z")),
        (np.array([b"x", b"y", b"z"]), ("x", "y", "z")),
        ([7, 5, 7], None),
        ([7, 5], None),
        ([1.5, 2, 3], None),
        (np.array([2**63, 1, 2], "u8"), None),
    ],
)
def test_labels_of_the_classes_are_those_of_an_attribute(tmp_path, labels, expected):
    path = write(tmp_path / "data.h5", CODES)
    with h5py.File(path, "a") as file:
        file["targets"].attrs["classes"] = 3
        file["targets"].attrs["labels"] = labels
    with opened(path) as source:
        assert source.labels == expected
        np.testing.assert_array_equal(source.targets(ALL), CODES)


def test_several_labels_a_sample_are_values_for_logistic(tmp_path):
    several = RANDOM.integers(0, 2, (COUNT, 3))
    for kind in ("f4", "f8", "i8", "u1", "?"):
        with opened(write(tmp_path / "data.h5", several.astype(kind)), wanted="probabilities") as source:
            source.validate(full=True)
            source.expect(3, "logistic")
            np.testing.assert_array_equal(source.targets(ALL), several.T.astype(np.float32))
            assert source.targets(ALL).dtype == np.float32
    with (
        opened(write(tmp_path / "data.h5", several * 2), wanted="probabilities") as source,
        pytest.raises(UserError, match=r"holds \[.*'logistic' takes values between 0 and 1"),
    ):
        source.validate(full=True)


# --- Weights ---


def naive(weights, class_weights):
    product = np.ones(COUNT) if weights is None else weights.reshape(-1).astype(float)
    if class_weights == "balanced":
        product = product * np.array([COUNT / (3 * (code == CODES).sum()) for code in CODES])
    elif class_weights is not None:
        product = product * np.array([class_weights[code] for code in CODES])
    return product / product.mean()


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("class_weights", [None, "balanced", (1.0, 0.0, 5.0)])
@pytest.mark.parametrize("kind", [None, "f8", "u1", "?", "column"])
def test_weights_have_a_mean_of_one_over_the_data(tmp_path, kind, class_weights, resident):
    weights = None if kind is None else RANDOM.integers(0, 4, COUNT).astype("f4" if kind == "column" else kind)
    if kind == "column":
        weights = weights[:, None]
    path = write(tmp_path / "data.h5", CODES, weights=weights)
    some = RANDOM.integers(0, COUNT, 40)
    with opened(path, resident, weights=None if kind is None else "w", class_weights=class_weights) as source:
        found = source.batch(some).weights
        if kind is None and class_weights is None:
            assert found is None
            return
        expected = naive(weights, class_weights)
        np.testing.assert_allclose(found, expected[some], rtol=1e-6)
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.concatenate([part for _, part in source.answers()]), expected, rtol=1e-6)


def test_balanced_weights_are_scikit_learn_s(tmp_path):
    judge = pytest.importorskip("sklearn.utils.class_weight")
    with opened(write(tmp_path / "data.h5", CODES), class_weights="balanced") as source:
        expected = judge.compute_sample_weight("balanced", CODES)
        np.testing.assert_allclose(source.batch(ALL).weights, expected / expected.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "reading", "message"),
    [
        (-np.ones(COUNT), {"weights": "w"}, r"'w': the weight of sample 0 is -1\.0; expected a finite number that"),
        (np.where(ALL == 4, np.nan, 1), {"weights": "w"}, r"the weight of sample 4 is nan"),
        (np.zeros(COUNT), {"weights": "w"}, r"'w': all weights are 0"),
        (np.ones(COUNT - 1), {"weights": "w"}, r"'w' is float64 of shape \(29,\); expected numbers \(30,\)"),
        (np.ones((COUNT, 2)), {"weights": "w"}, r"of shape \(30, 2\); expected numbers \(30,\)"),
        (None, {"weights": "w"}, r"has no dataset 'w'; .*data\.weights"),
        (None, {"class_weights": (1.0, 2.0)}, r"class_weights has 2 weights, but .* 3 classes"),
    ],
)
def test_weights_that_make_no_sense_are_named(tmp_path, weights, reading, message):
    with pytest.raises(UserError, match=message):
        opened(write(tmp_path / "data.h5", CODES, weights=weights), **reading)
    values = write(tmp_path / "values.h5", INPUTS)
    with pytest.raises(UserError, match="class_weights needs classes, but the targets are values"):
        opened(values, class_weights="balanced")


def test_reconstruction_has_no_weights():
    layers = [{"type": "local", "maps": 1, "field": 1, "reconstruction": 0.1}]
    for section in ({"data": {"train": "x", "weights": "w"}}, {"network": {"class_weights": "balanced"}}):
        described = {"data": {"train": "x"}, "network": {}} | section
        described["network"] = {"loss": "reconstruction", "layers": layers} | described["network"]
        with pytest.raises(ValueError, match="goes with losses that have targets"):
            config.Run.model_validate(described)


@pytest.mark.parametrize("loss", ["softmax", "logistic", "squared", "logistic values", "squared values"])
def test_a_whole_weight_counts_like_that_many_samples(loss):
    loss, _, values = loss.partition(" ")
    section = NetworkSection(loss=loss, layers=(config.Dense(units=5, activation="tanh"), config.Dense(units=3)))
    network = WholeNetwork(section, (4,), 3, np.float64, targets=values or "classes")
    parameters = np.empty(network.size)
    network.initial(0, parameters)
    targets = RANDOM.random((3, COUNT)) if values else CODES.astype(np.int32)
    often = RANDOM.integers(0, 4, COUNT)
    repeated = np.repeat(ALL, often)
    inputs = np.ascontiguousarray(INPUTS.T, np.float64)
    found, expected = np.empty_like(parameters), np.empty_like(parameters)
    weights = often / often.mean()
    outcome = network.loss_and_gradient(parameters, Batch(inputs, targets, weights), found)
    twin = Batch(np.ascontiguousarray(inputs[:, repeated]), np.ascontiguousarray(targets[..., repeated]))
    same = network.loss_and_gradient(parameters, twin, expected)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert outcome.mean_loss == pytest.approx(same.mean_loss, rel=1e-12)
    # A sample that is right is right, whatever its weight.
    assert outcome.correct == network.evaluate(parameters, Batch(inputs, targets)).correct
    with pytest.raises(ValueError, match=r"weights: given float64 \(2,\), expected \(30,\)"):
        network.evaluate(parameters, Batch(inputs, targets, np.ones(2)))


# --- Guessing ---


def losses_of_constants(targets, weights, loss):
    """Return the least weighted mean loss of an answer that is always the same, by searching for it."""
    from scipy.optimize import minimize

    def mean(z):
        if loss == "softmax":
            each = np.log(np.exp(z).sum()) - z @ targets.T
        elif loss == "logistic":
            each = (np.logaddexp(0, z) - targets * z).sum(axis=1)
        else:
            each = ((z - targets) ** 2).sum(axis=1) / 2
        return weights @ each / weights.sum()

    return minimize(mean, np.zeros(targets.shape[1]), tol=1e-12).fun


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("loss", ["softmax", "logistic", "squared"])
def test_the_loss_of_guessing_is_the_least_of_a_constant(tmp_path, loss, values, weighted):
    if values and loss == "softmax":
        return
    several = RANDOM.random((COUNT, 2)) + (0 if loss == "logistic" else 100)
    targets = several if values else CODES
    path = write(tmp_path / "data.h5", targets, weights=RANDOM.random(COUNT))
    network = NetworkSection(loss=loss, layers=(config.Dense(units=3),))
    data = DataSection(train=path, weights="w" if weighted else None)
    for resident in (True, False):
        with Source.open(path, 64, reading=Reading.of(data, network)) as source:
            source.storage._memory_bytes = source.storage._memory_bytes if resident else 100
            source.load()
            with h5py.File(path) as file:
                weights = file["w"][()] if weighted else np.ones(COUNT)
            expected = losses_of_constants(several if values else np.eye(3)[CODES], weights, loss)
            assert loss_of_guessing(source, loss) == pytest.approx(expected, rel=1e-5)
