"""Arrays instead of a file: batches equal the rows, whatever the arrays are, and nothing of them is copied."""

import h5py
import numpy as np
import pytest

from dbmpi.data.given import GivenData
from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.errors import UserError

SAMPLES = 30
INDICES = np.array([3, 29, 0, 3, 17])


def source(given, targets="optional", **reading):
    return Source.of_arrays(GivenData.of(given, "it"), "it", targets, Reading(**reading))


class Lazy:
    """A user's own sequence."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number]


def forms(values, path):
    """Yield the same values in every form that is understood."""
    yield "array", values
    yield "columns first", np.asfortranarray(values)
    yield "every second", np.repeat(values, 2, axis=0)[::2]
    yield "other byte order", values.astype(values.dtype.newbyteorder())
    np.save(path / "it.npy", values)
    yield "memmap", np.load(path / "it.npy", mmap_mode="r")
    with h5py.File(path / "it.h5", "w") as file:
        file["it"] = values
        yield "dataset", file["it"]
    yield "list", [*values]
    yield "sequence", Lazy(values)


@pytest.mark.parametrize("kind", ["f4", "f8", "f2", "u1", "i8", "?"])
def test_batches_equal_the_rows(tmp_path, kind):
    values = (np.random.default_rng(1).normal(size=(SAMPLES, 2, 3)) * 100).astype("i2").astype(kind)
    factor = np.float32(1 / 255) if kind == "u1" else np.float32(1)
    expected = np.moveaxis(values[INDICES], 0, -1).astype(np.float32) * factor
    for form, given in forms(values, tmp_path):
        found = source(given).batch(INDICES)
        np.testing.assert_array_equal(found.inputs, expected, err_msg=form)
        assert (found.inputs.dtype, found.inputs.flags.c_contiguous) == (np.float32, True)
        assert found.targets.tolist() == [0] * len(INDICES)
        own = source(given, own=True).batch(INDICES)
        np.testing.assert_array_equal(own.inputs, values[INDICES], err_msg=form)
        assert own.inputs.dtype == (np.float32 if kind[0] == "f" else kind)
        assert own.inputs.flags.c_contiguous
        assert own.samples == len(INDICES)
        assert not np.shares_memory(own.inputs, values)


def test_a_file_gives_an_objective_what_arrays_do(tmp_path):
    """And both are the same data: a run that has learned from one may resume with the other."""
    random = np.random.default_rng(2)
    inputs = {"pixels": random.integers(0, 256, (SAMPLES, 2, 2)).astype("u1"), "user": np.arange(SAMPLES)}
    values, weights = random.normal(size=(SAMPLES, 2)), random.uniform(1, 2, SAMPLES)
    with h5py.File(tmp_path / "it.h5", "w") as file:
        for name, array in inputs.items():
            file[name] = array
        file["targets"], file["w"] = values, weights
    reading = Reading(inputs=("user", "pixels"), weights="w", own=True)
    given = source((inputs, values, weights), own=True)
    for memory_mib in (0.001, 1):
        with Source.open(tmp_path / "it.h5", 1, reading=reading) as file:
            file.storage._memory_bytes = int(memory_mib * 2**20)
            for one in (given, file):
                found = one.batch(INDICES)
                assert {name: array.dtype for name, array in found.inputs.items()} == {"pixels": "u1", "user": "i8"}
                for name, array in inputs.items():
                    np.testing.assert_array_equal(found.inputs[name], array[INDICES])
                np.testing.assert_array_equal(found.targets, values[INDICES].astype("f4"))
                np.testing.assert_allclose(found.weights, (weights / weights.mean())[INDICES], rtol=1e-6)
            assert one.meaning == given.meaning
    assert given.meaning.input_names == ("pixels", "user")
    assert given.input_shape == (5,)
    assert source((inputs | {"user": inputs["user"] + 1}, values), own=True).meaning.digest != given.meaning.digest


@pytest.mark.parametrize(("kind", "shape"), [("i2", (4,)), ("f8", (2, 3)), ("u1", (2, 1)), ("f8", ())])
def test_targets_of_an_objective_keep_their_axes_and_integers(tmp_path, kind, shape):
    inputs, values = np.zeros((SAMPLES, 2)), (np.arange(SAMPLES * 6) % 100).reshape(SAMPLES, -1).astype(kind)
    values = values[:, : int(np.prod(shape))].reshape(SAMPLES, *shape)
    with h5py.File(tmp_path / "it.h5", "w") as file:
        file["inputs"], file["targets"] = inputs, values
    for memory_mib in (0.001, 1):
        with Source.open(tmp_path / "it.h5", 1, reading=Reading(own=True)) as file:
            file.storage._memory_bytes = int(memory_mib * 2**20)
            for one in (source((inputs, values), own=True), file):
                found = one.batch(INDICES).targets
                np.testing.assert_array_equal(found, values[INDICES].reshape(len(INDICES), *(shape or (1,))))
                assert found.dtype == ("f4" if kind == "f8" else kind)
                assert found.flags.c_contiguous
            assert one.meaning == source((inputs, values), own=True).meaning
            assert file.storage.resident_bytes in (0, file.samples * (8 + found[0].nbytes))


def test_arrays_and_a_file_are_the_same_for_a_network(tmp_path):
    inputs = np.random.default_rng(2).normal(size=(SAMPLES, 4)).astype("f4")
    labels = np.arange(SAMPLES) % 3
    with h5py.File(tmp_path / "it.h5", "w") as file:
        file["inputs"], file["targets"] = inputs, labels
    with Source.open(tmp_path / "it.h5", 1) as file:
        given = source((inputs, labels))
        assert given.meaning == file.meaning
        np.testing.assert_array_equal(given.batch(INDICES).inputs, file.batch(INDICES).inputs)
        assert (given.classes, given.storage.resident_bytes, given.storage.spare_bytes) == (3, 0, 0)
    assert np.shares_memory(given._inputs[0], inputs), "copied"


def test_attributes_of_a_dataset_count_wherever_it_is_open(tmp_path):
    with h5py.File(tmp_path / "it.h5", "w") as file:
        file["inputs"] = (np.arange(SAMPLES * 2) % 7).reshape(SAMPLES, 2).astype("i2")
        file["inputs"].attrs.update({"scale_factor": 0.5, "add_offset": 1.0, "_FillValue": np.int16(3)})
        file["targets"] = np.arange(SAMPLES) % 3
        file["targets"].attrs.update({"classes": 5, "labels": [*"abcde"]})
        file["words"] = ["cat", "catfish", "c"] * 10
    for targets in ("targets", "words"):
        reading = {"missing": -1.0, "targets": targets}
        with Source.open(tmp_path / "it.h5", 1, reading=Reading(**reading)) as file:
            expected, known = file.batch(INDICES), (file.classes, file.labels, file.meaning)
        with h5py.File(tmp_path / "it.h5") as opened:
            given = source((opened["inputs"], opened[targets]), **reading)
            found = given.batch(INDICES)
            assert (given.classes, given.labels, given.meaning) == known
        assert -1 in found.inputs
        np.testing.assert_array_equal(found.inputs, expected.inputs)
        np.testing.assert_array_equal(found.targets, expected.targets)


def test_weights_of_a_file_without_targets(tmp_path):
    weights = np.arange(1.0, SAMPLES + 1)
    with h5py.File(tmp_path / "it.h5", "w") as file:
        file["inputs"], file["w"] = np.zeros((SAMPLES, 2), "f4"), weights
    with Source.open(tmp_path / "it.h5", 1, "optional", Reading(weights="w", own=True)) as file:
        found = file.batch(INDICES).weights
    np.testing.assert_allclose(found, (weights / weights.mean())[INDICES], rtol=1e-6)


def test_a_thread_reads_ahead_from_files_and_never_calls_code_of_a_user(tmp_path):
    values = np.zeros((SAMPLES, 2), np.float32)
    ahead = {form for form, given in forms(values, tmp_path) if source(given).storage.in_advance}
    assert ahead == set()  # a dataset without filters is read where it is
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["it"] = values
        assert not source((file["it"], Lazy([0, 1] * (SAMPLES // 2)))).storage.in_advance


@pytest.mark.parametrize(
    ("labels", "classes", "known"),
    [
        (["b", "a", "c"] * 10, 3, ("a", "b", "c")),
        (np.array(["b", "a", "c"] * 10, object), 3, ("a", "b", "c")),
        (Lazy(["cat", "catfish", "c"] * 10), 3, ("c", "cat", "catfish")),
        (np.arange(SAMPLES) % 2 * 2 - 1, 2, (-1, 1)),
        (np.arange(SAMPLES) % 2 == 0, 2, None),
        (np.eye(3)[np.arange(SAMPLES) % 3], 3, None),
    ],
    ids=["text", "text of a table", "text of any length", "signs", "truth", "one-hot"],
)
def test_labels_are_numbered_as_those_of_a_file(labels, classes, known):
    found = source((np.zeros((SAMPLES, 2)), labels), wanted="classes")
    assert (found.classes, found.labels) == (classes, known)
    assert found.batch(np.arange(6)).targets.max() < classes


WRONG = {
    "another number": (
        lambda x: (x, x[:-1, 0]),
        {},
        "'inputs' has 30 samples, but 'targets' has 29",
    ),
    "one axis": (lambda x: x[:, 0], {}, "'inputs' has shape (30,); expected (samples, features ...)"),
    "not finite": (lambda x: (np.where(x > 9, np.nan, x), x[:, 0]), {}, "sample 10 holds NaN"),
    "no class": (lambda x: (x, np.arange(30) - 2), {}, "label -2 of sample 0 is not a class"),
    "no targets": (lambda x: x, {"targets": "required"}, "has no targets; give a tuple, (inputs, targets)"),
    "too many": (lambda x: (x, x, x, x), {}, "given a tuple of 4; expected inputs, or a tuple"),
    "nothing": (lambda x: (), {}, "given a tuple of 0"),
    "a number": (lambda x: 5, {}, "'inputs' is int 5; expected inputs"),
    "ragged": (lambda x: [np.zeros(3), np.zeros(4)], {}, "sample 1 is float64 of shape (4,), and the first one"),
    "wider": (lambda x: (x, Lazy([np.int32(3), 2**33 + 5] * 15)), {}, "sample 1 is int64 of shape (), and the first"),
    "masked": (lambda x: (np.ma.masked_greater(x, 9), x[:, 0]), {}, "'inputs' has masked values; expected a value"),
    "masked row": (lambda x: [*np.ma.masked_greater(x, 9)], {}, "sample 10 has masked values"),
    "pairs": (lambda x: [(row, 1) for row in x], {}, "sample 0 is a tuple; expected an array or a number"),
    "empty": (lambda x: [], {}, "'inputs' is empty"),
    "text": (lambda x: ["a"] * 30, {}, "expected numbers, but these are"),
    "names": (lambda x: {}, {"own": True}, "the inputs are a dictionary of []"),
    "lengths": (lambda x: {"a": x, "b": x[1:]}, {"own": True}, "'a' has 30 samples, but 'b' has 29"),
    "weights": (lambda x: (x, x[:, 0], -x[:, 0]), {}, "the weight of sample 1 is -1.0; expected a finite number"),
    "several for a network": (lambda x: {"a": x, "b": x}, {}, "several inputs by name, ['a', 'b'], but a network"),
}


@pytest.mark.parametrize("way", WRONG)
def test_what_is_no_data_is_explained(way):
    make, settings, words = WRONG[way]
    with pytest.raises(UserError) as raised:
        source(make(np.arange(SAMPLES, dtype=float)[:, None]), **settings).validate(full=True)
    assert str(raised.value).startswith("it: ")
    assert words in str(raised.value)
