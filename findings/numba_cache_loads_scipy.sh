#!/usr/bin/env bash
# A process that takes a function from Numba's cache loads SciPy's linear algebra, whatever the function does.
#
# Versions:  numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6, scipy 1.17.1.
# Behaviour: before Numba unpacks compiled code it installs all of its implementations. One of these modules asks for a
#            BLAS while it is imported, and so imports scipy.linalg if SciPy is installed, also for a loop over three
#            numbers. Importing Numba alone does not. Every rank of a job pays for it at each start.
# Seen:      numba is imported: scipy.linalg is not loaded
#            the function is loaded: 6.0, scipy.linalg is loaded
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install numba==0.68.1 numpy==2.4.6 scipy==1.17.1 || skip "the packages cannot be installed"

cat >sums.py <<'PY'
import numba


@numba.njit(cache=True)
def add(values):
    total = 0.0
    for value in values:
        total += value
    return total
PY
cat >use.py <<'PY'
import sys

import numpy as np
import sums


def loaded():
    return f"scipy.linalg is {'' if 'scipy.linalg' in sys.modules else 'not '}loaded"


print("numba is imported:", loaded())
found = sums.add(np.array([1.0, 2.0, 3.0]))
assert sum(sums.add.stats.cache_hits.values()) == int(sys.argv[1])
print(f"the function is loaded: {found}, {loaded()}")
PY
timeout 120 env/bin/python -W ignore use.py 0 >first # compiles, and fills the cache
seen=$(timeout 120 env/bin/python -W ignore use.py 1)
echo "$seen"
expected='numba is imported: scipy.linalg is not loaded
the function is loaded: 6.0, scipy.linalg is loaded'
[ "$seen" = "$expected" ] || { echo "changed: Numba no longer loads these modules with cached code"; exit 1; }
