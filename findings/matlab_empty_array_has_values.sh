#!/usr/bin/env bash
# An empty array in a MATLAB 7.3 file is read by h5py as an array of two numbers: its own shape.
#
# Versions:  hdf5storage 0.2.2 (writes MATLAB 7.3), h5py 3.16.0, numpy 2.4.6.
# Behaviour: an empty array of 0 x 3 becomes a dataset with the values 0 and 3 and the attribute MATLAB_empty = 1. A reader that
#            ignores that attribute gets a valid vector [0, 3] of uint64 where nothing was stored, and not even the type of
#            the array, which is only in the attribute MATLAB_class. All else equals a stored vector.
# Seen:      0 x 3 doubles: hdf5storage (0, 3) float64 [], h5py (2,) uint64 [0, 3], class double, empty 1
#            1 x 2 integers 0 3: hdf5storage (1, 2) uint64 [0, 3], h5py (2, 1) uint64 [0, 3], class uint64, empty none
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install hdf5storage==0.2.2 h5py==3.16.0 numpy==2.4.6 || skip "the packages cannot be installed"

cat >probe.py <<'PY'
import h5py
import hdf5storage
import numpy

hdf5storage.savemat(
    "file.mat", {"empty": numpy.zeros((0, 3)), "full": numpy.array([[0, 3]], "u8")}, format="7.3", store_python_metadata=False
)
back = hdf5storage.loadmat("file.mat")
with h5py.File("file.mat") as file:
    for name, text in (("empty", "0 x 3 doubles"), ("full", "1 x 2 integers 0 3")):
        array, dataset = back[name], file[name]
        print(
            f"{text}: hdf5storage {array.shape} {array.dtype} {array.ravel().tolist()},"
            f" h5py {dataset.shape} {dataset.dtype} {dataset[()].ravel().tolist()},"
            f" class {dataset.attrs['MATLAB_class'].decode()}, empty {dataset.attrs.get('MATLAB_empty', 'none')}"
        )
PY
timeout 120 env/bin/python probe.py | tee seen
cat >expected <<'TEXT'
0 x 3 doubles: hdf5storage (0, 3) float64 [], h5py (2,) uint64 [0, 3], class double, empty 1
1 x 2 integers 0 3: hdf5storage (1, 2) uint64 [0, 3], h5py (2, 1) uint64 [0, 3], class uint64, empty none
TEXT
cmp -s seen expected || { echo "changed: the file is no longer read as described"; exit 1; }
