"""Checkpoints from strangers: torn, altered and hostile files end in one clear message."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from unit.checkpoint_files import LAYOUT, as_version_1, read_all, run_python, write

from dbmpi.checkpoint.contents import Contents, Malformed
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.errors import UserError


@pytest.fixture
def path(tmp_path) -> Path:
    return write(tmp_path)


def test_torn_at_any_length(path):
    whole = path.read_bytes()
    read_all(path)
    for length in {*range(0, len(whole), 97), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"step-000000123\.h5"):
            read_all(path)


def test_zeros_where_the_description_was(path):
    whole = bytearray(path.read_bytes())
    place = whole.index(b"shard_versions") // 512 * 512
    whole[place : place + 512] = bytes(512)
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"step-000000123\.h5"):
        read_all(path)


@pytest.mark.slow
def test_altered_bytes_never_end_in_another_error(path):
    # In a process of its own: a fault in HDF5 itself must not take the other tests along.
    ended = run_python(
        """
        from dbmpi.errors import UserError
        path = Path(sys.argv[1])
        whole = path.read_bytes()
        random = np.random.default_rng(1)
        refused = 0
        for _ in range(400):
            altered = bytearray(whole)
            place = int(random.integers(len(whole)))
            altered[place : place + 8] = random.bytes(min(8, len(whole) - place))
            path.write_bytes(altered)
            try:
                read_all(path)
            except UserError:
                refused += 1
        print(refused)
        """,
        path,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 0


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89HDF\r\n\x1a\n", bytes(5000)])
def test_no_hdf5_file(tmp_path, content):
    path = tmp_path / "file.h5"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"file\.h5"):
        Checkpoint.open(path)


def replace(file, place, **how):
    del file[place]
    return file.create_dataset(place, **how)


def hard_link(file):
    for name in ("dense1/weights", "dense2/bias"):
        del file["parameters"][name]
        file["parameters"][name] = file["parameters/dense2/weights"]
    del file["state"]
    for number in range(200):
        file[f"state/copy{number}"] = file["parameters"]


def external_storage(file):
    del file["parameters/dense2/bias"]
    file["parameters/dense2"].create_dataset("bias", (5,), "f4", external=[("/etc/passwd", 0, 20)])


def virtual(file):
    source = h5py.VirtualSource("other.h5", "x", (5,), np.float32)
    layout = h5py.VirtualLayout((5,), np.float32)
    layout[:] = source
    del file["parameters/dense2/bias"]
    file.create_virtual_dataset("parameters/dense2/bias", layout)


def external_link(file):
    del file["parameters/dense2/bias"]
    file["parameters/dense2/bias"] = h5py.ExternalLink("other.h5", "/x")


def soft_link(file):
    del file["parameters/dense2/bias"]
    file["parameters/dense2/bias"] = h5py.SoftLink("/state/accumulator/dense2/bias")


def unstored(file):
    """Declare an array of 4 TB of which nothing is stored."""
    replace(file, "parameters/dense2/weights", shape=(10**6, 10**6), dtype="f4")


HARMS = {
    "hard links to one array": (hard_link, "bytes and the file has"),
    "external storage": (external_storage, "stored in chunks, elsewhere or virtually"),
    "virtual": (virtual, "stored in chunks, elsewhere or virtually"),
    "external link": (external_link, "link to somewhere else"),
    "soft link": (soft_link, "link to somewhere else"),
    "unstored": (unstored, "needs 4000000000000 bytes"),
    "filter": (
        lambda file: replace(file, "parameters/dense2/bias", data=np.zeros(5, "f4"), compression="gzip"),
        "h5repack",
    ),
    "integers": (
        lambda file: replace(file, "parameters/dense2/bias", data=np.zeros(5, "i4")),
        "expected float32 or float64",
    ),
    "shapes differ": (
        lambda file: replace(file, "state/accumulator/dense2/bias", data=np.zeros(6, "f4")),
        r"accumulator/dense2/bias has shape \(6,\), the parameters have \(5,\)",
    ),
    "objects": (
        lambda file: replace(file, "run/configuration", data="{}", dtype=h5py.string_dtype()),
        "text of fixed length",
    ),
    "configuration missing": (lambda file: file.pop("run/configuration"), "/run/configuration is missing"),
    "tensors missing": (lambda file: file.pop("parameters/dense1"), "/parameters/dense1/weights is missing"),
    "step as text": (lambda file: replace(file, "run/step", data=np.bytes_("one")), "/run/step: expected integers"),
    "step negative": (lambda file: replace(file, "run/step", data=-4), "/run/step is -4, expected at least 0"),
    "step as list": (lambda file: replace(file, "run/step", data=[4, 5]), "/run/step: expected integers"),
    "group for array": (lambda file: file.create_group("data/holes/a"), "/data/holes: expected a dataset"),
    "later version": (
        lambda file: file.attrs.modify("format_version", 4),
        "format version 4, this dbmpi reads versions 1 to 3",
    ),
    "data file": (lambda file: file.attrs.pop("format"), "is it a data file"),
    "large attribute": (lambda file: file.attrs.create("format", np.zeros(5000, "i1")), "short text"),
    "names twice": (
        lambda file: replace(file, "run/tensors", data=np.array([b"dense2/bias"] * 2)),
        "must differ",
    ),
    "not UTF-8": (lambda file: replace(file, "run/created", data=np.bytes_(b"\xff\xfe")), "cannot be read"),
}


@pytest.mark.parametrize("checksums", [False, True], ids=["version 1", "with checksums"])
@pytest.mark.parametrize("harm", HARMS)
def test_harm_is_refused(path, harm, checksums):
    change, message = HARMS[harm]
    with h5py.File(path, "r+") as file:
        if not checksums:
            as_version_1(file)
        if harm == "group for array":
            del file["data/holes"]
        change(file)
    # Where there is a checksum, a mistake may be found by that first.
    with pytest.raises(UserError, match=f"{message}|checksums?[/:]" if checksums else message) as raised:
        read_all(path)
    assert str(path) in str(raised.value)


def test_arrays_beyond_the_end(path):
    with h5py.File(path) as file:
        size = path.stat().st_size
        end = max(file[f"parameters/{tensor.name}"].id.get_offset() + 4 * tensor.size for tensor in LAYOUT.tensors)
        assert end <= size
        layout = Contents(file, path, size).layout()
        Contents(file, path, end).arrays(layout, ("parameters",))
        with pytest.raises(Malformed, match="beyond the end"):
            Contents(file, path, end - 1).arrays(layout, ("parameters",))


def test_what_others_added_is_left_alone(path):
    with h5py.File(path, "r+") as file:
        file["notes/by hand"] = "good one"
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/x")
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.layout == LAYOUT
        assert checkpoint.parameters().tolist() == list(range(LAYOUT.size))
