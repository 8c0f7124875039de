#!/usr/bin/env bash
# Of two processes that keep different signatures of one function in Numba's cache, one may overwrite the other's code.
#
# Versions:  numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6.
# Behaviour: with cache=True there is one index for all signatures of a function. Each process reads it, adds its own
#            signature under the first free number, and writes it back; there is no lock. Two ranks that compile
#            different signatures at once both take number 1: one index replaces the other, and so does the code. What
#            the index names for one signature is then the code of another one; here a later process is given it.
#            The steps of the two processes are carried out one after the other, so that the outcome is always the same.
# Seen:      index of the second writer: int -> f.1.nbc
#            a later process asks for int: code for float
#            a later process asks for float: nothing
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install numba==0.68.1 numpy==2.4.6 || skip "the packages cannot be installed"

cat >writers.py <<'PY'
import tempfile

from numba.core.caching import IndexDataCacheFile

folder = tempfile.mkdtemp(dir=".")
first, second, later = (IndexDataCacheFile(folder, "f", "stamp of the sources") for _ in range(3))
# save() reads the index, adds a name, writes the index, and then the data; the two processes take turns.
index_of_first, index_of_second = first._load_index(), second._load_index()
index_of_first["float"] = first._data_name(len(index_of_first) + 1)
first._save_index(index_of_first)
index_of_second["int"] = second._data_name(len(index_of_second) + 1)
second._save_index(index_of_second)
second._save_data(index_of_second["int"], "code for int")
first._save_data(index_of_first["float"], "code for float")
print("index of the second writer:", *(f"{key} -> {name}" for key, name in later._load_index().items()))
for signature in ("int", "float"):
    print(f"a later process asks for {signature}: {later.load(signature) or 'nothing'}")
PY
seen=$(timeout 120 env/bin/python -W ignore writers.py)
echo "$seen"
expected='index of the second writer: int -> f.1.nbc
a later process asks for int: code for float
a later process asks for float: nothing'
[ "$seen" = "$expected" ] || { echo "changed: Numba's cache no longer behaves as described"; exit 1; }
