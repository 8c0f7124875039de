#!/usr/bin/env bash
# Numba compiles a loop that takes four pairs apart in one line for one thread, but not for several; three pairs it does.
#
# Versions:  numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6, CPython 3.11.
# Behaviour: `(a, b), (c, d) = first, second` is the same as two assignments, and for up to three values CPython swaps
#            them without a tuple. From four on it builds a tuple of tuples. With parallel=True Numba's analysis of array
#            shapes takes that for a shape, and raises IndexError: no NumbaError, and without the user's line. A kernel
#            that is tested with one thread, where it is compiled without parallel=True, hides it. Assignments by
#            themselves compile.
# Seen:      three pairs, parallel=True: 1.0
#            four pairs, parallel=False: 1.0
#            four pairs, parallel=True: IndexError: tuple index out of range
#            four lines, parallel=True: 1.0
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

cat >compile.py <<'PY'
import numba
import numpy


def three_pairs(out, p, q, r, s):
    (a, b), (c, d), (e, f) = p, q, r
    for i in numba.prange(out.size):
        out[i] = a


def four_pairs(out, p, q, r, s):
    (a, b), (c, d), (e, f), (g, h) = p, q, r, s
    for i in numba.prange(out.size):
        out[i] = a


def four_lines(out, p, q, r, s):
    a, b = p
    c, d = q
    e, f = r
    g, h = s
    for i in numba.prange(out.size):
        out[i] = a


for function, parallel in ((three_pairs, True), (four_pairs, False), (four_pairs, True), (four_lines, True)):
    out = numpy.zeros(4)
    try:
        numba.njit(parallel=parallel)(function)(out, (1, 2), (3, 4), (5, 6), (7, 8))
        seen = out[0]
    except Exception as error:
        seen = f"{type(error).__name__}: {error}"
    print(f"{function.__name__.replace('_', ' ')}, parallel={parallel}: {seen}")
PY
seen=$(timeout 240 env/bin/python -W ignore compile.py)
echo "$seen"
expected='three pairs, parallel=True: 1.0
four pairs, parallel=False: 1.0
four pairs, parallel=True: IndexError: tuple index out of range
four lines, parallel=True: 1.0'
[ "$seen" = "$expected" ] || { echo "changed: nested tuples are no longer handled as described"; exit 1; }
