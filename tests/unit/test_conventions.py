"""Files as other tools write them: values, gaps and axes are taken as they are meant, or refused with a way on."""

import h5py
import numpy as np
import pytest

from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.errors import UserError

RANDOM = np.random.default_rng(5)
X = np.round(RANDOM.normal(size=(6, 4)), 3).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def write(path, inputs, attributes=(), targets=LABELS, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("inputs", data=inputs, **options).attrs.update(dict(attributes))
        file["targets"] = targets
    return path


def read(path, memory_mib=64, **reading):
    """Return the inputs with the sample first, once from memory and once row by row, which must be the same."""
    found = []
    for memory_bytes in (memory_mib << 20, 200):
        with Source.open(path, memory_mib, reading=Reading(**reading)) as source:
            source.storage._memory_bytes = memory_bytes
            source.validate(full=True)
            found.append(np.moveaxis(source.inputs(np.arange(source.samples)), -1, 0))
    np.testing.assert_array_equal(*found)
    return found[0]


# --- netCDF and CF ---

PACKED = np.array([[-32767, -5, 0, 7], [1, 2, 300, 32000]] * 3, np.int16)
GAPS = {"_FillValue": np.int16(-32767)}


@pytest.mark.parametrize(
    ("stored", "attributes", "expected"),
    [
        (PACKED, {"scale_factor": 0.5}, lambda v: v * 0.5),
        (PACKED, {"scale_factor": [0.5], "add_offset": [100.0]}, lambda v: v * 0.5 + 100),
        (PACKED, {"add_offset": np.float32(-3)}, lambda v: v - 3),
        (PACKED, GAPS, lambda v: -1 if v == -32767 else v),
        (PACKED, {**GAPS, "scale_factor": 0.1, "add_offset": 2.0}, lambda v: -1 if v == -32767 else v * 0.1 + 2),
        (PACKED, {"missing_value": np.array([0, 7], np.int16)}, lambda v: -1 if v in (0, 7) else v),
        (PACKED, {"valid_range": np.array([0, 300], np.int16)}, lambda v: v if 0 <= v <= 300 else -1),
        (PACKED, {"valid_min": np.int16(0)}, lambda v: v if v >= 0 else -1),
        (PACKED, {"valid_max": np.int16(300)}, lambda v: v if v <= 300 else -1),
        (PACKED, {"_Unsigned": b"true"}, lambda v: v % 65536),
        (PACKED, {"_Unsigned": "true", "_FillValue": np.int16(-5)}, lambda v: -1 if v == -5 else v % 65536),
        (PACKED.astype(">i2"), {**GAPS, "scale_factor": 2.0}, lambda v: -1 if v == -32767 else v * 2),
        (X, {"_FillValue": X[2, 1]}, lambda v: -1 if v == X[2, 1] else v),
        (np.where(X > 1, np.nan, X), {"_FillValue": np.float32(np.nan)}, lambda v: -1 if np.isnan(v) else v),
        (X.astype(">f8"), {"missing_value": -9999.0, "scale_factor": 4.0}, lambda v: v * 4),
        (np.uint8([[0, 9, 255, 20]] * 6), {"scale_factor": 0.05, "add_offset": -5.0}, lambda v: v * 0.05 - 5),
        (np.uint8([[0, 9, 255, 20]] * 6), {"_FillValue": np.uint8(255)}, lambda v: -1 if v == 255 else v / 255),
        (X, {"scale": 2.0}, lambda v: v * 2),
    ],
)
def test_scale_offset_and_gaps_are_honoured(tmp_path, stored, attributes, expected):
    path = write(tmp_path / "data.nc", stored, attributes)
    wanted = np.array([[expected(float(value)) for value in row] for row in stored], np.float32)
    np.testing.assert_allclose(read(path, missing=-1.0), wanted, rtol=3e-7)
    if "_FillValue" in attributes and (wanted == -1).any():
        with pytest.raises(UserError, match=r"sample \d is missing.*marks gaps.*data\.missing"):
            read(path)


def test_what_was_never_written_is_missing(tmp_path):
    """The fill value of the dataset itself, which netCDF sets without an attribute; 0 and bytes may be anything."""
    gap = np.float32(9.969209968386869e36)
    path = write(tmp_path / "gaps.nc", np.where(X > 1, gap, X), fillvalue=gap)
    with pytest.raises(UserError, match=r"value \[\d\] of sample \d is missing: it is 9\.96\d+e\+36.*samples lack"):
        read(path)
    np.testing.assert_array_equal(read(path, missing=0.25), np.where(X > 1, np.float32(0.25), X))
    path = write(tmp_path / "bytes.nc", np.uint8([[0, 9, 255, 20]] * 6), fillvalue=255)
    assert read(path)[0, 2] == 1
    path = write(tmp_path / "labels.nc", X, targets=np.array([0, 1, -2147483647, 0, 1, 2], np.int32))
    with h5py.File(path, "a") as file:
        file["targets"].attrs["_FillValue"] = np.int32(-2147483647)
    with pytest.raises(UserError, match="the label of sample 2 is missing"):
        read(path)


def test_nan_is_replaced_only_where_a_number_was_given(tmp_path):
    path = write(tmp_path / "nan.h5", np.where(X > 1, np.nan, X))
    with pytest.raises(UserError, match=r"holds NaN.*data\.missing"):
        read(path)
    np.testing.assert_array_equal(read(path, missing=7.0), np.where(X > 1, 7, X))
    with pytest.raises(UserError, match="holds NaN, infinity"):
        read(write(tmp_path / "inf.h5", np.where(X > 1, np.inf, X)), missing=7.0)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"scale": 0.5, "scale_factor": 0.5}, "'scale' and 'scale_factor', which say two different things"),
        ({"scale_factor": 0.0}, "scale_factor 0 .* not 0"),
        ({"scale_factor": "one"}, "attribute 'scale_factor'.*expected one number"),
        ({"valid_range": [1.0]}, "'valid_range'.*expected two numbers"),
        ({"_FillValue": "none"}, "'_FillValue' of 'inputs' is 'none'; expected numbers"),
        ({"scale": "1/255"}, "'scale'.*expected one number, e.g. 0.5"),
        ({"MATLAB_class": np.bytes_("char")}, "is a MATLAB 'char'; expected an array of numbers"),
        ({"MATLAB_class": np.bytes_("double"), "MATLAB_empty": np.uint8(1)}, "is an empty array of MATLAB"),
    ],
)
def test_attributes_that_make_no_sense_are_named(tmp_path, attributes, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "bad.h5", X, attributes))


