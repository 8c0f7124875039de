"""Data files: batches equal the file's rows, and what is not a data file is refused with a message that helps."""

import os
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbmpi.data.ahead import Ahead
from dbmpi.data.gather import gather
from dbmpi.data.numbered_batches import NumberedBatches
from dbmpi.data.source import Source
from dbmpi.data.stream import Order
from dbmpi.errors import UserError


def write(path, inputs, targets, classes=None, scale=None, **storage):
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("inputs", data=inputs, **storage)
        if scale is not None:
            dataset.attrs["scale"] = scale
        if targets is not None:
            file.create_dataset("targets", data=targets)
            if classes is not None:
                file["targets"].attrs["classes"] = classes
    return path


def read_naively(path, indices, scale):
    with h5py.File(path) as file:
        inputs = np.stack([file["inputs"][index] for index in indices], axis=-1).astype(np.float32) * np.float32(scale)
        targets = np.stack([file["targets"][index] for index in indices], axis=-1)
    return inputs, targets


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    samples=st.integers(1, 300),
    kind=st.sampled_from(["f4", "f8", ">f4", ">f8", "f2", "u1", "i1", "u2", ">i2", "i4", "u8"]),
    scale=st.sampled_from([None, 0.5]),
    values=st.booleans(),
    data=st.data(),
)
@pytest.mark.slow
@pytest.mark.slow
def test_batches_equal_the_rows_of_the_file(tmp_path, *, shape, samples, kind, scale, values, data):
    storage = data.draw(st.sampled_from([{}, {"chunks": True}, {"chunks": True, "compression": "gzip"}]))
    memory_mib = data.draw(st.sampled_from([0.001, 64]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    inputs = (random.random((samples, *shape)) * 127).astype(kind)
    targets = random.random((samples, 3)) if values else random.integers(0, 7, samples)
    targets[0] = 0  # so that the labels are numbers of classes
    path = write(tmp_path / "data.h5", inputs, targets, scale=scale, **storage)
    indices = random.integers(0, samples, data.draw(st.integers(1, 200)))  # in any order, some of them twice
    factor = scale or (1 / 255 if kind == "u1" else 1)
    expected_inputs, expected_targets = read_naively(path, indices, factor)
    with Source.open(path, 64) as source:
        # Force the path of large files too, whatever the size of these.
        source.storage._memory_bytes = int(memory_mib * 2**20)
        source.validate(full=True)
        assert (source.samples, source.input_shape) == (samples, tuple(shape))
        assert (source.classes, source.target_size) == ((None, 3) if values else (int(targets.max()) + 1, None))
        for _ in range(2):
            batch = source.batch(indices)
            assert batch.samples == len(indices)
            assert batch.inputs.dtype == np.float32
            assert batch.inputs.flags.c_contiguous
            assert batch.targets.dtype == (np.float32 if values else np.int32)
            assert batch.targets.flags.c_contiguous
            np.testing.assert_array_equal(batch.inputs, expected_inputs)
            np.testing.assert_array_equal(batch.targets, expected_targets.astype(batch.targets.dtype))


@given(
    st.integers(1, 600),
    st.integers(1, 300),
    st.sampled_from([np.uint8, np.int8, np.uint16, np.int16, np.float32]),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_gather_is_take_and_transpose(features, samples, kind, seed):
    random = np.random.default_rng(seed)
    rows = (random.random((50, features)) * 255).astype(kind)
    indices = random.integers(0, 50, samples)
    result = gather(rows, indices, np.float32(0.25))
    np.testing.assert_array_equal(result, rows[indices].T.astype(np.float32) * np.float32(0.25))
    assert result.flags.c_contiguous


def test_residence_follows_the_budget(tmp_path):
    inputs = np.zeros((1000, 400), np.uint8)  # as float32 with its targets: 1.53 MiB
    path = write(tmp_path / "data.h5", inputs, np.zeros(1000, int))
    with Source.open(path, 1) as large, Source.open(path, 2) as small:
        assert not large.storage.resident
        assert small.storage.resident
        small.batch(np.arange(3))
        os.truncate(path, 0)
        small.batch(np.arange(3))  # is in memory


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("u1", {}),
        ("u2", {}),
        (">i2", {}),
        ("?", {}),
        ("u1", {"scale": 2.0}),
        ("u1", {"add_offset": 1.0}),
        ("i1", {"_Unsigned": "true"}),
        ("f8", {}),
    ],
)
def test_what_is_said_to_be_kept_is_what_is_kept(tmp_path, kind, attributes):
    path = write(tmp_path / "data.h5", np.ones((30, 7), kind), np.zeros(30, int))
    with h5py.File(path, "r+") as file:
        file["inputs"].attrs.update(attributes)
    with Source.open(path, 1) as source:
        source.load()
        assert source.storage.resident_bytes == source._inputs[0].nbytes + source._targets.nbytes


def test_a_batch_of_no_samples_and_indices_out_of_range(tmp_path):
    path = write(tmp_path / "data.h5", np.zeros((4, 3), np.float32), np.zeros(4, int))
    with Source.open(path, 1) as source:
        assert source.batch(np.arange(0)).inputs.shape == (3, 0)
        for wrong in (np.array([4]), np.array([-1]), np.zeros((1, 1), int)):
            with pytest.raises(IndexError):
                source.batch(wrong)


def test_targets_are_optional_where_none_are_needed(tmp_path):
    path = write(tmp_path / "data.h5", np.ones((4, 3), np.float32), None)
    with Source.open(path, 1, targets="optional") as source:
        source.validate(full=True)
        assert not source.has_targets
        assert source.inputs(np.array([2])).shape == (3, 1)
        assert source.batch(np.array([2, 0])).targets.tolist() == [0, 0]
        with pytest.raises(UserError, match="no dataset 'targets'"):
            source.targets(np.array([2]))
    with pytest.raises(UserError, match=r"data\.h5: has no dataset 'targets'; found 'inputs'"):
        Source.open(path, 1)


def test_close_may_be_called_twice(tmp_path):
    source = Source.open(write(tmp_path / "data.h5", np.ones((4, 3)), np.zeros(4, int)), 1)
    source.close()
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.batch(np.array([1]))


INPUTS = np.zeros((6, 3), np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (
            INPUTS.astype(np.complex64),
            LABELS,
            r"'inputs' is complex64; expected numbers.*the imaginary parts as features",
        ),
        (np.zeros(6, [("a", "S4")]), LABELS, r"'inputs' is a table without columns of numbers.*found 'a'"),
        (INPUTS.astype("S4"), LABELS, r"'inputs' is \|S4; expected numbers, but these are text"),
        (INPUTS[:, 0], LABELS, r"'inputs' has shape \(6,\); expected \(samples, features"),
        (INPUTS[:0], LABELS[:0], r"'inputs' has shape \(0, 3\); expected at least one"),
        (INPUTS[:, :0], LABELS, r"'inputs' has shape \(6, 0\); expected at least one"),
        (INPUTS, LABELS[:5], r"'inputs' has 6 samples, but 'targets' has 5"),
        (INPUTS.T, LABELS, r"'inputs' has 3 samples, but 'targets' has 6.*Axis 1 of 'inputs'.*moveaxis\(x, 1, 0\)"),
        (INPUTS, np.zeros((2, 6)), r"'inputs' has 6 samples, but 'targets' has 2.*Axis 1 of 'targets'"),
        (INPUTS, LABELS.reshape(6, 1, 1), r"'targets' is int64 of shape \(6, 1, 1\); expected integers \(samples,\)"),
        (INPUTS, np.zeros((6, 0)), r"'targets' has shape \(6, 0\); expected at least one value"),
        (INPUTS, np.array([b"a", b"b", b""] * 2), r"'targets': sample 2 has an empty label"),
        (INPUTS, np.zeros((6, 2), [("a", "f4")]), "'targets' is a table of columns; name one of them"),
        (INPUTS, LABELS - 1, r"label -1 of sample 0 is not a class; 2 of 6 labels are not; .* from 0 to 1"),
        (INPUTS, LABELS - 7, r"label -7 of sample 0 is not a class; 6 of 6 labels"),
        (INPUTS, LABELS.astype(np.uint64) + np.uint64(2**63), r"holds the label 9223372036854775810"),
        (np.where(np.arange(18).reshape(6, 3) == 7, np.nan, 0), LABELS, r"'inputs': sample 2 holds NaN.*1 of 6"),
        (np.where(np.arange(18).reshape(6, 3) > 13, 1e300, 0), LABELS, r"'inputs': sample 4 holds NaN.*2 of 6"),
        (INPUTS, np.where(np.arange(6)[:, None] > 1, np.inf, 0), r"'targets': sample 2 holds NaN.*4 of 6"),
    ],
)
def test_bad_datasets_are_named(tmp_path, inputs, targets, message):
    path = write(tmp_path / "bad.h5", inputs, targets)
    with pytest.raises(UserError, match=message) as caught, Source.open(path, 1) as source:
        source.validate(full=True)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "scale", "message"),
    [
        (2, None, r"label 2 of sample 2 is not a class; 2 of 6 labels are not; expected whole numbers from 0 to 1"),
        (0, None, r"attribute 'classes' of 'targets' is 0"),
        (2.5, None, r"attribute 'classes' of 'targets' is 2.5"),
        (2**40, None, r"attribute 'classes' of 'targets' is 1099511627776"),
        ("three", None, r"attribute 'classes' of 'targets' is 'three'; expected one number"),
        ([1, 2], None, r"attribute 'classes'.*expected one number"),
        (None, -1.0, r"attribute 'scale' of 'inputs' is -1.0; expected a number above 0"),
        (None, np.nan, r"attribute 'scale' of 'inputs' is nan"),
        (None, "1/255", r"attribute 'scale'.*expected one number"),
    ],
)
def test_bad_attributes_are_named(tmp_path, classes, scale, message):
    path = write(tmp_path / "bad.h5", INPUTS.astype(np.uint8), LABELS, classes, scale)
    with pytest.raises(UserError, match=message), Source.open(path, 1) as source:
        source.validate(full=True)


