#!/usr/bin/env bash
# netCDF4 hides the value 255 of unsigned bytes: white pixels, really written, come back as missing.
#
# Versions:  netCDF4 1.7.5.1.post1 (netCDF-C 4.10.1), xarray 2026.9.0, h5py 3.16.0, numpy 2.4.6.
# Behaviour: a netCDF variable without the attribute _FillValue has a default fill value: 255 for unsigned bytes, where every
#            value is a valid one. netCDF4 for Python masks all elements equal to it, although every element was written
#            and the file does not mention missing values: means and counts are wrong without a word. xarray and h5py
#            return the numbers. For floats the roles are reversed: elements never written are 9.97e36, which netCDF4
#            masks but xarray and h5py return as numbers. No reader is right about both. set_auto_mask(False) turns the mask off, fill_value=False when writing prevents it.
# Seen:      image 0 128 254 255, netCDF4: 0 128 254 missing, mean 127.33
#            image 0 128 254 255, xarray: 0 128 254 255, mean 159.25
#            image 0 128 254 255, h5py: 0 128 254 255, mean 159.25
#            written with fill_value=False, netCDF4: 0 128 254 255, mean 159.25
#            float 1.5 and one never written, netCDF4: 1.5 missing, mean 1.50
#            float 1.5 and one never written, xarray: 1.5 9.969209968386869e+36, mean 4984604984193434523389276476051292160.00
#            float 1.5 and one never written, h5py: 1.5 9.969209968386869e+36, mean 4984604984193434523389276476051292160.00
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install netCDF4==1.7.5.1.post1 xarray==2026.9.0 h5py==3.16.0 numpy==2.4.6 ||
  skip "the packages cannot be installed"

cat >write.py <<'PY'
import netCDF4
import numpy

image = numpy.array([0, 128, 254, 255], "u1")
with netCDF4.Dataset("file.nc", "w") as file:
    file.createDimension("pixel", 4)
    file.createDimension("time", 2)
    file.createVariable("image", "u1", ("pixel",))[:] = image
    file.createVariable("other", "u1", ("pixel",), fill_value=False)[:] = image
    file.createVariable("float", "f8", ("time",))[0] = 1.5
PY
# One process a reader: the packages contain HDF5 libraries of their own.
cat >read.py <<'PY'
import sys

import numpy

reader, name = sys.argv[1:]
if reader == "netCDF4":
    import netCDF4

    values = netCDF4.Dataset("file.nc")[name][:]
elif reader == "xarray":
    import xarray

    values = xarray.open_dataset("file.nc", engine="netcdf4")[name].values
else:
    import h5py

    values = h5py.File("file.nc")[name][:]
mask = numpy.ma.getmaskarray(values)
print(*("missing" if hidden else value for value, hidden in zip(values.tolist(), mask)), end="")
print(f", mean {values.mean():.2f}")
PY
timeout 120 env/bin/python write.py
changed=0
show() { # show TEXT READER VARIABLE PATTERN
  local seen
  seen=$(timeout 120 env/bin/python read.py "$2" "$3") || seen=failed
  echo "$1, $2: $seen"
  # shellcheck disable=SC2053
  [[ $seen == $4 ]] || changed=1
}
image="image 0 128 254 255" float="float 1.5 and one never written"
show "$image" netCDF4 image "0 128 254 missing, mean 127.33"
show "$image" xarray image "0 128 254 255, mean 159.25"
show "$image" h5py image "0 128 254 255, mean 159.25"
show "written with fill_value=False" netCDF4 other "0 128 254 255, mean 159.25"
show "$float" netCDF4 float "1.5 missing, mean 1.50"
show "$float" xarray float "1.5 9.969209968386869e+36, *"
show "$float" h5py float "1.5 9.969209968386869e+36, *"
[ "$changed" = 0 ] || { echo "changed: default fill values are no longer treated as described"; exit 1; }