def test_netcdf4_reads_the_same(tmp_path):
    netcdf = pytest.importorskip("netCDF4")
    path = tmp_path / "data.nc"
    variables = {
        "plain": ("f4", {}, None),
        "packed": ("i2", {"scale_factor": 0.001, "add_offset": 1.0}, None),
        "gaps": ("f4", {}, -9999.0),
        "both": ("i2", {"scale_factor": 0.001, "missing_value": np.int16(17)}, -5),
        "range": ("f8", {"valid_min": -1.0, "valid_max": 0.5}, None),
        "unsigned": ("i1", {"_Unsigned": "true", "scale_factor": 0.02}, None),
    }
    with netcdf.Dataset(path, "w") as file:
        file.createDimension("sample", None)
        file.createDimension("feature", 4)
        for name, (kind, attributes, fill) in variables.items():
            variable = file.createVariable(name, kind, ("sample", "feature"), fill_value=fill)
            variable.setncatts(attributes)
            values = np.ma.masked_array(np.abs(X) if name == "unsigned" else X, mask=np.zeros(X.shape, bool))
            if name != "unsigned":
                values[2, 1] = np.ma.masked
            variable[:] = values
        file.createVariable("label", "i4", ("sample",))[:] = LABELS
    with netcdf.Dataset(path) as file:
        for name in variables:
            expected = file[name][:].astype(np.float64).filled(-1.0).astype(np.float32)
            found = read(path, inputs=name, targets="label", missing=-1.0)
            np.testing.assert_allclose(found, expected, rtol=2e-7, err_msg=name)


# --- PyTables ---


def bit_field(file, name, values):
    """Store truth values as PyTables does: as bit fields of 8 bits (checked against PyTables 3.11 by the next test)."""
    space = h5py.h5s.create_simple(values.shape)
    dataset = h5py.h5d.create(file.id, name.encode(), h5py.h5t.STD_B8LE, space)
    dataset.write(space, space, values.astype(np.uint8), h5py.h5t.NATIVE_B8)


def test_bits_are_true_and_false(tmp_path):
    path = tmp_path / "bits.h5"
    with h5py.File(path, "w") as file:
        bit_field(file, "inputs", X > 0)
        bit_field(file, "targets", X[:, 0] > 0)
    np.testing.assert_array_equal(read(path), X > 0)
    with Source.open(path, 1) as source:
        assert source.classes == 2
        np.testing.assert_array_equal(source.targets(np.arange(6)), X[:, 0] > 0)


def test_pytables_writes_such_bits(tmp_path):
    tables = pytest.importorskip("tables")
    path = tmp_path / "tables.h5"
    with tables.open_file(path, "w") as file:
        file.create_carray("/", "inputs", obj=X > 0)
        file.create_array("/group", "targets", X[:, 0] > 0, createparents=True)
        file.create_earray("/", "values", obj=X)
    np.testing.assert_array_equal(read(path, targets="group/targets"), X > 0)
    np.testing.assert_array_equal(read(path, inputs="/values", targets="group/targets"), X)


# --- MATLAB ---