def test_labels_out_of_range_never_reach_a_batch(tmp_path):
    """Kernels use labels as an index; an unvalidated file must not make them write anywhere."""
    path = write(tmp_path / "bad.h5", np.zeros((600, 1000), np.float32), np.arange(600) % 7, classes=5)
    for memory_mib in (1, 100):
        with Source.open(path, memory_mib) as source, pytest.raises(UserError, match="label 5 of sample 5"):
            source.batch(np.arange(600))


def test_validation_of_one_block_reads_one_block(tmp_path):
    inputs = np.zeros((3000, 1000), np.float32)
    inputs[2999, 5] = np.nan
    with Source.open(write(tmp_path / "late.h5", inputs, np.zeros(3000, int)), 100) as source:
        source.validate(full=False)
        with pytest.raises(UserError, match="sample 2999 holds NaN"):
            source.validate(full=True)
        source.load()  # which closes the file
        with pytest.raises(UserError, match="sample 2999 holds NaN"):
            source.validate(full=True)


def test_files_that_are_no_data_files(tmp_path):
    (tmp_path / "text.h5").write_text("inputs,targets\n1,2\n")
    (tmp_path / "empty.h5").write_bytes(b"")
    whole = write(tmp_path / "whole.h5", np.ones((1000, 30)), np.zeros(1000, int)).read_bytes()
    (tmp_path / "torn.h5").write_bytes(whole[: len(whole) // 2])
    with h5py.File(tmp_path / "checkpoint.h5", "w") as file:
        file.attrs["format"] = "dbmpi-checkpoint"
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"] = 1
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file["inputs/a"] = 1
    with h5py.File(tmp_path / "newer.h5", "w") as file:
        file.attrs.update(format="dbmpi-data", format_version=2)
    program = "import h5py, sys; file = h5py.File(sys.argv[1], 'w'); file['inputs'] = 1; print(); sys.stdin.read()"
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "writing.h5")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout.readline()
    for name, message in {
        "missing.h5": "no such data file",
        ".": "is not a file",
        "text.h5": "is not an HDF5 file, or a torn one; expected an HDF5 file, e.g. made by 'dbmpi data import'",
        "empty.h5": "is not an HDF5 file",
        "torn.h5": "incomplete or damaged",
        "writing.h5": "is open for writing in another program; wait",
        "checkpoint.h5": "is a file of format 'dbmpi-checkpoint'; expected 'dbmpi-data'",
        "other.h5": "has no dataset 'inputs'; found 'images'; expected 'inputs'; name the dataset by data.inputs",
        "group.h5": "'inputs' is a group that holds 'a'; expected a dataset; name the dataset by data.inputs",
        "newer.h5": "has version 2 of the data format, but this dbmpi reads up to 1",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            Source.open(tmp_path / name, 1)
        assert str(tmp_path / name) in str(caught.value)
    writer.communicate()


def test_nothing_outside_the_file_is_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(40)))
    other = write(tmp_path / "other.h5", INPUTS, LABELS)
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("inputs", (4, 10), np.uint8, external=[(str(secret), 0, 40)])
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["inputs"] = h5py.ExternalLink(str(other), "inputs")
    with h5py.File(tmp_path / "through.h5", "w") as file:
        file["elsewhere"] = h5py.ExternalLink(str(other), "/")
        file["inputs"] = h5py.SoftLink("/elsewhere/inputs")
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout(shape=(6, 3), dtype=np.float32)
        layout[:] = h5py.VirtualSource(str(other), "inputs", shape=(6, 3))
        file.create_virtual_dataset("inputs", layout)
        file["targets"] = LABELS
    for name in ("external", "link", "through", "virtual"):
        with pytest.raises(UserError, match="not followed"):
            Source.open(tmp_path / f"{name}.h5", 1)


