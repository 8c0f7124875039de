#!/usr/bin/env bash
# XLA's pool of threads on the processor follows the variable NPROC, and none of those that other libraries follow.
#
# Versions:  jax and jaxlib 0.10.2; Linux x86_64.
# Behaviour: JAX starts a thread for each core that the process may use, also with OMP_NUM_THREADS=1 and with the flag of
#            XLA_FLAGS that is often recommended. With a rank on every core these are cores x cores threads. NPROC is read
#            when JAX makes its client, at the first array or jax.devices(), and may also ask for more threads than there
#            are cores. An affinity (taskset, a launcher that binds) works, too.
# Seen:      nothing set                                        2 of 2 cores
#            OMP_NUM_THREADS=1                                  2 of 2 cores
#            XLA_FLAGS=--xla_cpu_multi_thread_eigen=false       2 of 2 cores
#            NPROC=1                                            1 of 2 cores
#            NPROC=5                                            5 of 2 cores
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
[ "$(uname -sm)" = "Linux x86_64" ] || skip "the behaviour was seen on Linux x86_64 only"
cores=$(nproc)
[ "$cores" -gt 1 ] || skip "on one core all settings give one thread"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv jax || skip "python3 cannot make a virtual environment"
timeout 300 jax/bin/pip -qq install jax==0.10.2 || skip "the package cannot be installed"

cat >probe.py <<'PY'
import os

import jax

jax.numpy.ones((500, 500)).sum().block_until_ready()
tasks = os.listdir("/proc/self/task")
print(sum("XLAEigen" in open(f"/proc/self/task/{task}/comm").read() for task in tasks))
PY

changed=0
expect() { # expect THREADS SETTING
  local found
  found=$(env -u NPROC -u OMP_NUM_THREADS -u XLA_FLAGS JAX_PLATFORMS=cpu ${2:+"$2"} timeout 60 jax/bin/python probe.py) ||
    found=none
  printf '%-50s %s of %s cores\n' "${2:-nothing set}" "$found" "$cores"
  [ "$found" = "$1" ] || changed=1
}
expect "$cores" ""
expect "$cores" OMP_NUM_THREADS=1
expect "$cores" XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
expect 1 NPROC=1
expect 5 NPROC=5
if [ "$changed" = 1 ]; then
  echo "changed: the number of threads is not the one described"
  exit 1
fi
