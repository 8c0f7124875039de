#!/usr/bin/env bash
# A boolean mask written by PyTables and used through h5py selects other rows, without an error; and the other way round.
#
# Versions:  tables 3.11.1, h5py 3.16.0, numpy 2.4.6.
# Behaviour: HDF5 has no boolean. PyTables stores numpy.bool_ as a bit field of 8 bits, h5py as an enumeration of FALSE and
#            TRUE; neither knows the other's. h5py returns the bit field as uint8 and PyTables the enumeration as int8.
#            NumPy takes an array of integers as an index for positions, not as a mask: values[mask] picks rows 1 and 0
#            again and again, and has as many rows as the mask. Only the class of the stored type shows which it was;
#            dataset.astype("?") in h5py gives the mask back.
# Seen:      the mask True False True applied to 10 20 30
#            written by PyTables, read by PyTables: bool, selects 10 30
#            written by PyTables, read by h5py: uint8, selects 20 10 20
#            written by h5py, read by h5py: bool, selects 10 30
#            written by h5py, read by PyTables: int8, selects 20 10 20
#            written by PyTables, read by h5py.astype: bool, selects 10 30
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install tables==3.11.1 h5py==3.16.0 numpy==2.4.6 || skip "the packages cannot be installed"

# One process a library: the packages contain HDF5 libraries of their own.
cat >step.py <<'PY'
import sys

import numpy

action, library, path = sys.argv[1:]
mask = numpy.array([True, False, True])
if library == "PyTables":
    import tables

    with tables.open_file(path, action) as file:
        if action == "w":
            file.create_array("/", "mask", mask)
        else:
            mask = file.root.mask[:]
else:
    import h5py

    with h5py.File(path, action) as file:
        if action == "w":
            file["mask"] = mask
        else:
            mask = file["mask"].astype("?")[:] if library == "h5py.astype" else file["mask"][:]
if action == "r":
    print(f"{mask.dtype}, selects", *numpy.array([10, 20, 30])[mask])
PY
changed=0
echo "the mask True False True applied to 10 20 30"
show() { # show WRITER READER EXPECTED
  local seen
  timeout 120 env/bin/python step.py w "$1" mask.h5
  seen=$(timeout 120 env/bin/python step.py r "$2" mask.h5) || seen=failed
  echo "written by $1, read by $2: $seen"
  [ "$seen" = "$3" ] || changed=1
}
show PyTables PyTables "bool, selects 10 30"
show PyTables h5py "uint8, selects 20 10 20"
show h5py h5py "bool, selects 10 30"
show h5py PyTables "int8, selects 20 10 20"
show PyTables h5py.astype "bool, selects 10 30"
[ "$changed" = 0 ] || { echo "changed: booleans are no longer read as described"; exit 1; }