def test_declared_sizes_are_not_believed(tmp_path):
    with h5py.File(tmp_path / "unwritten.h5", "w") as file:
        file.create_dataset("inputs", (10**12, 1000), np.float32, chunks=(1000, 10))
        file.create_dataset("targets", (10**12,), np.int32, chunks=(1000,))
    with h5py.File(tmp_path / "contiguous.h5", "w") as file:
        file.create_dataset("inputs", (10**6, 1000), np.float32)
        file.create_dataset("targets", (10**6,), np.int32)
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        file.create_dataset("inputs", (1, 10**12), np.float32, chunks=(1, 1000))
        file["targets"] = [0]
    with h5py.File(tmp_path / "chunk.h5", "w") as file:
        file.create_dataset("inputs", (4, 10), np.uint8, maxshape=(None, 10), chunks=(10**7, 10))
        file["targets"] = [0] * 4
    for name, message in {
        "unwritten": "but only 0 were ever written",
        "contiguous": "declares 4000000000 bytes, but only 0 were written",
        "wide": r"one sample of shape \(1000000000000,\) takes 3814697 MiB, but data.memory_mib allows 64",
        "chunk": "has chunks of 95 MiB, but data.memory_mib allows 64",
    }.items():
        with pytest.raises(UserError, match=message):
            Source.open(tmp_path / f"{name}.h5", 64)


