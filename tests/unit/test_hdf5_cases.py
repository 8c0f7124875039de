"""HDF5 files as others write them, of the same samples: what is read is right, and what is refused is explained.

Needs ``hdf5/make_files.py`` in ../shared/cases beside the project, or in the folder that DBMPI_CASES names.  The
same kinds are made in test_any_hdf5.py, test_conventions.py and test_source.py, which need no folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.errors import UserError

CASES = Path(os.environ.get("DBMPI_CASES", Path(__file__).parents[3] / "shared" / "cases"))
PROGRAM = CASES / "hdf5" / "make_files.py"
pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason=f"{PROGRAM} is not there; set DBMPI_CASES to its folder")

NAMES = {
    "Inputs-case": {"inputs": "Inputs", "targets": "Targets"},
    "X-y": {"inputs": "X", "targets": "y"},
    "names-elsewhere": {"inputs": "entry/data/x", "targets": "/entry/data/y"},
    "inputs-is-group": {"inputs": "inputs/a"},
    "t-compound": {"inputs": "table", "targets": "table/y"},
}
REFUSED = {
    "Inputs-case": "has no dataset 'inputs'.*by data.inputs, one of 'Inputs'",
    "X-y": "has no dataset 'inputs'.*one of 'X'",
    "names-elsewhere": "has no dataset 'inputs'.*one of 'entry/data/x'",
    "inputs-is-group": "'inputs' is a group that holds 'a'; expected a dataset",
    "t-compound": "has no dataset 'inputs'; found 'table'",
    "fillvalue-partial": "has 20 chunks, but only 10 were ever written",
    "huge-declared": "has 4294968 chunks, but only 1 were ever written",
    "unallocated-contig": "declares 48000 bytes, but only 0 were written",
    "fillvalue-9999": "is missing: it is -9999.0, which marks gaps.*data.missing",
    "nan": "sample 17 holds NaN.*data.missing",
    "nc-fill-gaps": "is missing.*marks gaps.*data.missing",
    "nc-fill-9999-gaps": "is missing: it is -9999.0, which marks gaps",
    "l-external-link": r"is a link to another file \(plain.h5\), which is not followed",
    "l-external-storage": "has external storage: its values lie in other files, which are not followed",
    "null-space": "has shape None; expected",
    "scalar": r"has shape \(\); expected",
    "rank1": r"has shape \(1000,\); expected .*reshape",
    "zero-row": "expected at least one sample",
    "t-complex": "complex numbers; store the real and the imaginary parts",
    "t-inputs-u1-CLASS-IMAGE": "attribute 'scale' of 'inputs' is '1/255'; expected one number",
    "t-refs": "text, references, or rows of different lengths",
    "t-vlen": "text, references, or rows of different lengths",
}
GAPS = {"fillvalue-9999", "nan", "nc-fill-gaps", "nc-fill-9999-gaps"}
TENTHS = {"t-inputs-beu2", "t-inputs-i1", "t-inputs-i4", "t-inputs-i8", "t-inputs-u2"}
"""Integers of ten times the inputs."""
BYTES = {"t-inputs-u1-cf"}
LOSSY = {
    "f-scaleoffset3": 6e-4,
    "f-scaleoffset-lossy1": 0.11,
    "nc-packed-i2": 6e-4,
    "p-zfp": 1e-3,
    "t-inputs-lef2": 4e-3,
}
LABELS = {
    "t-targets-bool": lambda y: y % 2,
    "t-targets-minus1": lambda y: (y != 0).astype(int),
    "t-targets-fixstr": lambda y: np.array([0, 2, 1])[y],
    "t-targets-vlenstr": lambda y: np.array([0, 2, 1])[y],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    for module in ("netCDF4", "hdf5plugin"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("cases")
    made = subprocess.run([sys.executable, PROGRAM, folder], check=True, capture_output=True, text=True, timeout=300)
    for name in re.findall(r"could not make (\S+)", made.stdout):
        print(made.stdout)
        (folder / f"{name}.h5").unlink()
    return folder


def read(path, **reading):
    with Source.open(path, 512, reading=Reading(wanted="classes", **reading)) as source:
        source.validate(full=True)
        every = np.arange(source.samples)
        inputs = np.moveaxis(source.inputs(every), -1, 0)
        source.storage._memory_bytes, source._inputs = 0, [None]
        return inputs.reshape(len(inputs), -1), source.targets(every)


def test_every_file_is_read_right_or_refused(files):
    with np.load(files / "truth.npz") as truth:
        inputs, labels = truth["X"], truth["y"]
    paths = sorted([*files.glob("*.h5"), *files.glob("*.nc")])
    assert len(paths) > 80
    for path in paths:
        name = path.stem
        if name in REFUSED:
            with pytest.raises(UserError, match=REFUSED[name]) as caught:
                read(path)
            assert len(str(caught.value).splitlines()) == 1
        options = dict(NAMES.get(name, {}))
        if name in GAPS:
            options["missing"] = 0.0
        elif name in REFUSED and name not in NAMES:
            continue
        found, targets = read(path, **options)
        expected = inputs[: len(found)].astype(np.float64)
        if name in GAPS:
            gap = (np.arange(1000) == 17) if name == "nan" else (np.arange(1000) % 50 == 0)
            expected[gap, 3] = 0
        if name in TENTHS:
            kind = name.removeprefix("t-inputs-").replace("be", ">")
            expected = (inputs * 10).astype(kind)
        elif name in BYTES:
            expected = np.clip(inputs * 20 + 100, 0, 255).astype("u1") * 0.05 - 5
        elif name == "t-inputs-bool":
            expected = inputs.astype(bool)
        elif name == "rank5":
            expected = expected.reshape(-1, 2, 2, 3, 1).reshape(len(found), -1)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=LOSSY.get(name, 1e-6), err_msg=name)
        wanted = LABELS.get(name, lambda y: y)(labels[: len(found)])
        np.testing.assert_array_equal(targets, wanted, err_msg=name)
