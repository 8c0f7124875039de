#!/usr/bin/env bash
# One null dataset, or one soft link that leads nowhere, and netCDF4 cannot open the HDF5 file; PyTables reads it as 0.
#
# Versions:  netCDF4 1.7.5.1.post1 (netCDF-C 4.10.1), tables 3.11.1, h5py 3.16.0, numpy 2.4.6.
# Behaviour: HDF5 knows datasets without any value (a null dataspace, h5py.Empty) and links whose target does not exist
#            (yet). h5py shows both as they are. The netCDF library reads HDF5 files of others, but opens each object
#            when it opens the file, and fails at the first one it does not know: "NetCDF: HDF error", with no name and
#            with all the good variables out of reach. PyTables opens both files, and reads the null dataset as a
#            scalar 0.0: a number that is not in the file.
# Seen:      a file with a good dataset only: h5py 0 1 2, netCDF4 0 1 2, PyTables 0 1 2
#            with an empty dataset beside it: h5py 0 1 2, netCDF4 OSError -101, PyTables 0 1 2
#            with a dangling link beside it: h5py 0 1 2, netCDF4 OSError -101, PyTables 0 1 2
#            the empty dataset itself: h5py Empty(dtype=dtype('<f4')), PyTables array(0., dtype=float32)
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install netCDF4==1.7.5.1.post1 tables==3.11.1 h5py==3.16.0 numpy==2.4.6 ||
  skip "the packages cannot be installed"

cat >write.py <<'PY'
import h5py
import numpy

for name in ("good", "empty", "link"):
    with h5py.File(f"{name}.h5", "w") as file:
        file["x"] = numpy.arange(3)
        if name == "empty":
            file["y"] = h5py.Empty("f4")
        if name == "link":
            file["y"] = h5py.SoftLink("/later")
PY
# One process a reader: the packages contain HDF5 libraries of their own.
cat >read.py <<'PY'
import sys

reader, path, name = sys.argv[1:]
try:
    if reader == "h5py":
        import h5py

        value = h5py.File(path)[name][()]
    elif reader == "netCDF4":
        import netCDF4

        value = netCDF4.Dataset(path)[name][...]
    else:
        import tables

        with tables.open_file(path) as file:
            value = file.get_node(f"/{name}").read()
except OSError as error:
    print("OSError", error.errno)
else:
    print(*value) if getattr(value, "ndim", 0) else print(repr(value))
PY
timeout 120 env/bin/python write.py
changed=0
show() { # show TEXT FILE DATASET EXPECTED READER...
  local text=$1 file=$2 dataset=$3 expected=$4 seen=() reader
  shift 4
  for reader in "$@"; do
    seen+=("$reader $(timeout 120 env/bin/python read.py "$reader" "$file" "$dataset" || echo failed)")
  done
  printf -v seen '%s, ' "${seen[@]}"
  seen=${seen%, }
  echo "$text: $seen"
  [ "$seen" = "$expected" ] || changed=1
}
readers=(h5py netCDF4 PyTables)
refused="h5py 0 1 2, netCDF4 OSError -101, PyTables 0 1 2"
show "a file with a good dataset only" good.h5 x "h5py 0 1 2, netCDF4 0 1 2, PyTables 0 1 2" "${readers[@]}"
show "with an empty dataset beside it" empty.h5 x "$refused" "${readers[@]}"
show "with a dangling link beside it" link.h5 x "$refused" "${readers[@]}"
show "the empty dataset itself" empty.h5 y "h5py Empty(dtype=dtype('<f4')), PyTables array(0., dtype=float32)" h5py PyTables
[ "$changed" = 0 ] || { echo "changed: the files are no longer read as described"; exit 1; }