def test_damage_inside_a_dataset_is_named(tmp_path):
    inputs = np.random.default_rng(0).random((500, 40))
    path = write(tmp_path / "damaged.h5", inputs, np.zeros(500, int), chunks=(100, 40), fletcher32=True)
    with h5py.File(path) as file:
        offset = file["inputs"].id.get_chunk_info(2).byte_offset
    with path.open("r+b") as raw:
        raw.seek(offset + 9)
        raw.write(b"torn")
    for memory_mib in (1, 100):
        with Source.open(path, memory_mib) as source:
            with pytest.raises(UserError, match=r"damaged\.h5: dataset 'inputs' cannot be read"):
                source.validate(full=True)
            with pytest.raises(UserError, match="cannot be read"):
                source.batch(np.arange(200, 300))


def test_any_damage_is_a_message(tmp_path):
    """Bytes changed anywhere in the structure: the file is read, or refused with its name, and never anything else."""
    random = np.random.default_rng(1)
    storages = [{}, {"chunks": (10, 5)}, {"chunks": (10, 5), "compression": "gzip"}]
    refused = 0
    for trial in range(150):
        inputs, targets = random.random((50, 5)), random.integers(0, 3, 50)
        path = write(tmp_path / "damaged.h5", inputs, targets, classes=3, **storages[trial % 3])
        content = bytearray(path.read_bytes())
        for place in random.integers(0, min(len(content), 4000), 4):
            content[place] = random.integers(0, 256)
        path.write_bytes(content)
        try:
            with Source.open(path, 64) as source:
                source.validate(full=True)
                source.batch(np.arange(source.samples))
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
    assert 30 < refused < 150


