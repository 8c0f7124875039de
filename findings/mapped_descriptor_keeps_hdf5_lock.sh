#!/usr/bin/env bash
# A file of h5py that was mapped by its own descriptor stays locked after it is closed, as long as the mapping lives.
#
# Versions:  h5py 3.16.0 (HDF5 2.0.0), numpy 2.4.6, Python's mmap; Linux.
# Behaviour: HDF5 locks a file with flock when it opens it, and leaves the unlocking to close. mmap.mmap makes a duplicate
#            of the descriptor that it is given, and a lock of flock belongs to all duplicates together. So if the rows of
#            a contiguous dataset are mapped by the descriptor that h5py tells (get_vfd_handle), the shared lock outlives
#            File.close(): the same program, and every other one, is refused when it opens the file for writing, with
#            "unable to lock file", until the last array over the mapping is gone. Opening the file once more for the
#            mapping, which makes a description without a lock, avoids that.
# Seen:      mapped by h5py's descriptor: BlockingIOError 11
#            the same, when the mapping is gone: opened for writing
#            mapped by a descriptor of its own: opened for writing
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

cat >try.py <<'PY'
import mmap
import os

import h5py
import numpy


def writing():
    try:
        h5py.File("it.h5", "r+", locking=True).close()
    except OSError as error:
        return f"{type(error).__name__} {error.errno}"
    return "opened for writing"


with h5py.File("it.h5", "w") as file:
    file["x"] = numpy.arange(1000.0)
with h5py.File("it.h5", locking=True) as file:
    mapped = mmap.mmap(file.id.get_vfd_handle(), 0, prot=mmap.PROT_READ)
print("mapped by h5py's descriptor:", writing())
mapped.close()
print("the same, when the mapping is gone:", writing())
with h5py.File("it.h5", locking=True) as file:
    own = os.open("it.h5", os.O_RDONLY)
    mapped = mmap.mmap(own, 0, prot=mmap.PROT_READ)
    os.close(own)
print("mapped by a descriptor of its own:", writing())
PY
cat >expected <<'TXT'
mapped by h5py's descriptor: BlockingIOError 11
the same, when the mapping is gone: opened for writing
mapped by a descriptor of its own: opened for writing
TXT
env -u HDF5_USE_FILE_LOCKING timeout 60 env/bin/python try.py | tee seen
cmp -s seen expected || { echo "changed: the output differs from what is described"; exit 1; }
