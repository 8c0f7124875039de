#!/usr/bin/env bash
# HDF5 in a browser opens one file at a time: a virtual dataset with sources in other files reads as zeros, without an error.
#
# Versions:  h5wasm 0.8.7 (the reader of H5Web 16.0.1), h5py 3.16.0, numpy 2.4.6, Node.js 20.20.
# Behaviour: a page gives h5wasm the bytes of the file that its user has chosen. The sources of a virtual dataset are
#            not among them, and HDF5 takes the fill value for what it does not find: 0, if the author has set none.
#            H5Web then draws an array of zeros. With the fill value NaN it draws an empty picture; nothing says why.
#            The file names its sources, so a program can compare these with what it has. An author should set the
#            fill value NaN, and hand out one whole file for the browser.
# Seen:      all files, h5py:      1 2 3 4
#            one file, h5wasm:     0 0 0 0, NaN NaN NaN NaN; sources: a.h5, b.h5
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
command -v npm >/dev/null || skip "there is no npm"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install h5py==3.16.0 numpy==2.4.6 || skip "the packages cannot be installed"
timeout 300 npm install --silent --no-audit --no-fund h5wasm@0.8.7 || skip "h5wasm cannot be installed"

cat >write.py <<'PY'
import h5py
import numpy

layout = h5py.VirtualLayout((4,), "f4")
for number, name in enumerate(("a.h5", "b.h5")):
    with h5py.File(name, "w") as file:
        file["part"] = numpy.float32([2 * number + 1, 2 * number + 2])
    layout[2 * number : 2 * number + 2] = h5py.VirtualSource(name, "part", (2,), "f4")
with h5py.File("whole.h5", "w") as file:
    file.create_virtual_dataset("zero", layout)
    file.create_virtual_dataset("nan", layout, fillvalue=numpy.nan)
with h5py.File("whole.h5") as file:
    print("all files, h5py:     ", *(f"{value:g}" for value in file["zero"]))
PY
cat >read.mjs <<'JS'
import { readFileSync } from "node:fs";
import h5wasm from "h5wasm";

const { FS } = await h5wasm.ready;
FS.writeFile("chosen.h5", readFileSync("whole.h5"));  // all that a page has
const file = new h5wasm.File("chosen.h5", "r");
const values = ["zero", "nan"].map((name) => Array.from(file.get(name).value).join(" ")).join(", ");
const sources = file.get("zero").metadata.virtual_sources.map((each) => each.file_name).join(", ");
console.log(`one file, h5wasm:     ${values}; sources: ${sources}`);
JS
seen=$(env/bin/python write.py && timeout 60 node read.mjs)
echo "$seen"
expected='all files, h5py:      1 2 3 4
one file, h5wasm:     0 0 0 0, NaN NaN NaN NaN; sources: a.h5, b.h5'
if [ "$seen" != "$expected" ]; then
  echo "changed: expected"
  echo "$expected"
  exit 1
fi
echo "as described"