def test_what_a_network_must_look_like(tmp_path):
    with Source.open(write(tmp_path / "classes.h5", INPUTS, LABELS), 1) as source:
        source.expect(3, "softmax")
        source.expect(3, "squared")
        source.expect(3, "logistic")
        source.expect(5, "logistic")
        for outputs, loss in ((2, "softmax"), (4, "softmax"), (2, "logistic"), (4, "squared")):
            with pytest.raises(UserError, match=rf"classes\.h5: .* 3 classes, .* {outputs} outputs.*units to 3"):
                source.expect(outputs, loss)
    with Source.open(write(tmp_path / "values.h5", INPUTS, np.zeros((6, 2))), 1) as source:
        source.expect(2, "squared")
        with pytest.raises(UserError, match="2 values a sample, but the network's last layer has 3 outputs"):
            source.expect(3, "squared")
        source.expect(2, "logistic")
        with pytest.raises(UserError, match=r"the loss 'softmax' needs classes; .*'logistic' for several labels"):
            source.expect(2, "softmax")


def test_a_test_file_must_suit_the_training_file(tmp_path):
    def opened(name, inputs, targets, classes=None, labels=None):
        path = write(tmp_path / f"{name}.h5", inputs, targets, classes)
        if labels is not None:
            with h5py.File(path, "a") as file:
                file["targets"].attrs["labels"] = labels
        return Source.open(path, 1)

    train = opened("train", INPUTS, LABELS, 3, [-1, 4, 9])
    opened("same", INPUTS[:2], LABELS[:2], 3, [-1, 4, 9]).expect_like(train)
    fewer = opened("fewer", INPUTS, LABELS % 2, 2, [9, -1])
    assert fewer.expect_like(train) == ()
    np.testing.assert_array_equal(fewer.targets(np.arange(6)), np.array([2, 0])[LABELS % 2])
    for name, inputs, targets, classes, labels, message in [
        ("wide", np.zeros((6, 4)), LABELS, None, None, r"shape \(4,\), but those of .*train\.h5 have \(3,\)"),
        ("more", INPUTS, LABELS + 1, 4, None, r"has 4 classes, but .*train\.h5 only 3"),
        ("values", INPUTS, np.zeros((6, 2)), None, None, r"are 2 values a sample, but .* are 3 classes"),
        ("others", INPUTS, LABELS % 2, 2, [4, 7], r"stand for the labels 4, 7, .* for -1, 4, 9; 7 was never learned"),
    ]:
        with pytest.raises(UserError, match=message):
            opened(name, inputs, targets, classes, labels).expect_like(train)


@pytest.mark.parametrize("samples", [60, 600])
def test_batches_read_ahead_are_those_read_when_needed(tmp_path, samples):
    inputs = np.random.default_rng(3).random((samples, 500), np.float32)
    with Source.open(write(tmp_path / "data.h5", inputs, np.zeros(samples, int)), memory_mib=1) as source:
        assert source.storage.resident == (samples == 60)
        order = Order(source.samples, 7, 2, 5)
        ahead = Ahead(NumberedBatches(source, order))
        for number, guess in [(0, 2), (2, 4), (5, 7), (6, 7), (7, 10**6), (8, 0)]:  # right ones and wrong ones
            found, wanted = ahead.batch(number), source.batch(order.indices(number))
            np.testing.assert_array_equal(found.inputs, wanted.inputs)
            np.testing.assert_array_equal(found.targets, wanted.targets)
            ahead.expect(guess)
        ahead.close()
        ahead.close()


def test_batches_are_kept_as_long_as_there_is_room(tmp_path, monkeypatch):
    inputs = np.random.default_rng(4).integers(0, 256, (60, 5), np.uint8)
    with Source.open(write(tmp_path / "data.h5", inputs, np.zeros(60, int)), memory_mib=1) as source:
        assert source.storage.spare_bytes == 2**20 - 60 * (5 + 1) * 4
        order, read = Order(source.samples, 20, 1, 5), []
        batch = source.batch
        monkeypatch.setattr(source, "batch", lambda indices: read.append(indices) or batch(indices))
        ahead = Ahead(NumberedBatches(source, order), keep_bytes=2 * 20 * (5 + 1) * 4)  # two of the three
        for number in (2, 0, 1, 0, 1, 2):
            np.testing.assert_array_equal(ahead.batch(number).inputs, batch(order.indices(number)).inputs)
        assert [list(indices) for indices in read] == [list(order.indices(number)) for number in (2, 0, 1, 1)]
