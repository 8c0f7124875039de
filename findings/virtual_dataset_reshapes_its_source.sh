#!/usr/bin/env bash
# A virtual dataset over a dataset that has been written anew, turned, is read without an error: its rows are cut anew.
#
# Versions:  h5py 3.16.0 (HDF5 of its wheel), numpy 2.4.6.
# Behaviour: where the whole of a source is mapped, HDF5 compares only how many values source and destination have. If the
#            source has another shape with as many values, they fill the rows in their order in the file. With another number
#            of values, reading fails. If the source is missing, the fill value is read.
# Seen:      as written: [[1, 2], [3, 4], [5, 6], [7, 8]]
#            source turned: [[1, 3], [5, 7], [2, 4], [6, 8]]
#            source shorter: OSError
#            source missing: [[-1, -1], [-1, -1], [-1, -1], [-1, -1]]
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install h5py==3.16.0 numpy==2.4.6 || skip "the packages cannot be installed"

cat >probe.py <<'PY'
import os

import h5py
import numpy

values = numpy.arange(1, 9).reshape(4, 2)


def write(array):
    with h5py.File("source.h5", "w") as file:
        file["x"] = array


def show(what):
    with h5py.File("virtual.h5") as file:
        try:
            print(f"{what}: {file['x'][()].tolist()}")
        except OSError as error:
            print(f"{what}: {type(error).__name__}")


write(values)
with h5py.File("virtual.h5", "w") as file:
    layout = h5py.VirtualLayout((4, 2), "i8")
    layout[:] = h5py.VirtualSource("source.h5", "x", shape=(4, 2))
    file.create_virtual_dataset("x", layout, fillvalue=-1)
show("as written")
write(values.T)
show("source turned")
write(values[:3])
show("source shorter")
os.remove("source.h5")
show("source missing")
PY
timeout 120 env/bin/python probe.py | tee seen
cat >expected <<'TEXT'
as written: [[1, 2], [3, 4], [5, 6], [7, 8]]
source turned: [[1, 3], [5, 7], [2, 4], [6, 8]]
source shorter: OSError
source missing: [[-1, -1], [-1, -1], [-1, -1], [-1, -1]]
TEXT
cmp -s seen expected || { echo "changed: the virtual dataset is no longer read as described"; exit 1; }
