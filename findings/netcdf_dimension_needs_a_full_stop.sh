#!/usr/bin/env bash
# A dimension scale without values is a dimension for netCDF if its name ends in a full stop, and else a variable of zeros.
#
# Versions:  netCDF4 1.7.5.1.post1 (netCDF-C 4.10.1), h5py 3.16.0, numpy 2.4.6.
# Behaviour: netCDF marks a dimension without a variable by a text in the attribute NAME of its HDF5 dimension scale:
#            "This is a netCDF dimension but not a netCDF variable.", then the length. The library looks for the text
#            with its full stop. A scale that another program has made, with the text but without the full stop, or
#            with a name of its own, becomes a variable, too. Its values were never stored, so that readers of labelled
#            arrays get coordinates that are all zero, and select nothing by them, or the wrong row.
# Seen:      with the full stop:     dimensions unit; variables weights
#            without the full stop:  dimensions unit; variables unit, weights; unit = 0 0 0
#            with the name "unit":   dimensions unit; variables unit, weights; unit = 0 0 0
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install netCDF4==1.7.5.1.post1 h5py==3.16.0 numpy==2.4.6 ||
  skip "the packages cannot be installed"

cat >write.py <<'PY'
import h5py
import numpy

TEXT = "This is a netCDF dimension but not a netCDF variable"
for file_name, name in (("stop", f"{TEXT}.         3"), ("none", f"{TEXT}         3"), ("own", "unit")):
    with h5py.File(f"{file_name}.h5", "w") as file:
        scale = file.create_dataset("unit", (3,), "f4")
        scale.make_scale(name)
        file["weights"] = numpy.arange(3.0)
        file["weights"].dims[0].attach_scale(scale)
PY
# A process of its own: both packages contain an HDF5 library.
cat >read.py <<'PY'
import netCDF4

for name in ("stop", "none", "own"):
    with netCDF4.Dataset(f"{name}.h5") as file:
        values = " ".join(f"{value:g}" for value in file["unit"][...]) if "unit" in file.variables else "no variable"
        print(f"{name}: {', '.join(file.dimensions)}; {', '.join(sorted(file.variables))}; {values}")
PY
env/bin/python write.py
seen=$(env/bin/python read.py)
echo "$seen"
expected='stop: unit; weights; no variable
none: unit; unit, weights; 0 0 0
own: unit; unit, weights; 0 0 0'
if [ "$seen" != "$expected" ]; then
  echo "changed: expected"
  echo "$expected"
  exit 1
fi
echo "as described"