def matlab(path, **arrays):
    """Write a file as MATLAB 7.3 does: a user block, axes reversed, labels as doubles, the class as an attribute."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, (values, kind) in arrays.items():
            dataset = file.create_dataset(name, data=np.ascontiguousarray(values.T), chunks=True, compression="gzip")
            dataset.attrs["MATLAB_class"] = np.bytes_(kind)
    return path


@pytest.mark.parametrize("shape", [(6, 4), (6, 6), (6, 4, 3), (6, 2, 3, 4)])
def test_the_axes_of_matlab_are_those_of_the_user(tmp_path, shape):
    values = RANDOM.normal(size=shape)
    path = matlab(tmp_path / "data.mat", inputs=(values, "double"), targets=(LABELS[:, None] + 1.0, "double"))
    np.testing.assert_array_equal(read(path, wanted="classes"), values.astype(np.float32))
    with Source.open(path, 1, reading=Reading(wanted="classes")) as source:
        assert source.labels == (1, 2, 3)
        assert source.targets(np.arange(6)).tolist() == LABELS.tolist()
        assert "axes are taken in MATLAB's order" in source.notes[0]
    row = matlab(tmp_path / "row.mat", inputs=(values, "double"), targets=(LABELS[None] + 1.0, "double"))
    with Source.open(row, 1, reading=Reading(wanted="classes")) as source:
        assert source.targets(np.array([3, 2, 5])).tolist() == [0, 2, 2]


def test_matlab_s_truth_values_bytes_and_samples_in_the_last_axis(tmp_path):
    truth = (X > 0).astype(np.uint8)
    label = (LABELS[:, None].astype(np.uint8), "uint8")
    np.testing.assert_array_equal(read(matlab(tmp_path / "1.mat", inputs=(truth, "logical"), targets=label)), truth)
    expected = truth / np.float32(255)
    np.testing.assert_allclose(read(matlab(tmp_path / "2.mat", inputs=(truth, "uint8"), targets=label)), expected)
    with pytest.raises(UserError, match=r"'inputs' has 4 samples, but 'targets' has 6.*Axis 1 .* has 6.*permute"):
        read(matlab(tmp_path / "3.mat", inputs=(X.T, "single"), targets=label))


# --- Channels, names, links, filters ---


def test_channels_that_come_last_are_moved_to_the_front(tmp_path):
    images = RANDOM.integers(0, 256, (6, 5, 7, 3), np.uint8)
    path = write(tmp_path / "images.h5", images)
    with Source.open(path, 64, reading=Reading(channels="last")) as source:
        assert source.input_shape == (3, 5, 7)
    expected = np.moveaxis(images, -1, 1).astype(np.float32) * np.float32(1 / 255)
    np.testing.assert_array_equal(read(path, channels="last"), expected)
    np.testing.assert_array_equal(read(write(tmp_path / "rows.h5", X), channels="last"), X)


def test_datasets_by_name_and_links_within_the_file(tmp_path):
    path = tmp_path / "named.h5"
    with h5py.File(path, "w") as file:
        file["entry/data/x"] = X
        file["y"] = LABELS
        file["soft"] = h5py.SoftLink("/entry/data/x")
        file["entry/relative"] = h5py.SoftLink("data/x")
        file["twice"] = h5py.SoftLink("entry/relative")
        file["circle"] = h5py.SoftLink("/circle")
        file["dangling"] = h5py.SoftLink("/nowhere")
    for name in ("entry/data/x", "/entry/data/x", "soft", "entry/relative", "twice"):
        np.testing.assert_array_equal(read(path, inputs=name, targets="y"), X)
        with Source.open(path, 1, reading=Reading(inputs=name, targets="y")) as source:
            assert source.names == {"inputs": name, "targets": "y"}
    for name, message in {
        "inputs": r"has no dataset 'inputs'.*by data\.inputs, one of 'y' \(6,\), 'entry/data/x' \(6, 4\)",
        "entry/x": r"has no dataset 'entry/x'",
        "y/x": r"has no dataset 'y/x'",
        "entry": r"'entry' is a group that holds 'data', 'relative'",
        "circle": "lead in a circle",
        "dangling": "is a link to '/nowhere', where there is nothing",
    }.items():
        with pytest.raises(UserError, match=message):
            Source.open(path, 1, reading=Reading(inputs=name, targets="y"))


def test_a_filter_that_is_not_installed_is_named(tmp_path):
    path = tmp_path / "filtered.h5"
    with h5py.File(path, "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((6, 4))
        plist.set_filter(300, h5py.h5z.FLAG_OPTIONAL)  # a number set aside for tests; nothing implements it
        space = h5py.h5s.create_simple((6, 4))
        dataset = h5py.h5d.create(file.id, b"inputs", h5py.h5t.NATIVE_FLOAT, space, plist)
        dataset.write_direct_chunk((0, 0), b"packed in some way", 0)
        file["targets"] = LABELS
    with pytest.raises(UserError, match=r"'inputs' is compressed with .*filter 300.*pip install hdf5plugin"):
        Source.open(path, 1)
